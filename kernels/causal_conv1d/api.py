"""Causal depthwise convolution over positions, with an activation."""

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named


def _check_bias(bias: Array | None, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(channels,)}")


def causal_conv1d(x: Array, weight: Array, bias: Array | None = None, *, activation: str = "none") -> Array:
    """Convolves each channel over the current and earlier positions.

      y[t] = act(bias + sum_{k=0..K-1} weight[k] x[t - (K - 1) + k]),    x before the first position is 0

    Args:
      x: [b, l, c].
      weight: [K, c]; the last tap meets the current position.
      bias: [c], or None.
      activation: "none", "silu" or "hard_swish".

    Returns:
      [b, l, c] in the dtype of x.

    Raises:
      ValueError: for shapes that do not fit or an unknown activation.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} must be [b, l, c] and [K, c]")
    _check_bias(bias, x.shape[2])
    taps, length = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    # A handful of shifted products fuse into one pass; a general convolution does not.
    y = sum(padded[:, k : k + length] * weight[k].astype(x.dtype) for k in range(taps))
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return activation_named(activation)(y)


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
