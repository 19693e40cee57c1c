"""The training step: its savings one by one, its kernels on and off, and PyTorch's.

`run` (`experiments.benchmark train_step`) takes forms of it through the same real batches:
padded          every layer at every one of max_len positions
read_positions  the last layer only where it is read
grouped         that, and rows of like length together (what training runs)
pytorch         the PyTorch twin, padded, Adam, the same arithmetic dtype

A config that trains at every position is measured in the forms of `packed_step`.

`time_kernels` (a part of `experiments.benchmark gpu`) switches kernels on and off at the paper's settings, in several
precisions and groups. Both frameworks find their batches on the device and wait for the loss of every step.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmarks import packed_step
from experiments.benchmarks.operators import PRECISIONS, matmul_precision
from experiments.benchmarks.opponents import require_torch, torch_step, torch_step_forms
from experiments.benchmarks.timing import (
    Form,
    Part,
    Settings,
    build_all,
    over,
    require_finite,
    step_form,
    time_in_turns,
)
from experiments.cli import OptionParser
from experiments.configs import load_config
from experiments.family import file_name
from experiments.train import parse as parse_experiment
from tim4rec_jax.checks import require
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog, load_log, with_precision
from tim4rec_jax.data.loader import Batch, Loader, PrefixSampler
from tim4rec_jax.data.packing import LengthGroup, plan_length_groups
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import Cache, SequentialModel, build_model, model_class
from tim4rec_jax.run_dir import environment
from tim4rec_jax.training.setup import step_options
from tim4rec_jax.training.step import init_state, make_optimizer, train_step
from tim4rec_jax.typing import Array

_BATCHES = 4
# What all operators have kernels in.
_KERNELS = "pallas_triton"
STEPS_PER_DISPATCH = 8
_DISPATCHED = f", {STEPS_PER_DISPATCH} steps per dispatch"
# Rows of a batch that is bound by launches.
_FEW_ROWS = 16
# Data set -> rows of its item table, and the mean length of its training rows.
DATA = {"ml-1m": (3417, 118.0), "beauty": (12_102, 8.4)}
# Of its batches in the paper, of 2048 rows.
_PAPER_TOKENS = {"ml-1m": 409_600, "beauty": 102_400}
TINY_DATA = (30, 4.0)
MEMORY = (
    "planned by the compiler: temporaries, arguments (parameters, Adam's moments, batch) and results of the program"
)


def planned_memory(compiled: Any) -> dict[str, int]:
    """Returns the bytes that the compiler plans for a program, by kind, see `MEMORY`."""
    planned = compiled.memory_analysis()
    return {
        "temporary_bytes": planned.temp_size_in_bytes,
        "argument_bytes": planned.argument_size_in_bytes,
        # What takes the place of a donated argument is counted there.
        "result_bytes": planned.output_size_in_bytes - planned.alias_size_in_bytes,
    }


class Step:
    """A compiled training step, with the state that it goes on from.

    Attributes:
      compiled: the program, which takes its state's buffers for the new state.
      compile_seconds: how long compiling took.
      state: at first the one it was compiled for.
    """

    def __init__(self, jitted: Any, state: Any, batch: Any) -> None:
        """Compiles (state, (), batch) -> (state, loss) for a batch and a state, or for shapes of these."""
        began = time.perf_counter()
        self.compiled = jitted.lower(state, (), batch).compile(compiler_options=step_options())
        self.compile_seconds = time.perf_counter() - began
        self.state = state

    def __call__(self, batch: Any) -> float:
        """Makes one update, waits for its loss and returns it.

        Raises:
          FloatingPointError: the loss is no finite number.
        """
        self.state, loss = self.compiled(self.state, (), batch)
        return require_finite(float(loss))


def compile_step(config: ExperimentConfig, model: Any, loader: Any, groups: tuple[LengthGroup, ...]) -> Step:
    """Compiles the step of one device for a loader's batches, with its initial state."""
    optimizer = make_optimizer(config.train, total_steps=1000)
    step = functools.partial(train_step, model, optimizer, config, groups, loader)
    state = init_state(model, optimizer, config.train.seed)
    return Step(jax.jit(step, donate_argnums=0), state, next(iter(loader.epoch(1))))


def padded_model(config: ModelConfig) -> SequentialModel:
    """Returns a model without the exact savings: everything at every position, then read at the last one."""

    class Padded(model_class(config.name)):
        def forward(
            self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None
        ) -> tuple[Array, Cache | None]:
            hidden, cache = super().forward(items, timestamps, rows._replace(positions=None), cache)
            return rows.at(hidden), cache

    return Padded(config)


