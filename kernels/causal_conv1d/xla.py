"""The causal depthwise convolution in plain JAX, for any platform."""

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named


def causal_conv1d_xla(x: Array, weight: Array, bias: Array | None, *, activation: str) -> Array:
    """Adds up shifted products, in the dtype of x; arguments and result as in `causal_conv1d`."""
    taps, length = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    # A handful of shifted products fuse into one pass; a general convolution does not.
    y = sum(padded[:, k : k + length] * weight[k].astype(x.dtype) for k in range(taps))
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return activation_named(activation)(y)


def causal_conv1d_last_xla(window: Array, weight: Array, bias: Array | None, *, activation: str) -> Array:
    """Adds up the products of one window [b, K, c]; arguments and result as in `causal_conv1d_last`."""
    y = jnp.sum(window * weight.astype(window.dtype), axis=1)
    if bias is not None:
        y = y + bias.astype(window.dtype)
    return activation_named(activation)(y)
