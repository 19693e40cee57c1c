"""The causal depthwise convolution in plain JAX, for any platform."""

from typing import cast

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named


def _within_histories(shifted: list[Array], segment_ids: Array) -> list[Array]:
    """Zeroes the inputs [b, l, c] that lie in another history than the position, of K shifts, the nearest last."""
    before = len(shifted) - 1
    history = jnp.pad(segment_ids, ((0, 0), (before, 0)), mode="edge")
    same = [history[:, k : k + segment_ids.shape[1]] == segment_ids for k in range(before)]
    return [jnp.where(s[..., None], values, 0) for s, values in zip(same, shifted, strict=False)] + shifted[-1:]


def causal_conv1d_xla(
    x: Array,
    weight: Array,
    bias: Array | None,
    initial: Array | None,
    segment_ids: Array | None,
    *,
    activation: str,
) -> Array:
    """Adds up shifted products, in the dtype of x; arguments and result as in `causal_conv1d`."""
    taps, length = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0))) if initial is None else jnp.concatenate([initial, x], axis=1)
    shifted = [padded[:, k : k + length] for k in range(taps)]
    if segment_ids is not None:
        shifted = _within_histories(shifted, segment_ids)
    # A handful of shifted products fuse into one pass; a general convolution does not.
    y = cast(Array, sum(values * weight[k].astype(x.dtype) for k, values in enumerate(shifted)))
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return activation_named(activation)(y)
