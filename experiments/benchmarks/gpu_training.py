"""The whole training step on this device: kernels on and off, precisions, groups of like length, and PyTorch.

Rows are synthetic with the data sets' sizes: as many items, and lengths of the same mean. Both frameworks find their
batches on the device and wait for the loss of every step.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.gpu_cases import PRECISIONS, matmul_precision
from experiments.benchmarks.gpu_clock import Budget, Form, Settings, build_all, reason, time_limit
from experiments.benchmarks.gpu_torch import device, import_from, tuning_in_threads
from experiments.benchmarks.train_step import our_step
from experiments.configs import load_config
from tim4rec_jax.config import ExperimentConfig, ModelConfig, TrainConfig
from tim4rec_jax.data.length_groups import LengthGroup, plan_length_groups
from tim4rec_jax.data.loader import Batch
from tim4rec_jax.models import build_model

_BATCHES = 4
_TUNING_SECONDS = 90.0
# The setting of each operator's backend, and its value without our kernels.
_SWITCHES = {
    "ssd": (ModelConfig, "ssd_implementation", "xla"),
    "conv": (ModelConfig, "conv_implementation", "xla"),
    "loss": (TrainConfig, "loss_implementation", None),
}


@dataclass(frozen=True)
class Shape:
    """What a training step's cost depends on.

    Attributes:
      config: of a named experiment.
      mean_length: of the training rows, cut to max_len.
    """

    config: ExperimentConfig
    mean_length: float


def shapes(tiny: bool) -> tuple[Shape, ...]:
    """Returns the paper's two settings, with the number of items that the data sets have after cleaning."""

    def shape(name: str, vocab_size: int, mean_length: float, batch_size: int = 2048, **model: Any) -> Shape:
        config = load_config(name)
        model = dataclasses.replace(config.model, vocab_size=vocab_size, **model)
        train = dataclasses.replace(config.train, batch_size=batch_size)
        return Shape(dataclasses.replace(config, model=model, train=train), mean_length)

    if tiny:
        small = {"max_len": 8, "d_model": 16, "d_state": 16, "head_dim": 16, "dropout": 0.0}
        small |= {"use_time": False, "use_ffn": False, "d_conv": 2}
        return (shape("ml1m_tim4rec", 30, 4.0, 4, **small),)
    return shape("ml1m_tim4rec", 3417, 118.0), shape("beauty_tim4rec", 12_102, 8.4)


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


def draw_batch(shape: Shape, rng: np.random.Generator) -> Batch:
    """Draws rows of random items at random gaps, from minutes to months."""
    model, rows = shape.config.model, shape.config.train.batch_size
    lengths = draw_lengths(rng, shape.mean_length, model.max_len, rows)
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

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yields all batches."""
        return iter(self.batches)

    def batch(self, resident: tuple[()], payload: Batch) -> Batch:
        """The payload is the batch."""
        return payload


def with_kernels(config: ExperimentConfig, kernels: tuple[str, ...], implementation: str) -> ExperimentConfig:
    """Returns the settings with the named operators on our kernels and the others in plain JAX.

    Args:
      config: settings.
      kernels: of "ssd", "conv" and "loss".
      implementation: the kernels' name.
    """
    parts = {ModelConfig: config.model, TrainConfig: config.train}
    for op, (owner, name, off) in _SWITCHES.items():
        value = implementation if op in kernels else off
        parts[owner] = dataclasses.replace(parts[owner], **{name: value})
    return dataclasses.replace(config, model=parts[ModelConfig], train=parts[TrainConfig])


def plan(shape: Shape, lengths: np.ndarray, groups: int, tokens: int | None) -> tuple[LengthGroup, ...]:
    """Returns the groups of rows that an accelerator computes together."""
    config = shape.config
    return plan_length_groups(
        lengths, config.model.max_len, max_groups=groups, batch_size=config.train.batch_size,
        vocab_size=config.model.vocab_size, microbatch_tokens=tokens, platform="gpu",
    )  # fmt: skip


def _step_form(step: Callable[[Any], None], batches: list[Any]) -> Form:
    turn = itertools.cycle(batches)
    return Form(lambda: step(next(turn)), lambda _: None)


def our_form(config: ExperimentConfig, precision: str, groups: tuple[LengthGroup, ...], batches: list[Batch]) -> Form:
    """Compiles our step; its optimiser state lives on in the form."""
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    # The context belongs to a thread.
    with matmul_precision(precision):
        step, _ = our_step(config, build_model(config.model), ResidentBatches(batches), groups)
    return _step_form(step, batches)


def torch_form(shape: Shape, precision: str, place: str, batches: list[Batch], scan: Any = None) -> Form:
    """Builds the step of our PyTorch model, with Adam, on a device; `scan` replaces its state space duality."""
    import torch

    from experiments.benchmarks.torch_models.tim4rec import TiM4Rec as Twin

    config = shape.config
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.manual_seed(config.train.seed)
    model = Twin(config.model).to(place).train()
    if scan is not None:
        chunk = min(256, max(64, 1 << (config.model.max_len - 1).bit_length()))
        for layer in model.ssd_layers:
            layer.ssd.scan.forward = functools.partial(_scan_steps, scan, chunk)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.learning_rate, fused=place == "cuda")

    def tensors(batch: Batch) -> tuple[Any, ...]:
        integers = (batch.items, batch.lengths, batch.targets)
        items, lengths, targets = (torch.from_numpy(np.asarray(a, np.int64)).to(place) for a in integers)
        return items, lengths, targets, torch.from_numpy(np.array(batch.timestamps)).to(place)

    narrow = torch.autocast(place, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()

    def update(batch: tuple[Any, ...]) -> None:
        optimizer.zero_grad()
        with narrow:
            loss = model.loss(*batch)
        loss.backward()
        optimizer.step()
        if not np.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")

    return _step_form(update, [tensors(batch) for batch in batches])


def _scan_steps(scan: Any, chunk: int, x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """mamba_ssm's state space duality, called as our PyTorch model calls its own."""
    return scan(x, delta, A, B[:, :, None], C[:, :, None], chunk, D=D)


