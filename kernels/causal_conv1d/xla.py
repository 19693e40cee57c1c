"""The causal depthwise convolution in plain JAX, for any platform."""

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named


def _without_earlier_histories(shifted: list[Array], starts: Array) -> list[Array]:
    """Zeroes the inputs [b, l, c] that lie before the start of a position's history, of K shifts, the nearest last."""
    length, same = starts.shape[1], jnp.ones(starts.shape, bool)
    kept = [shifted[-1]]
    for back, values in enumerate(reversed(shifted[:-1])):
        same &= ~jnp.pad(starts, ((0, 0), (back, 0)))[:, :length]
        kept.append(jnp.where(same[..., None], values, 0))
    return kept[::-1]


def causal_conv1d_xla(
    x: Array,
    weight: Array,
    bias: Array | None,
    starts: Array | None = None,
    initial: Array | None = None,
    *,
    activation: str,
) -> Array:
    """Adds up shifted products, in the dtype of x; arguments and result as in `causal_conv1d`."""
    taps, length = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0))) if initial is None else jnp.concatenate([initial, x], axis=1)
    shifted = [padded[:, k : k + length] for k in range(taps)]
    if starts is not None:
        shifted = _without_earlier_histories(shifted, starts)
    # A handful of shifted products fuse into one pass; a general convolution does not.
    y = sum(values * weight[k].astype(x.dtype) for k, values in enumerate(shifted))
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return activation_named(activation)(y)


def causal_conv1d_last_xla(window: Array, weight: Array, bias: Array | None, *, activation: str) -> Array:
    """Adds up the products of one window [b, K, c]; arguments and result as in `causal_conv1d_last`."""
    y = jnp.sum(window * weight.astype(window.dtype), axis=1)
    if bias is not None:
        y = y + bias.astype(window.dtype)
    return activation_named(activation)(y)