def groups_of(config: ExperimentConfig, lengths: np.ndarray, **changes: Any) -> tuple[LengthGroup, ...]:
    """Plans the groups of rows as training does on this platform, but for what `changes` say."""
    usual = {
        "max_groups": config.train.length_groups,
        "batch_size": config.train.batch_size,
        "vocab_size": config.model.vocab_size,
        "microbatch_tokens": config.train.microbatch_tokens,
        "platform": jax.default_backend(),
    }
    return plan_length_groups(lengths, config.model.max_len, **(usual | changes))


def compare_savings(config: ExperimentConfig, log: InteractionLog, repeats: int) -> dict[str, Any]:
    """Measures the training step in all forms on real batches of the log."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=log.num_items + 1))
    train, max_len = config.train, config.model.max_len
    examples = split_log(log, config.data).train
    sampler = PrefixSampler(log, examples, max_len=max_len, batch_size=train.batch_size, seed=train.seed)
    loader = Loader(sampler, on_device=False, precision=config.data.timestamp_precision)
    lengths = np.minimum(examples.ends, max_len)
    one, several = groups_of(config, lengths, max_groups=1), groups_of(config, lengths)
    batches = list(itertools.islice(loader.epoch(1), repeats))
    model = build_model(config.model)
    kinds = {"padded": (padded_model(config.model), one), "read_positions": (model, one), "grouped": (model, several)}
    steps = {name: compile_step(config, module, loader, groups) for name, (module, groups) in kinds.items()}
    update, tensors = torch_step(config, "cpu")
    forms = {name: step_form(step, batches) for name, step in steps.items()}
    forms["pytorch"] = step_form(lambda batch: update(tensors(batch)), batches)
    readings = time_in_turns(forms, repeats=len(batches))
    return {
        "config": config.name,
        "batch_size": train.batch_size,
        "max_len": max_len,
        "mean_length": float(lengths.mean()),
        "groups": [dataclasses.asdict(group) for group in several],
        "steps_an_epoch": loader.num_batches,
        "seconds": {name: of_form.seconds for name, of_form in readings.items()},
        "median_seconds": {name: of_form.median for name, of_form in readings.items()},
        "compile_seconds": {name: step.compile_seconds for name, step in steps.items()},
        "pytorch_over": {name: over(readings, "pytorch", name) for name in steps},
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def report_savings(result: dict[str, Any]) -> Table:
    """The medians and their ratios."""
    table = Table(title=f"{result['config']}: training step, batch {result['batch_size']}, median")
    for column in ("form", "seconds", "PyTorch / this"):
        table.add_column(column, justify="right")
    for name, seconds in result["median_seconds"].items():
        table.add_row(name, f"{seconds:.3f}", f"{result['median_seconds']['pytorch'] / seconds:.2f}")
    return table


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Reads the config of `experiments.train` from `rest`; returns the record and its table."""
    parser = OptionParser(prog="experiments.benchmark train_step")
    parser.add_argument("--rectools", type=pathlib.Path, help="an interpreter that has RecTools")
    own, rest = parser.parse_known_args(rest)
    config, _, _ = parse_experiment(rest)
    require_torch()
    log = load_log(config.data)
    if config.train.positions == "all":
        return packed_step.measure(config, log, options.repeats, own.rectools)
    require(own.rectools is None, f"--rectools={own.rectools} is measured with train.positions=all alone; leave it out")
    config = dataclasses.replace(config, data=with_precision(config.data, log))
    result = compare_savings(config, log, options.repeats)
    return {"environment": environment(log.fingerprint), **result}, report_savings(result)


@dataclass(frozen=True)
class Shape:
    """What a training step's cost depends on.

    Attributes:
      config: of a named experiment.
      mean_length: of the training rows, cut to max_len.
    """

    config: ExperimentConfig
    mean_length: float