def torch_forms(shape: Shape, precision: str, batches: list[Batch], tiny: bool) -> tuple[dict[str, Form], dict]:
    """Returns the PyTorch steps, plain and on mamba_ssm's kernels, and why one is missing."""
    place, refusal = device(tiny)
    if place is None:
        return {}, {"PyTorch": refusal, "PyTorch on mamba_ssm": refusal}
    forms, missing = {}, {}
    for name in ("PyTorch", "PyTorch on mamba_ssm"):
        try:
            scan = None
            if name.endswith("mamba_ssm"):
                scan = import_from("mamba_ssm", "ops.triton.ssd_combined", "mamba_chunk_scan_combined")
            form = torch_form(shape, precision, place, batches, scan)
            with time_limit(_TUNING_SECONDS), tuning_in_threads():
                form.launch()
            forms[name] = form
        except Exception as error:  # Other people's kernels fail in their own ways; ours are timed all the same.
            missing[name] = reason(error)
    return forms, missing


def compare(shape: Shape, precision: str, settings: Settings, batches: list[Batch], lengths: np.ndarray) -> dict:
    """Times the step with kernels on and off, and PyTorch's, in turns; every row at full length."""
    choices = {"kernels off": (), "kernels on": tuple(_SWITCHES)}
    if precision == "tfloat32" and not settings.tiny:
        choices |= {"kernel of ssd": ("ssd",), "kernels of ssd and conv": ("ssd", "conv")}
    groups = plan(shape, lengths, 1, None)
    builders = {
        name: functools.partial(
            our_form, with_kernels(shape.config, kernels, settings.implementation), precision, groups, batches
        )
        for name, kernels in choices.items()
    }
    forms, failed = build_all(builders)
    others, missing = torch_forms(shape, precision, batches, settings.tiny)
    times, untimed = settings.time(forms | others)
    over = {
        f"{other} over {name}": times[other]["median_seconds"] / times[name]["median_seconds"]
        for name in forms.keys() & times.keys()
        for other in others.keys() & times.keys()
    }
    record = _about(shape, precision, lengths)
    return record | {"forms": times, "ratios": over, "missing": failed | missing | untimed}


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


def sweep(shape: Shape, precision: str, settings: Settings, batches: list[Batch], lengths: np.ndarray) -> dict:
    """Times our step with kernels on for several numbers of length groups and sizes of microbatches."""
    tokens = shape.config.train.batch_size * shape.config.model.max_len
    tried = [(1, None), (2, tokens // 2), (4, tokens // 4), (6, tokens // 8), (6, tokens // 16)]
    if settings.tiny:
        tried = [(1, tokens // 2)]
    config = with_kernels(shape.config, tuple(_SWITCHES), settings.implementation)
    plans = {f"length_groups={g}, microbatch_tokens={t}": plan(shape, lengths, g, t) for g, t in tried}
    builders = {name: functools.partial(our_form, config, precision, groups, batches) for name, groups in plans.items()}
    forms, failed = build_all(builders)
    times, untimed = settings.time(forms)
    record = _about(shape, precision, lengths)
    groups = {name: [dataclasses.asdict(group) for group in chosen] for name, chosen in plans.items()}
    best = min(times, key=lambda name: times[name]["median_seconds"], default=None)
    return record | {"groups": groups, "forms": times, "best": best, "missing": failed | untimed}


def run(
    settings: Settings,
    rng: np.random.Generator,
    budget: Budget,
    result: dict[str, Any],
    saved: Callable[[str], None],
) -> None:
    """Measures everything into `result` and calls `saved` after every step."""
    result.update({"comparisons": [], "sweep": [], "skipped": {}})
    prepared = []
    for shape in shapes(settings.tiny):
        batches = [draw_batch(shape, rng) for _ in range(_BATCHES)]
        lengths = np.concatenate([batch.lengths for batch in batches])
        prepared.append((shape, jax.device_put(batches), lengths))
    usual, *rest = PRECISIONS
    order = [("comparisons", compare, usual), ("sweep", sweep, usual)]
    order += [("comparisons", compare, precision) for precision in ([] if settings.tiny else rest)]
    for (kind, measure, precision), (shape, batches, lengths) in itertools.product(order, prepared):
        label = f"{kind}: {shape.config.name} {precision}"
        if not settings.wants(label):
            continue
        if refusal := budget.refusal():
            result["skipped"][label] = refusal
            continue
        try:
            result[kind].append(measure(shape, precision, settings, batches, lengths))
        except Exception as error:  # What cannot be timed must not stop the rest.
            result["skipped"][label] = reason(error)
        saved(label)
