"""Products with a matrix of parameters."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels.dispatch import pvary_together


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dtype: jnp.dtype, x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, preferred_element_type=dtype)


def _product_forward(dtype: jnp.dtype, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(dtype, x, w), (x, w)


def _product_backward(dtype: jnp.dtype, inputs: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = inputs
    narrow_first = w.shape[0] <= w.shape[1]
    # The barrier keeps XLA from folding a transposition that follows into the product, which turns it around.
    dw = jax.lax.optimization_barrier(jnp.matmul(x.T, dy) if narrow_first else jnp.matmul(dy.T, x))
    return jnp.matmul(dy, w.T).astype(x.dtype), (dw if narrow_first else dw.T).astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def matmul(x: Array, w: Array, dtype: DTypeLike) -> Array:
    """Multiplies by a matrix, y = x w, with the gradient of w in the order that a CPU multiplies fastest.

    All positions are one axis of one product: over two axes XLA copies an operand first. And the narrower side of dw
    comes first, for few rows of many columns are multiplied faster than many of few.

    Args:
      x: [.., in].
      w: [in, out], of the same dtype.
      dtype: of the result.

    Returns:
      [.., out].
    """
    flat, w = pvary_together(x.reshape(-1, x.shape[-1]), w)
    y = cast(Array, _product(jnp.dtype(dtype), flat, w))
    return y.reshape(*x.shape[:-1], w.shape[1])