def sized(name: str, about: tuple[int, float], tokens: int, **sizes: Any) -> Shape:
    """Returns a named experiment's settings with other sizes.

    Args:
      name: of the experiment.
      about: rows of the item table, and the mean length of the training rows.
      tokens: positions of a batch, padding included.
      sizes: of the model.
    """
    config = load_config(name)
    read = {name: size for name, size in sizes.items() if name in config.model.reads()}
    model = dataclasses.replace(config.model, vocab_size=about[0], **read)
    train = dataclasses.replace(config.train, batch_size=tokens // model.max_len)
    return Shape(dataclasses.replace(config, model=model, train=train), about[1])


def shapes(tiny: bool) -> tuple[Shape, ...]:
    """Returns the paper's two settings, with as many items as the data sets have after cleaning, and few rows."""
    if tiny:
        small = {"max_len": 8, "d_model": 16, "d_state": 16, "head_dim": 16, "dropout": 0.0}
        small |= {"use_ffn": False, "d_conv": 2}
        return (sized("ml1m_ssd4rec", TINY_DATA, 32, **small),)
    paper = [sized(f"{file_name(data)}_tim4rec", about, _PAPER_TOKENS[data]) for data, about in DATA.items()]
    return (*paper, sized("ml1m_tim4rec", DATA["ml-1m"], 200 * _FEW_ROWS))


def draw_lengths(rng: np.random.Generator, mean: float, longest: int, count: int) -> np.ndarray:
    """Draws lengths with a geometric tail, cut at `longest`, whose mean after the cut is `mean`.

    Raises:
      ValueError: for a mean that is not between 1 and longest.
    """
    if not 1 < mean < longest:
        raise ValueError(f"mean={mean} must lie between 1 and longest={longest}")
    # A length is over k with probability ratio^k, so the mean is the sum of these up to longest - 1.
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        low, high = (ratio, high) if np.sum(ratio ** np.arange(longest)) < mean else (low, ratio)
    return np.minimum(rng.geometric(1 - low, count), longest).astype(np.int32)


def draw_batch(shape: Shape, rng: np.random.Generator, *, full: bool = False) -> Batch:
    """Draws rows of random items at random gaps, from minutes to months; in full ones every position holds an item."""
    model, rows = shape.config.model, shape.config.train.batch_size
    lengths = draw_lengths(rng, shape.mean_length, model.max_len, rows)
    lengths = np.full_like(lengths, model.max_len) if full else lengths
    real = np.arange(model.max_len) < lengths[:, None]
    gaps = np.exp(rng.uniform(np.log(60), np.log(1e7), real.shape))
    seconds = 9e8 + np.cumsum(gaps, axis=1)
    return Batch(
        items=np.where(real, rng.integers(1, model.vocab_size, real.shape), 0).astype(np.int32),
        lengths=lengths,
        timestamps=np.where(real, seconds, 0).astype(np.float32),
        targets=rng.integers(1, model.vocab_size, rows).astype(np.int32),
        weights=np.ones(rows, np.float32),
    )


@dataclass(frozen=True)
class ResidentBatches:
    """A loader whose batches lie on the device."""

    batches: list[Batch]

    def epoch(self, _: int) -> Iterator[Batch]:
        """Yields all batches."""
        return iter(self.batches)

    def batch(self, _: tuple[()], batch: Batch) -> Batch:
        """Returns the batch, for it is all that a step gets."""
        return batch


def with_kernels(config: ExperimentConfig, kernels: str | None, *, loss: bool) -> ExperimentConfig:
    """Returns the settings with all operators in one backend, or each in its default, and the loss in tiles or not."""
    model, train = dataclasses.replace(config.model, kernels=kernels), config.train
    return dataclasses.replace(config, model=model, train=dataclasses.replace(train, loss_in_tiles=loss))


def our_form(config: ExperimentConfig, precision: str, groups: tuple[LengthGroup, ...], batches: list[Batch]) -> Form:
    """Compiles our step; its optimiser state lives on in the form."""
    config = _in_dtype(config, precision)
    # The context belongs to a thread.
    with matmul_precision(precision):
        step = compile_step(config, build_model(config.model), ResidentBatches(batches), groups)
    return step_form(step, batches)


def dispatch_form(
    config: ExperimentConfig, precision: str, groups: tuple[LengthGroup, ...], batches: list[Batch]
) -> Form:
    """Compiles `STEPS_PER_DISPATCH` of our steps as one program; a launch is all of them."""
    config = _in_dtype(config, precision)
    model, optimizer = build_model(config.model), make_optimizer(config.train, total_steps=1000)
    step = functools.partial(train_step, model, optimizer, config, groups, ResidentBatches(batches))
    turns = itertools.islice(itertools.cycle(batches), STEPS_PER_DISPATCH)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns)

    def steps(state: Any, _: tuple[()], stacked: Batch) -> tuple[Any, jax.Array]:
        state, losses = jax.lax.scan(lambda state, batch: step(state, (), batch), state, stacked)
        return state, losses[-1]

    with matmul_precision(precision):
        state = init_state(model, optimizer, config.train.seed)
        return step_form(Step(jax.jit(steps, donate_argnums=0), state, stacked), [stacked])


