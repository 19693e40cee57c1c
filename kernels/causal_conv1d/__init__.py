"""Causal depthwise convolution with an activation, and what it needs to go on later."""

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named
from kernels.causal_conv1d.config import CausalConv1dConfig, default_config
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.causal_conv1d.xla import causal_conv1d_xla
from kernels.dispatch import Implementations, run
from kernels.segment_ids import checked_segment_ids, row_lengths

__all__ = [
    "IMPLEMENTATIONS",
    "CausalConv1dConfig",
    "causal_conv1d",
    "causal_conv1d_last",
    "causal_conv1d_tail",
    "default_config",
]

IMPLEMENTATIONS: Implementations = {
    "reference": causal_conv1d_reference,
    "xla": causal_conv1d_xla,
    "pallas_triton": "kernels.causal_conv1d.pallas_triton:causal_conv1d_pallas_triton",
    "pallas_mosaic": "kernels.causal_conv1d.pallas_mosaic:causal_conv1d_pallas_mosaic",
}


def _check_bias(bias: Array | None, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(channels,)}")


def _check_initial(initial: Array | None, x: Array, taps: int) -> None:
    if initial is None:
        return
    expected = (x.shape[0], taps - 1, x.shape[2])
    if initial.shape != expected:
        raise ValueError(f"initial has shape {initial.shape}, expected [b, K - 1, c] = {expected}")
    if initial.dtype != x.dtype:
        raise ValueError(f"initial is {initial.dtype}, expected {x.dtype}, the dtype of x")


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str = "none",
    initial: Array | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
    config: CausalConv1dConfig | None = None,
) -> Array:
    """Convolves each channel over the current and earlier positions.

      y[t] = act(bias + sum_{k=0..K-1} weight[k] x[t - (K - 1) + k])

    Args:
      x: [b, l, c]; float32, bfloat16 (GPU kernels then sum in float32) or float64.
      weight: [K, c]; the last tap meets the current position.
      bias: [c], or None.
      activation: "none", "silu" or "hard_swish".
      initial: [b, K - 1, c], x before the first position and of its history, as `causal_conv1d_tail` returns it, or
        None for zeros; the GPU kernels do not offer it.
      segment_ids: int32 [b, l], which history a position belongs to, not falling, and 0 for padding, which ends a row;
        or None for rows of one history. A position sees 0, exactly, in place of x of another id.
      implementation: "xla" (shifted products), "reference" (window by window), "pallas_triton" (GPU kernels), another
        name of `IMPLEMENTATIONS`, or None for the default.
      interpret: run kernels as slow plain JAX; None does so where there is no GPU.
      config: how the GPU kernels divide the work, or None to derive it from the shape.

    Returns:
      [b, l, c] in the dtype of x.

    Raises:
      ValueError: for shapes or dtypes that do not fit, bad segment ids, an unknown activation or implementation, or
        what the named implementation does not offer.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} must be [b, l, c] and [K, c]")
    _check_bias(bias, x.shape[2])
    _check_initial(initial, x, weight.shape[0])
    activation_named(activation)
    arrays = (x, weight, bias, initial, checked_segment_ids(segment_ids, x.shape[:2]))
    options = {"activation": activation, "interpret": interpret, "config": config}
    sizes = dict(zip("blc", x.shape, strict=True))
    return run("causal_conv1d", IMPLEMENTATIONS, implementation, *arrays, sizes=sizes, **options)


def causal_conv1d_last(window: Array, weight: Array, bias: Array | None = None, *, activation: str = "none") -> Array:
    """Returns `causal_conv1d`'s output at one position from the K inputs that end there.

    Args:
      window: [b, K, c]; inputs before the first position are 0.
      weight, bias, activation: as in `causal_conv1d`.

    Returns:
      [b, c] in the dtype of window.

    Raises:
      ValueError: for shapes that do not fit or an unknown activation.
    """
    if window.ndim != 3 or window.shape[1:] != weight.shape:
        raise ValueError(f"window {window.shape} must be [b, K, c] for weight {weight.shape}")
    _check_bias(bias, window.shape[2])
    y = jnp.sum(window * weight.astype(window.dtype), axis=1)
    if bias is not None:
        y = y + bias.astype(window.dtype)
    return activation_named(activation)(y)


def causal_conv1d_tail(x: Array, K: int, segment_ids: Array | None = None, initial: Array | None = None) -> Array:
    """Returns the inputs that `causal_conv1d` with K taps needs as `initial` to go on where each row ends.

    Args:
      x: [b, l, c].
      K: taps, at least 1.
      segment_ids: as in `causal_conv1d`; the row goes on with its last history.
      initial: [b, K - 1, c] in the dtype of x, inputs before the first position; or None for zeros.

    Returns:
      [b, K - 1, c] in the dtype of x: the last K - 1 inputs up to the last real position, of `initial` where the row is
      shorter, and 0 in place of those of earlier histories.

    Raises:
      ValueError: for shapes or dtypes that do not fit, bad segment ids, or K under 1.
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected [b, l, c]")
    if K < 1:
        raise ValueError(f"K={K} must be at least 1")
    batch, length, channels = x.shape
    _check_initial(initial, x, K)
    segment_ids = checked_segment_ids(segment_ids, x.shape[:2])
    if initial is None:
        initial = jnp.zeros((batch, K - 1, channels), x.dtype)
    known = jnp.concatenate([initial, x], axis=1)
    if segment_ids is None:
        return known[:, length:]
    at = row_lengths(segment_ids, (batch, length))[:, None] + jnp.arange(K - 1)
    history = jnp.pad(segment_ids, ((0, 0), (K - 1, 0)), mode="edge")
    last = jnp.max(segment_ids, axis=1, keepdims=True)
    same = jnp.take_along_axis(history, at, axis=1) == last
    return jnp.where(same[..., None], jnp.take_along_axis(known, at[..., None], axis=1), 0)
