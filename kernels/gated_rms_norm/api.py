"""Gate, then root-mean-square norm, then projection: the end of a Mamba-2 mixer."""

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


def project_normed(u: Array, weight: Array, *, sum_squares: Array, scale: Array, eps: float) -> Array:
    """Projects gated values and norms them only then, for their root mean square is one number a position.

      r = 1 / sqrt(sum_squares / e + eps),    out = (scale * u r) W = r (u (scale * W))

    The gated values are read once, by the product; what is normed is as wide as its result.

    Args:
      u: [..., e] values after the gate, as of `kernels.ssd.ssd_gated`.
      weight: W, [e, d].
      sum_squares: [...] sums of u^2 over the last axis.
      scale: [e] gain.
      eps: added to the mean square.

    Returns:
      [..., d] in the dtype of u; norm and gain are float32 or wider.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if sum_squares.shape != u.shape[:-1] or scale.shape != u.shape[-1:] or weight.shape[:1] != u.shape[-1:]:
        raise ValueError(
            f"u {u.shape}, weight {weight.shape}, sum_squares {sum_squares.shape} and scale {scale.shape} "
            "must be [..., e], [e, d], [...] and [e]"
        )
    wide = jnp.promote_types(u.dtype, jnp.float32)
    factor = jax.lax.rsqrt(sum_squares.astype(wide) / u.shape[-1] + eps)
    product = jnp.matmul(u, (scale.astype(wide)[:, None] * weight.astype(wide)).astype(u.dtype))
    return (factor[..., None] * product.astype(wide)).astype(u.dtype)