def _in_dtype(config: ExperimentConfig, precision: str) -> ExperimentConfig:
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def compare_kernels(
    shape: Shape, precision: str, settings: Settings, batches: list[Batch], lengths: np.ndarray
) -> dict:
    """Times the step with kernels on, off and as the operators choose, and PyTorch's, in turns; rows at full length."""
    choices: dict[str, tuple[str | None, bool]] = {"kernels off": ("xla", False), "kernels on": (_KERNELS, True)}
    if not settings.tiny:
        choices["kernels chosen"] = None, True
        if precision == "tfloat32":
            choices["kernels of ssd and conv"] = _KERNELS, False
    groups = groups_of(shape.config, lengths, max_groups=1, microbatch_tokens=None, platform="gpu")
    builders = {}
    for name, (kernels, loss) in choices.items():
        given = with_kernels(shape.config, kernels, loss=loss), precision, groups, batches
        builders[name] = functools.partial(our_form, *given)
        if name in ("kernels on", "kernels chosen"):
            builders[f"{name}{_DISPATCHED}"] = functools.partial(dispatch_form, *given)
    forms, failed = build_all(builders)
    others, missing = torch_step_forms(shape.config, precision, batches, settings.tiny)
    times, untimed = settings.time(forms | others)
    for name, record in times.items():
        if name.endswith(_DISPATCHED):
            record["median_seconds"] /= STEPS_PER_DISPATCH
            record["seconds"] = [seconds / STEPS_PER_DISPATCH for seconds in record["seconds"]]
    ratios = {
        f"{other} over {name}": times[other]["median_seconds"] / times[name]["median_seconds"]
        for name in forms.keys() & times.keys()
        for other in others.keys() & times.keys()
    }
    record = _about(shape, precision, lengths)
    return record | {"forms": times, "ratios": ratios, "missing": failed | missing | untimed}


def _about(shape: Shape, precision: str, lengths: np.ndarray) -> dict[str, Any]:
    config = shape.config
    return {
        "config": config.name,
        "precision": precision,
        "batch_size": config.train.batch_size,
        "max_len": config.model.max_len,
        "vocab_size": config.model.vocab_size,
        "mean_length": float(lengths.mean()),
    }


def sweep_groups(shape: Shape, precision: str, settings: Settings, batches: list[Batch], lengths: np.ndarray) -> dict:
    """Times our step with kernels on for several numbers of length groups and sizes of microbatches."""
    tokens = shape.config.train.batch_size * shape.config.model.max_len
    tried = [(1, None), (2, tokens // 2), (4, tokens // 4), (6, tokens // 8), (6, tokens // 16)]
    if settings.tiny:
        tried = [(1, tokens // 2)]
    config = with_kernels(shape.config, _KERNELS, loss=True)
    plans = {
        f"length_groups={g}, microbatch_tokens={t}": groups_of(
            config, lengths, max_groups=g, microbatch_tokens=t, platform="gpu"
        )
        for g, t in tried
    }
    builders = {name: functools.partial(our_form, config, precision, groups, batches) for name, groups in plans.items()}
    forms, failed = build_all(builders)
    times, untimed = settings.time(forms)
    record = _about(shape, precision, lengths)
    groups = {name: [dataclasses.asdict(group) for group in chosen] for name, chosen in plans.items()}
    best = min(times, key=lambda name: times[name]["median_seconds"], default=None)
    return record | {"groups": groups, "forms": times, "best": best, "missing": failed | untimed}


def _label(shape: Shape) -> str:
    return f"{shape.config.name} {shape.config.train.batch_size} rows"


def time_kernels(part: Part) -> None:
    """Measures comparisons and sweeps of the paper's settings."""
    settings, record = part.settings, part.record
    for kind in ("comparisons", "sweep"):
        record.setdefault(kind, [])
    prepared = []
    for shape in shapes(settings.tiny):
        batches = [draw_batch(shape, part.rng) for _ in range(_BATCHES)]
        lengths = np.concatenate([batch.lengths for batch in batches])
        prepared.append((shape, jax.device_put(batches), lengths))
    usual, *rest = PRECISIONS
    order = [("comparisons", compare_kernels, usual), ("sweep", sweep_groups, usual)]
    order += [("comparisons", compare_kernels, precision) for precision in ([] if settings.tiny else rest)]

    def measure(kind: str, how: Callable[..., dict[str, Any]], precision: str, *inputs: Any) -> None:
        shape, batches, lengths = inputs
        record[kind].append(how(shape, precision, settings, batches, lengths))

    part.do_all(
        (
            f"{kind}: {_label(inputs[0])} {precision}",
            functools.partial(measure, kind, how, precision, *inputs),
        )
        for (kind, how, precision), inputs in itertools.product(order, prepared)
    )
