"""All models side by side, training and evaluation, at the paper's shapes:

ml-1m           200 positions, 3,417 rows of the item table
beauty          50 positions, 12,102 rows
full            every row as long as there are positions
real            lengths with a geometric tail and the mean that the log's training rows have (118.0 and 8.4)
training        what `experiments.train` runs on one batch: rows of like length together, loss, gradients, Adam
evaluation      `last_hidden` and all scores of one batch, rows of like length together

Items, gaps and targets of the last two are random. A batch of models has --tokens positions, padding included (12,800:
64 rows of 200 or 256 of 50), so that a CPU is done in minutes; the paper's batches have 2048 rows (--tokens=409600 and
102400). Memory is what the compiler plans for the program: temporaries beside its arguments (parameters, for training
also Adam's moments, and the batch) and results; it is not what a process holds.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmarks.timing import Form, over, step_form, time_in_turns
from experiments.benchmarks.train_step import (
    DATA,
    MEMORY,
    TINY_DATA,
    ResidentBatches,
    Shape,
    compile_step,
    draw_batch,
    groups_of,
    planned_memory,
    sized,
)
from experiments.cli import OptionParser
from experiments.configs import MODEL_NAMES
from experiments.family import file_name
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.loader import Batch
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.data_config import DATA_ALIASES
from tim4rec_jax.figures import new_figure
from tim4rec_jax.models import build_model, last_hidden
from tim4rec_jax.run_dir import environment

_TINY = {"max_len": 8, "d_model": 16, "num_layers": 1, "d_state": 4, "head_dim": 16, "inner_size": 32}
ROWS = ("full", "real")
WORK = ("training", "evaluation")
BASELINE = "sasrec"


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for an unknown model, data set or kind of rows, or a batch without rows.
    """
    parser = OptionParser(prog="experiments.benchmark models")
    parser.add_argument("--models", default=",".join(MODEL_NAMES), help="which models, with commas between them")
    parser.add_argument("--data", default=",".join(DATA), help="at which shapes")
    parser.add_argument("--rows", default=",".join(ROWS), help="of which lengths")
    parser.add_argument("--tokens", type=int, default=12_800, help="positions of a batch, padding included")
    parser.add_argument("--seed", type=int, default=0, help="of the batch")
    parser.add_argument("--figure", type=pathlib.Path, help="PNG of the ratios")
    parser.add_flag("--tiny", "sizes at which the program can be tried out")
    options = parser.parse_args(rest)
    for name, known in (("models", MODEL_NAMES), ("data", tuple(DATA)), ("rows", ROWS)):
        chosen = [DATA_ALIASES.get(value, value) for value in getattr(options, name).split(",")]
        if unknown := [value for value in chosen if value not in known]:
            raise ValueError(f"--{name}={','.join(unknown)}: expected some of {','.join(known)}")
        setattr(options, name, [value for value in known if value in chosen])
    if options.tokens < 200:
        raise ValueError(f"--tokens={options.tokens} must be at least 200, one row of the longest shape")
    return options


def shape_of(data: str, model: str, options: argparse.Namespace) -> Shape:
    """Returns a model's settings on a data set, with the batch that is measured, and the rows' mean length."""
    about, sizes = (TINY_DATA, _TINY) if options.tiny else (DATA[data], {})
    return sized(f"{file_name(data)}_{model}", about, options.tokens, **sizes)


@dataclass(frozen=True)
class Compiled:
    """One program of a model.

    Attributes:
      form: does the work once.
      compile_seconds: how long compiling took.
      memory: bytes by kind, see `MEMORY`.
    """

    form: Form
    compile_seconds: float
    memory: dict[str, int]


def _shortened(batch: Batch, groups: tuple[LengthGroup, ...]) -> list[Batch]:
    """Cuts each row to the shortest static length that holds it; timestamps stay, as models ask."""
    lengths = np.array(sorted(group.length for group in groups))
    index = np.searchsorted(lengths, batch.lengths)
    chosen = [(length, np.flatnonzero(index == k)) for k, length in enumerate(lengths)]
    return [
        jax.tree.map(lambda a, rows=rows: a[rows], batch).replace(items=batch.items[rows][:, :length])
        for length, rows in chosen
        if len(rows)
    ]


