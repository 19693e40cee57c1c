"""The definition of the causal depthwise convolution, window by window."""

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named


def causal_conv1d_reference(
    x: Array,
    weight: Array,
    bias: Array | None,
    initial: Array | None,
    segment_ids: Array | None,
    *,
    activation: str,
) -> Array:
    """Weighs the K inputs that end at each position, in the widest dtype of the inputs.

      y[t] = act(bias + sum_{k=0..K-1} weight[k] x[t - (K - 1) + k])

    Args:
      x: [b, l, c].
      weight: [K, c]; the last tap meets the current position.
      bias: [c], or None.
      initial: [b, K - 1, c], x before the first position and of its history, or None for zeros.
      segment_ids: int32 [b, l]; x of other histories is taken as 0. Or None for rows of one history.
      activation: "none", "silu" or "hard_swish".

    Returns:
      [b, l, c] in the dtype of x.
    """
    dtype = jnp.result_type(x, weight)
    batch, length, channels = x.shape
    before = weight.shape[0] - 1
    if initial is None:
        initial = jnp.zeros((batch, before, channels), x.dtype)
    # Positions are counted from the first of `initial`.
    window = jnp.arange(length)[:, None] + jnp.arange(before + 1)
    windows = jnp.concatenate([initial, x], axis=1)[:, window]
    if segment_ids is not None:
        history = jnp.pad(segment_ids, ((0, 0), (before, 0)), mode="edge")
        same = history[:, window] == segment_ids[..., None]
        windows = jnp.where(same[..., None], windows, 0)
    y = jnp.sum(windows.astype(dtype) * weight.astype(dtype), axis=2)
    if bias is not None:
        y = y + bias.astype(dtype)
    return activation_named(activation)(y).astype(x.dtype)
