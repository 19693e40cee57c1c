"""What computes: the device, and the implementations that operators take on it."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels.dispatch import PLAIN, find, gpu_capability, recording
from tim4rec_jax.model_config import ModelConfig


def require_kernels(model: ModelConfig) -> None:
    """Raises a ValueError, before anything is computed, for `model.kernels` that cannot run here."""
    if model.kernels is None:
        return
    for operator in model.OPERATORS:
        if model.kernels not in operator.IMPLEMENTATIONS:
            continue
        try:
            find(operator.__name__.rpartition(".")[2], operator.IMPLEMENTATIONS, model.kernels)
        except ValueError as error:
            raise ValueError(f"model.kernels={model.kernels!r}: {error}") from error


def require_capture(capture: bool) -> None:
    """Raises a ValueError, before anything is computed, for `train.capture` where there are no CUDA graphs."""
    if capture and gpu_capability() is None:
        raise ValueError(
            f"train.capture=True needs an NVIDIA GPU, and JAX computes on {jax.default_backend()}; leave it out"
        )


def device_line(names: Mapping[str, set[str]] | None = None) -> str:
    """Returns a line about the device and what computes on it.

    Args:
      names: implementations by operator, as `kernels.dispatch.recording` collects them; None says nothing of them.
    """
    devices = jax.devices()
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    line = f"device: {count}{devices[0].device_kind}"
    if names is None:
        return line
    if all(taken == {PLAIN} for taken in names.values()):
        return f"{line}, kernels: none (plain JAX)"
    shown = [f"{op} {' or '.join(sorted(taken))}" for op, taken in sorted(names.items())]
    return f"{line}, kernels: {', '.join(shown)}"


def taken_by(model: Any, rows: int) -> dict[str, set[str]]:
    """Returns the implementations that a model's operators take for some rows of its full length, without computing.

    Args:
      model: from `build_model`.
      rows: b, rows of a batch.
    """
    if gpu_capability() is None and model.config.kernels is None:
        return {}  # Plain JAX, whatever the shape.
    items = jax.ShapeDtypeStruct((rows, model.config.max_len), jnp.int32)
    with recording() as names:
        jax.eval_shape(functools.partial(model.init, jax.random.key(0)), items, items)
    return names
