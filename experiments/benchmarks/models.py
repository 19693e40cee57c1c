"""The six models side by side: training step and evaluation at the paper's shapes, in turns within one run.

ml1m            200 positions, 3,417 rows of the item table
beauty          50 positions, 12,102 rows
full            every row as long as there are positions
real            lengths with a geometric tail and the mean that the log's training rows have (118.0 and 8.4)
training        what `experiments.train` runs on one batch: rows of like length together, loss, gradients, Adam
evaluation      `encode_last` and all scores of one batch, rows of like length together

Items, gaps and targets are random. A batch has --tokens positions, padding included (12,800: 64 rows of 200 or 256 of
50), so that a CPU is done in minutes; the paper's batches have 2048 rows (--tokens=409600 and 102400). Memory is what
the compiler plans for the program: temporaries beside its arguments (parameters, for training also Adam's moments, and
the batch) and results; it is not what a process holds.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmarks.gpu_training import ResidentBatches, Shape, draw_batch
from experiments.configs import MODEL_NAMES, load_config
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.length_groups import LengthGroup, plan_length_groups
from tim4rec_jax.data.loader import Batch
from tim4rec_jax.models import build_model, init_params
from tim4rec_jax.run_dir import environment
from tim4rec_jax.training.step import TrainState, make_optimizer, train_step

# Data set -> rows of its item table, and the mean length of its training rows.
_DATA = {"ml1m": (3417, 118.0), "beauty": (12_102, 8.4)}
_TINY = {"max_len": 8, "d_model": 16, "num_layers": 1, "d_state": 4, "head_dim": 16, "inner_size": 32}
_TINY_DATA = (30, 4.0)
ROWS = ("full", "real")
BASELINE = "sasrec"
MEMORY = (
    "planned by the compiler: temporaries, arguments (parameters, Adam's moments, batch) and results of the program"
)


@dataclasses.dataclass(frozen=True)
class Form:
    """One compiled program.

    Attributes:
      run: does the work once, waits for it and returns its result.
      compile_seconds: how long compiling took.
      memory: bytes by kind, see `MEMORY`.
    """

    run: Callable[[], Any]
    compile_seconds: float
    memory: dict[str, int]


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for an unknown model, data set or kind of rows, or a batch without rows.
    """
    parser = argparse.ArgumentParser(prog="experiments.benchmark models", allow_abbrev=False)
    parser.add_argument("--models", default=",".join(MODEL_NAMES), help="which models, with commas between them")
    parser.add_argument("--data", default=",".join(_DATA), help="at which shapes")
    parser.add_argument("--rows", default=",".join(ROWS), help="of which lengths")
    parser.add_argument("--tokens", type=int, default=12_800, help="positions of a batch, padding included")
    parser.add_argument("--seed", type=int, default=0, help="of the batch")
    parser.add_argument("--figure", type=pathlib.Path, help="PNG of the ratios")
    parser.add_argument("--tiny", action="store_true", help="sizes at which the program can be tried out")
    options = parser.parse_args(rest)
    for name, known in (("models", MODEL_NAMES), ("data", tuple(_DATA)), ("rows", ROWS)):
        chosen = getattr(options, name).split(",")
        if unknown := [value for value in chosen if value not in known]:
            raise ValueError(f"--{name}={','.join(unknown)}: expected some of {','.join(known)}")
        setattr(options, name, [value for value in known if value in chosen])
    if options.tokens < 200:
        raise ValueError(f"--tokens={options.tokens} must be at least 200, one row of the longest shape")
    return options


