"""Gate and root-mean-square norm: what a Mamba-2 mixer does before its last projection."""

import jax
import jax.numpy as jnp
from jax import Array


def gated_rms_norm(y: Array, z: Array, scale: Array, *, eps: float) -> Array:
    """Gates y by silu(z) and divides by its root mean square over the last axis.

      u = y silu(z),    out = scale * u / sqrt(mean(u^2) + eps)

    Args:
      y: [..., e].
      z: [..., e] gate before its activation.
      scale: [e] gain.
      eps: added to the mean square.

    Returns:
      [..., e] in the dtype of y; the arithmetic is float32 or wider.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if y.shape != z.shape or scale.shape != y.shape[-1:]:
        raise ValueError(f"y {y.shape}, z {z.shape} and scale {scale.shape} must be [..., e], [..., e] and [e]")
    wide = jnp.promote_types(y.dtype, jnp.float32)
    gated = y.astype(wide) * jax.nn.silu(z.astype(wide))
    mean_square = jnp.mean(jnp.square(gated), axis=-1, keepdims=True)
    return (scale.astype(wide) * gated * jax.lax.rsqrt(mean_square + eps)).astype(y.dtype)
