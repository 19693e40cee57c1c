"""What one GPU was measured to do, read from committed records, in place of what `scaling` would assume.

  seconds - loss = F + p positions      the line through a large and a small step: F is launches and what is done once
  loss = 10 t v d / rate                the rate of softmax_cross_entropy's kernel, forward and backward

The large step reads whole prefixes and the small one packed rows; their encoders are of the same size.
"""

import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tim4rec_jax.config import ModelConfig

KERNELS = "pallas_triton"
_SIZES = ("d_model", "num_layers", "d_state", "expand", "head_dim")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """Rates of one GPU.

    Attributes:
      device: its name.
      bandwidth: bytes a second of a large copy.
      loss_rate: operations a second of the loss.
      position_seconds: of the encoder, forward and backward, and of the optimiser of a small table.
      step_seconds: of a step, whatever its size.
      steps: (positions, seconds) of the large step and of the small one.
    """

    device: str
    bandwidth: float
    loss_rate: float
    position_seconds: float
    step_seconds: float
    steps: tuple[tuple[float, float], tuple[float, float]]


def loss_operations(targets: float, items: float, width: int, products: int = 5) -> float:
    """Returns operations of a loss over `items`: a product of [targets, width] and [width, items] is 2 t v d."""
    return products * 2 * targets * items * width


def _read(path: pathlib.Path, pick: Callable[[dict[str, Any]], Result]) -> Result:
    try:
        return pick(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not the record that is needed ({type(error).__name__}: {error}); give those of `experiments."
            "benchmark gpu --parts=ops`, of `--parts=train_step`, and of a training on all positions with its lines"
        ) from error


def _of_ops(record: dict[str, Any]) -> tuple[str, float, float]:
    """Device, operations a second of the loss, bytes a second."""
    losses = {one["precision"]: one for one in record["ops"]["comparisons"] if one["op"] == "softmax_cross_entropy"}
    sizes, forms = losses["tfloat32"]["sizes"], losses["tfloat32"]["forms"]
    operations = loss_operations(sizes["t"], sizes["v"], sizes["d"])
    rate = operations / forms[f"{KERNELS}: forward_backward"]["median_seconds"]
    return record["environment"]["device_kind"], rate, record["ops"]["ceilings"]["bytes_a_second_of"]["copy"]


def _of_step(record: dict[str, Any]) -> tuple[str, float, float, float]:
    """Device, positions, seconds, and operations of the loss for a width of 1."""
    large = record["train_step"]["comparisons"][0]
    rows = large["batch_size"]
    seconds = large["forms"]["kernels on"]["median_seconds"]
    operations = loss_operations(rows, large["vocab_size"], 1)
    return record["environment"]["device_kind"], rows * large["mean_length"], seconds, operations


def _of_run(record: dict[str, Any]) -> tuple[str, dict[str, Any], int, float]:
    """Device, settings of the model, positions of a step, and its seconds: the median after the first line."""
    lines = [line for line in record["lines"] if line["kind"] == "train"]
    seconds, steps = (np.diff([line[name] for line in lines]) for name in ("seconds", "step"))
    if not len(steps):
        raise ValueError("it has fewer than two lines of training")
    model = record["config"]["model"]
    positions = record["config"]["train"]["batch_size"] * model["max_len"]
    return record["environment"]["device_kind"], model, positions, float(np.median(seconds / steps))


def read_measured(
    ops: pathlib.Path, step: pathlib.Path, run: pathlib.Path, model: ModelConfig, target_share: float
) -> Measured:
    """Reads what one GPU was measured to do.

    Args:
      ops: record of `experiments.benchmark gpu --parts=ops`.
      step: of `--parts=train_step`; its first comparison with kernels on counts.
      run: of a training on all positions, with its lines.
      model: whose encoder is asked for; that of the run has its sizes.
      target_share: of the run's positions that have a target.

    Raises:
      ValueError: a file is no such record, they are of different devices or another model, or tell no positive times.
    """
    device, rate, bandwidth = _read(ops, _of_ops)
    step_device, many, long, long_loss = _read(step, _of_step)
    run_device, settings, few, short = _read(run, _of_run)
    if len({device, step_device, run_device}) > 1:
        raise ValueError(f"records of different devices, {device}, {step_device} and {run_device}: give those of one")
    if other := {name: settings[name] for name in _SIZES if settings[name] != getattr(model, name)}:
        raise ValueError(f"{run} is of a model with {other}, which --config is not; give one of the same sizes")
    long_rest = long - long_loss * model.d_model / rate
    short_rest = short - loss_operations(few * target_share, settings["vocab_size"], model.d_model) / rate
    position = (long_rest - short_rest) / (many - few) if many > few else 0.0
    fixed = short_rest - few * position
    if position <= 0 or fixed <= 0:
        raise ValueError(
            f"{step} took {1e3 * long:.2f} ms for {many:,.0f} positions and {run} {1e3 * short:.2f} ms for {few:,}: no "
            "line with a positive time a position and a step goes through them; give a large step and a small one"
        )
    return Measured(device, bandwidth, rate, position, fixed, ((many, long), (few, short)))