def shape_of(data: str, model: str, options: argparse.Namespace) -> Shape:
    """Returns a model's settings on a data set, with the batch that is measured, and the rows' mean length."""
    vocab_size, mean_length = _TINY_DATA if options.tiny else _DATA[data]
    config = load_config(f"{data}_{model}")
    sizes = dataclasses.replace(config.model, vocab_size=vocab_size, **(_TINY if options.tiny else {}))
    train = dataclasses.replace(config.train, batch_size=options.tokens // sizes.max_len)
    return Shape(dataclasses.replace(config, model=sizes, train=train), mean_length)


def draw(shape: Shape, rows: str, seed: int) -> Batch:
    """Draws a batch; with "full" rows every position holds an item."""
    rng = np.random.default_rng(seed)
    batch = draw_batch(shape, rng)
    if rows == "real":
        return batch
    model = shape.config.model
    items = rng.integers(1, model.vocab_size, batch.items.shape).astype(np.int32)
    seconds = 9e8 + np.cumsum(np.exp(rng.uniform(np.log(60), np.log(1e7), items.shape)), axis=1)
    lengths = np.full_like(batch.lengths, model.max_len)
    return batch.replace(items=items, lengths=lengths, timestamps=seconds.astype(np.float32))


def groups_of(config: ExperimentConfig, batch: Batch) -> tuple[LengthGroup, ...]:
    """Plans the groups as training does on this platform, from the batch's own lengths."""
    return plan_length_groups(
        batch.lengths, config.model.max_len, max_groups=config.train.length_groups,
        batch_size=config.train.batch_size, vocab_size=config.model.vocab_size,
        microbatch_tokens=config.train.microbatch_tokens, platform=jax.default_backend(),
    )  # fmt: skip


def _compile(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float, dict[str, int]]:
    began = time.perf_counter()
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    planned = compiled.memory_analysis()
    memory = {
        "temporary_bytes": planned.temp_size_in_bytes,
        "argument_bytes": planned.argument_size_in_bytes,
        "result_bytes": planned.output_size_in_bytes - planned.alias_size_in_bytes,
    }
    return compiled, seconds, memory


def training(config: ExperimentConfig, params: Any, batch: Batch) -> Form:
    """Compiles one update."""
    model, optimizer = build_model(config.model), make_optimizer(config.train, total_steps=1000)
    key = jax.random.key_data(jax.random.key(config.train.seed, impl="threefry2x32"))
    # A copy, for the step takes the state's buffers for its result.
    held = [TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params), key)]
    loader, groups, batch = ResidentBatches([]), groups_of(config, batch), jax.device_put(batch)
    step = functools.partial(train_step, model, optimizer, config, groups, loader)
    compiled, seconds, memory = _compile(step, held[0], (), batch, donate_argnums=0)

    def run() -> float:
        held[0], loss = compiled(held[0], (), batch)
        if not math.isfinite(float(loss)):
            raise FloatingPointError(f"{config.name}: the loss is {float(loss)}")
        return float(loss)

    return Form(run, seconds, memory)


def _parts(batch: Batch, groups: tuple[LengthGroup, ...]) -> list[Batch]:
    """Cuts each row to the shortest static length that holds it; timestamps stay, as models ask."""
    lengths = np.array(sorted(group.length for group in groups))
    place = np.searchsorted(lengths, batch.lengths)
    parts = [(length, np.flatnonzero(place == k)) for k, length in enumerate(lengths)]
    return [
        jax.tree.map(lambda a, rows=rows: a[rows], batch).replace(items=batch.items[rows][:, :length])
        for length, rows in parts
        if len(rows)
    ]


def evaluation(config: ExperimentConfig, params: Any, batch: Batch) -> Form:
    """Compiles the scores of one batch."""
    model = build_model(config.model)
    parts = jax.device_put(_parts(batch, groups_of(config, batch)))

    def score(params: Any, parts: list[Batch]) -> jax.Array:
        hidden = [
            model.apply(
                {"params": params}, part.items, part.lengths, part.timestamps, deterministic=True, method="encode_last"
            )
            for part in parts
        ]
        return model.apply({"params": params}, jnp.concatenate(hidden), method="score")

    compiled, seconds, memory = _compile(score, params, parts)
    return Form(lambda: jax.block_until_ready(compiled(params, parts)), seconds, memory)


WORK = {"training": training, "evaluation": evaluation}


def measure(forms: dict[tuple[str, str], Form], repeats: int) -> dict[tuple[str, str], list[float]]:
    """Runs all forms in turns, after one run of each; returns the seconds of each run."""
    for form in forms.values():
        form.run()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in forms}
    for _, (key, form) in itertools.product(range(repeats), forms.items()):
        began = time.perf_counter()
        form.run()
        seconds[key].append(time.perf_counter() - began)
    return seconds


