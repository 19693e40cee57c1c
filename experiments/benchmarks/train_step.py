"""The training step in three forms and in plain PyTorch, in turns over the same real batches.

padded          every layer at every one of max_len positions
read_positions  the last layer only where it is read
grouped         that, and rows of like length together (what training runs)
pytorch         the PyTorch twin, padded, Adam, the same arithmetic dtype
"""

import argparse
import dataclasses
import functools
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.train import parse as parse_experiment
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog, load_log
from tim4rec_jax.data.length_groups import LengthGroup, plan_length_groups
from tim4rec_jax.data.loader import GrainLoader
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.models import build_model
from tim4rec_jax.models.tim4rec import TiM4Rec
from tim4rec_jax.run_dir import environment
from tim4rec_jax.training.step import init_state, make_optimizer, train_step
from tim4rec_jax.typing import Array

Step = Callable[[Any], None]


class PaddedTiM4Rec(TiM4Rec):
    """The same model without the exact savings: everything at every position, then read at the last one."""

    def encode_last(self, items: Array, lengths: Array, timestamps: Array | None, **options: Any) -> Array:
        """Returns `encode` at position length - 1."""
        hidden = self.encode(items, lengths, timestamps, **options)
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def our_step(
    config: ExperimentConfig, model: Any, loader: GrainLoader, groups: tuple[LengthGroup, ...]
) -> tuple[Step, float]:
    """Returns a function that makes one update and waits for it, and the seconds its compilation took."""
    optimizer = make_optimizer(config.train, total_steps=1000)
    state = init_state(model, optimizer, config.train.seed)
    began = time.perf_counter()
    step = functools.partial(train_step, model, optimizer, config, groups, loader)
    compiled = jax.jit(step, donate_argnums=0).lower(state, (), next(loader.epoch(1))).compile()
    seconds = time.perf_counter() - began
    held = [state]

    def update(batch: Any) -> None:
        held[0], loss = compiled(held[0], (), batch)
        if not np.isfinite(float(loss)):
            raise FloatingPointError(f"the loss is {float(loss)}")

    return update, seconds


def pytorch_step(config: ExperimentConfig) -> Step:
    """Returns the same for the PyTorch twin on all cores."""
    import torch

    from experiments.benchmarks.torch_models.tim4rec import TiM4Rec as Twin

    torch.manual_seed(config.train.seed)
    model = Twin(config.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.learning_rate)

    def update(batch: Any) -> None:
        items, lengths, targets = (
            torch.from_numpy(a.astype(np.int64)) for a in (batch.items, batch.lengths, batch.targets)
        )
        optimizer.zero_grad()
        loss = model.loss(items, lengths, targets, torch.from_numpy(batch.timestamps))
        loss.backward()
        optimizer.step()
        if not np.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")

    return update


def measure(steps: dict[str, Step], batches: Sequence[Any]) -> dict[str, list[float]]:
    """Runs all forms in turns over the batches, after one warm-up each; returns seconds a step."""
    for step in steps.values():
        step(batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for batch, (name, step) in itertools.product(batches, steps.items()):
        began = time.perf_counter()
        step(batch)
        seconds[name].append(time.perf_counter() - began)
    return seconds


def benchmark_train_step(config: ExperimentConfig, log: InteractionLog, repeats: int) -> dict[str, Any]:
    """Measures the training step in all forms on real batches of the log."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=log.num_items + 1))
    train, max_len = config.train, config.model.max_len
    examples = split_log(log, config.data).train
    loader = GrainLoader(
        log, examples, max_len=max_len, batch_size=train.batch_size, seed=train.seed,
        precision=config.data.timestamp_precision,
    )  # fmt: skip
    lengths = np.minimum(examples.ends, max_len)
    plan = functools.partial(
        plan_length_groups, lengths, max_len, batch_size=train.batch_size, vocab_size=config.model.vocab_size,
        platform=jax.default_backend(), microbatch_tokens=train.microbatch_tokens,
    )  # fmt: skip
    one, several = plan(max_groups=1), plan(max_groups=train.length_groups)
    batches = list(itertools.islice(loader.epoch(1), repeats))
    model = build_model(config.model)
    forms = {
        "padded": (PaddedTiM4Rec(config.model), one),
        "read_positions": (model, one),
        "grouped": (model, several),
    }
    steps, compile_seconds = {}, {}
    for name, (module, groups) in forms.items():
        steps[name], compile_seconds[name] = our_step(config, module, loader, groups)
    steps["pytorch"] = pytorch_step(config)
    seconds = measure(steps, batches)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "config": config.name,
        "batch_size": train.batch_size,
        "max_len": max_len,
        "mean_length": float(lengths.mean()),
        "groups": [dataclasses.asdict(group) for group in several],
        "steps_an_epoch": loader.num_batches,
        "seconds": seconds,
        "median_seconds": medians,
        "compile_seconds": compile_seconds,
        "pytorch_over": {name: medians["pytorch"] / medians[name] for name in forms},
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def report(result: dict[str, Any]) -> Table:
    """The medians and their ratios."""
    table = Table(title=f"{result['config']}: training step, batch {result['batch_size']}, median")
    for column in ("form", "seconds", "PyTorch / this"):
        table.add_column(column, justify="right")
    for name, seconds in result["median_seconds"].items():
        table.add_row(name, f"{seconds:.3f}", f"{result['median_seconds']['pytorch'] / seconds:.2f}")
    return table


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Reads the config of `experiments.train` from `rest`; returns the record and its table."""
    config, _, _ = parse_experiment(rest)
    log = load_log(config.data)
    result = benchmark_train_step(config, log, options.repeats)
    return {"environment": environment(log.fingerprint), **result}, report(result)
