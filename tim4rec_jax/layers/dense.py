"""Affine maps and norms with the initial values and precisions of the family."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from kernels.products import matmul

INIT_STD = 0.02


def wide(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of parameters, norms and decays beside arithmetic in `dtype`: float32, or float64."""
    return jnp.promote_types(jnp.dtype(dtype), jnp.float32)


class Linear(nn.Module):
    """y = x W + b, of which single column ranges can be computed alone.

    Attributes:
      features: output width.
      dtype: arithmetic.
      use_bias: add b.
    """

    features: int
    dtype: str
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, columns: Sequence[slice] | None = None) -> Array:
        """Maps x [..., in] to [..., features], or to the concatenation of the given column ranges."""
        kernel = self.param("kernel", nn.initializers.normal(INIT_STD), (x.shape[-1], self.features), wide(self.dtype))
        bias = (
            self.param("bias", nn.initializers.zeros_init(), (self.features,), wide(self.dtype))
            if self.use_bias
            else None
        )
        if columns is not None:
            kernel = jnp.concatenate([kernel[:, c] for c in columns], axis=1)
            bias = None if bias is None else jnp.concatenate([bias[c] for c in columns])
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype), self.dtype)
        return y if bias is None else y + bias.astype(self.dtype)


def layer_norm(eps: float, dtype: str, name: str | None = None) -> nn.LayerNorm:
    """Returns LayerNorm over the last axis; statistics in float32 or wider.

    The variance is taken from centred values: raw time gaps reach 1e9, where E[x^2] - E[x]^2 loses every digit.
    """
    return nn.LayerNorm(
        epsilon=eps, dtype=jnp.dtype(dtype), param_dtype=wide(dtype), use_fast_variance=False, name=name
    )
