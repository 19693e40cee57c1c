"""The definition of the causal depthwise convolution, window by window."""

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named


def causal_conv1d_reference(x: Array, weight: Array, bias: Array | None, *, activation: str) -> Array:
    """Weighs the K inputs that end at each position, in the widest dtype of the inputs.

      y[t] = act(bias + sum_{k=0..K-1} weight[k] x[t - (K - 1) + k]),    x before the first position is 0

    Args:
      x: [b, l, c].
      weight: [K, c]; the last tap meets the current position.
      bias: [c], or None.
      activation: "none", "silu" or "hard_swish".

    Returns:
      [b, l, c] in the dtype of x.
    """
    dtype = jnp.result_type(x, weight)
    taps, length = weight.shape[0], x.shape[1]
    position = jnp.arange(length)[:, None] - (taps - 1) + jnp.arange(taps)
    windows = jnp.where(position[..., None] >= 0, x[:, jnp.maximum(position, 0)], 0)
    y = jnp.sum(windows.astype(dtype) * weight.astype(dtype), axis=2)
    if bias is not None:
        y = y + bias.astype(dtype)
    return activation_named(activation)(y).astype(x.dtype)
