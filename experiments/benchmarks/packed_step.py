"""The training step at every position: on one device, on all of them, and a PyTorch model's.

All take the same real batches of packed rows through a step with Adam and wait for its loss, in turns:

one_device         what training runs with --parallel.strategy=single
all_devices        the rows spread over all devices; JAX_NUM_CPU_DEVICES makes several of a CPU's cores
without_seen_bias  one_device without a score for what was seen, where the config has one: the twin has none
pytorch            the PyTorch twin of TiM4Rec without time, on all cores; it does less work: it reads no times, and
                   where a row holds several histories it reads them as one

With --rectools=PYTHON, an interpreter that has RecTools, whole epochs of its SASRec follow, of the same width, layers
and length, else by its own settings, on all cores. Its epoch predicts a user's last events alone, as many as it reads,
and ours all of them: compare by targets.
"""

import dataclasses
import itertools
import pathlib
import resource
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments.benchmarks.outside_anchors import of_library
from experiments.benchmarks.timing import require_finite, step_form, time_in_turns
from experiments.family import of_model
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.loader import PackedBatch
from tim4rec_jax.run_dir import environment
from tim4rec_jax.training.setup import Setup, with_data

_EPOCHS_OF_RECTOOLS = 2


def _our_step(
    config: ExperimentConfig, log: InteractionLog, strategy: Any, batches: int
) -> tuple[Setup, list[Any], Any]:
    """Returns the set-up, its first batches, and a function of one of them that makes an update."""
    parallel = dataclasses.replace(config.parallel, strategy=strategy)
    setup = Setup(dataclasses.replace(config, parallel=parallel), log)
    payloads = [setup.layout.shard_batch(payload) for payload in itertools.islice(setup.loader.epoch(1), batches)]
    state = setup.init_state()
    compiled = setup.compile_steps(state, (payloads[0],))

    def step(payload: Any) -> None:
        nonlocal state
        state, losses = compiled(state, setup.device_data, (payload,))
        require_finite(float(losses[0]))

    return setup, payloads, step


def _torch_step(config: ExperimentConfig) -> Callable[[PackedBatch], None]:
    """Returns a function of a packed batch that makes an update of the PyTorch model."""
    import torch

    from experiments.benchmarks.torch_models.tim4rec import TiM4Rec

    torch.manual_seed(config.train.seed)
    model = TiM4Rec(of_model(config.model, "ssd4rec")).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.learning_rate)

    def step(batch: PackedBatch) -> None:
        items, targets = (torch.from_numpy(np.asarray(a, np.int64)) for a in (batch.items, batch.targets))
        trained = torch.from_numpy(np.asarray(batch.weights) > 0)
        optimizer.zero_grad()
        scores = model.logits(model.hidden(items)[trained])
        loss = torch.nn.functional.cross_entropy(scores, targets[trained])
        loss.backward()
        optimizer.step()
        require_finite(loss.item())

    return step


def _of_rectools(config: ExperimentConfig, log: InteractionLog, python: pathlib.Path) -> dict[str, Any]:
    """Times whole epochs of RecTools' SASRec; the first, in which it warms up, is kept but does not count."""
    model = config.model
    settings = {"anchor": "rectools_sasrec", "d_model": model.d_model, "num_layers": model.num_layers}
    settings |= {"max_len": model.max_len, "seed": config.train.seed, "timed_epochs": 1 + _EPOCHS_OF_RECTOOLS}
    with tempfile.TemporaryDirectory() as folder:
        about = of_library(python, log, pathlib.Path(folder).resolve(), settings)
    epoch = statistics.median(about["seconds"][1:])
    return about | {"epoch_seconds": epoch, "microseconds_per_target": 1e6 * epoch / about["targets_per_epoch"]}


def measure(
    config: ExperimentConfig, log: InteractionLog, repeats: int, rectools: pathlib.Path | None = None
) -> tuple[dict[str, Any], Table]:
    """Returns the record and its table.

    Args:
      config: trains at every position.
      log: read for it.
      repeats: batches that each form takes.
      rectools: an interpreter that has RecTools; None leaves it out.

    Raises:
      ValueError: RecTools fails.
    """
    config = with_data(config, log)
    setup, payloads, single = _our_step(config, log, "single", repeats)
    batch = jax.jit(setup.loader.batch)
    forms = {"one_device": step_form(single, payloads)}
    if jax.device_count() > 1:
        _, spread, sharded = _our_step(config, log, "sharded", repeats)
        forms["all_devices"] = step_form(sharded, spread)
    if config.model.seen_bias:
        plain = dataclasses.replace(config, model=dataclasses.replace(config.model, seen_bias=False))
        _, same, without = _our_step(plain, log, "single", repeats)
        forms["without_seen_bias"] = step_form(without, same)
    forms["pytorch"] = step_form(
        _torch_step(config), [jax.device_get(batch(setup.device_data, payload)) for payload in payloads]
    )
    readings = time_in_turns(forms, repeats=repeats)
    steps = setup.loader.num_batches
    seconds = {name: of_form.median for name, of_form in readings.items()}
    table = Table(title=f"{config.name}: every position of {config.train.batch_size} rows, median")
    for column in ("form", "seconds per step", f"seconds per epoch of {steps:,} steps", "PyTorch / this"):
        table.add_column(column, justify="right")
    for name, median in seconds.items():
        table.add_row(name, f"{median:.3f}", f"{median * steps:.1f}", f"{seconds['pytorch'] / median:.2f}")
    targets, others = len(setup.split.train), {}
    if rectools is not None:
        others["rectools_sasrec"] = other = _of_rectools(config, log, rectools)
        epoch, share = other["epoch_seconds"], other["targets_per_epoch"] / targets
        table.add_row("rectools_sasrec", "", f"{epoch:.1f} for {share:.0%} of the targets", "")
    return {
        "environment": environment(log.fingerprint),
        "config": config.name,
        "batch_size": config.train.batch_size,
        "max_len": config.model.max_len,
        "groups": [dataclasses.asdict(group) for group in setup.groups],
        "steps_per_epoch": steps,
        "targets_per_epoch": targets,
        "seconds": {name: of_form.seconds for name, of_form in readings.items()},
        "median_seconds": seconds,
        "epoch_seconds": {name: median * steps for name, median in seconds.items()},
        "pytorch_over": {name: seconds["pytorch"] / median for name, median in seconds.items()},
        **others,
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }, table