def compare(data: str, rows: str, options: argparse.Namespace, repeats: int) -> list[dict[str, Any]]:
    """Measures all models at one shape on the same batch; one result a model and work."""
    shapes = {model: shape_of(data, model, options) for model in options.models}
    batch = draw(next(iter(shapes.values())), rows, options.seed)
    forms, parameters = {}, {}
    for name, shape in shapes.items():
        print(f"compiling {name} at {data}, {rows} rows", file=sys.stderr, flush=True)
        init = jax.jit(functools.partial(init_params, build_model(shape.config.model)))
        params = init(jax.random.key(shape.config.train.seed))
        parameters[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
        forms |= {(name, work): make(shape.config, params, batch) for work, make in WORK.items()}
    seconds = measure(forms, repeats)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    results = []
    for (name, work), form in forms.items():
        config, base = shapes[name].config, medians.get((BASELINE, work))
        results.append(
            {
                "data": data, "rows": rows, "model": name, "work": work, "parameters": parameters[name],
                "seconds": seconds[name, work], "median_seconds": medians[name, work],
                f"over_{BASELINE}": None if base is None else medians[name, work] / base,
                "compile_seconds": form.compile_seconds, "memory": form.memory,
                "batch_size": config.train.batch_size, "max_len": config.model.max_len,
                "vocab_size": config.model.vocab_size, "mean_length": float(batch.lengths.mean()),
                "groups": [dataclasses.asdict(group) for group in groups_of(config, batch)],
            }
        )  # fmt: skip
    return results


def report(results: list[dict[str, Any]]) -> Table:
    """The medians, their ratios and the memory, a block a shape."""
    table = Table(title="median seconds of a batch; memory as planned by the compiler", title_justify="left")
    for column in ("model", "work", "seconds", f"/ {BASELINE}", "MB", "parameters"):
        table.add_column(column, justify="left" if column in ("model", "work") else "right")
    for (data, rows), block in itertools.groupby(results, key=lambda one: (one["data"], one["rows"])):
        block = list(block)
        table.add_section()
        size = f"{block[0]['batch_size']} x {block[0]['max_len']}"
        table.add_row(f"{data}, {rows}", size, f"mean {block[0]['mean_length']:.1f}", style="bold")
        for one in block:
            ratio = one[f"over_{BASELINE}"]
            table.add_row(
                one["model"], one["work"], f"{one['median_seconds']:.3g}", "–" if ratio is None else f"{ratio:.2f}",
                f"{sum(one['memory'].values()) / 1e6:.1f}", f"{one['parameters']:,}",
            )  # fmt: skip
    return table


def draw_figure(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the seconds of all models, a panel a shape and work."""
    from matplotlib.figure import Figure

    data = list(dict.fromkeys(one["data"] for one in results))
    figure = Figure(figsize=(9, 3.2 * len(data)), layout="constrained")
    for axes, (name, work) in zip(
        figure.subplots(len(data), len(WORK), squeeze=False).flat, itertools.product(data, WORK), strict=True
    ):
        for offset, rows in enumerate(dict.fromkeys(one["rows"] for one in results)):
            chosen = [one for one in results if (one["data"], one["work"], one["rows"]) == (name, work, rows)]
            places = [k + 0.4 * offset for k in range(len(chosen))]
            axes.barh(places, [one["median_seconds"] for one in chosen], height=0.38, label=f"{rows} rows")
            axes.set_yticks(places, [one["model"] for one in chosen])
        axes.invert_yaxis()
        axes.set(title=f"{name}, {work}", xlabel="seconds a batch")
        axes.legend()
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    results = [
        result
        for data, rows in itertools.product(chosen.data, chosen.rows)
        for result in compare(data, rows, chosen, options.repeats)
    ]
    if chosen.figure:
        draw_figure(results, chosen.figure)
    settings = {"tokens": chosen.tokens, "seed": chosen.seed, "repeats": options.repeats, "tiny": chosen.tiny}
    return {"environment": environment(), "settings": settings, "memory": MEMORY, "results": results}, report(results)