def evaluation(config: ExperimentConfig, params: Any, batch: Batch) -> Compiled:
    """Compiles the scores of one batch."""
    model = build_model(config.model)
    pieces = jax.device_put(_shortened(batch, groups_of(config, batch.lengths)))

    def score(params: Any, pieces: list[Batch]) -> jax.Array:
        variables = {"params": params}
        hidden = [last_hidden(model, variables, rows.items, rows.lengths, rows.timestamps) for rows in pieces]
        return model.apply({"params": params}, jnp.concatenate(hidden), method="score")

    began = time.perf_counter()
    compiled = jax.jit(score).lower(params, pieces).compile()
    seconds = time.perf_counter() - began
    return Compiled(Form(functools.partial(compiled, params, pieces)), seconds, planned_memory(compiled))


def compile_work(config: ExperimentConfig, batch: Batch) -> tuple[dict[str, Compiled], int]:
    """Compiles training and evaluation of a model; returns them and the number of its parameters."""
    resident = [jax.device_put(batch)]
    groups = groups_of(config, batch.lengths)
    step = compile_step(config, build_model(config.model), ResidentBatches(resident), groups)
    training = Compiled(step_form(step, resident), step.compile_seconds, planned_memory(step.compiled))
    # A copy, for the step takes the state's buffers for its result.
    params = jax.tree.map(jnp.copy, step.state.params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"training": training, "evaluation": evaluation(config, params, batch)}, size


def compare_models(data: str, rows: str, options: argparse.Namespace, repeats: int) -> list[dict[str, Any]]:
    """Measures all models at one shape on the same batch; one result per model and work."""
    shapes_of = {model: shape_of(data, model, options) for model in options.models}
    rng = np.random.default_rng(options.seed)
    batch = draw_batch(next(iter(shapes_of.values())), rng, full=rows == "full")
    programs, parameters = {}, {}
    for name, shape in shapes_of.items():
        print(f"compiling {name} at {data}, {rows} rows", file=sys.stderr, flush=True)
        works, parameters[name] = compile_work(shape.config, batch)
        programs |= {(name, work): program for work, program in works.items()}
    readings = time_in_turns({key: program.form for key, program in programs.items()}, repeats=repeats)
    results = []
    for (name, work), program in programs.items():
        config = shapes_of[name].config
        results.append(
            {
                "data": data,
                "rows": rows,
                "model": name,
                "work": work,
                "parameters": parameters[name],
                "seconds": readings[name, work].seconds,
                "median_seconds": readings[name, work].median,
                f"over_{BASELINE}": over(readings, (name, work), (BASELINE, work)),
                "compile_seconds": program.compile_seconds,
                "memory": program.memory,
                "batch_size": config.train.batch_size,
                "max_len": config.model.max_len,
                "vocab_size": config.model.vocab_size,
                "mean_length": float(batch.lengths.mean()),
                "groups": [dataclasses.asdict(group) for group in groups_of(config, batch.lengths)],
            }
        )
    return results


def report(results: list[dict[str, Any]]) -> Table:
    """The medians, their ratios and the memory, a block per shape."""
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
                one["model"],
                one["work"],
                f"{one['median_seconds']:.3g}",
                "–" if ratio is None else f"{ratio:.2f}",
                f"{sum(one['memory'].values()) / 1e6:.1f}",
                f"{one['parameters']:,}",
            )
    return table


def draw_figure(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the seconds of all models, a panel per shape and work."""
    data = list(dict.fromkeys(one["data"] for one in results))
    figure = new_figure(9, 3.2 * len(data), "constrained")
    for axes, (name, work) in zip(
        figure.subplots(len(data), len(WORK), squeeze=False).flat, itertools.product(data, WORK), strict=True
    ):
        for offset, rows in enumerate(dict.fromkeys(one["rows"] for one in results)):
            chosen = [one for one in results if (one["data"], one["work"], one["rows"]) == (name, work, rows)]
            heights = [k + 0.4 * offset for k in range(len(chosen))]
            axes.barh(heights, [one["median_seconds"] for one in chosen], height=0.38, label=f"{rows} rows")
            axes.set_yticks(heights, [one["model"] for one in chosen])
        axes.invert_yaxis()
        axes.set(title=f"{name}, {work}", xlabel="seconds per batch")
        axes.legend()
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    results = [
        result
        for data, rows in itertools.product(chosen.data, chosen.rows)
        for result in compare_models(data, rows, chosen, options.repeats)
    ]
    if chosen.figure:
        draw_figure(results, chosen.figure)
    settings = {"tokens": chosen.tokens, "seed": chosen.seed, "repeats": options.repeats, "tiny": chosen.tiny}
    return {"environment": environment(), "settings": settings, "memory": MEMORY, "results": results}, report(results)
