"""Step sizes of state space operators, and decay factors between positions from sums that keep their digits."""

from typing import TypeVarTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

# Log-decays are split into multiples of this and a remainder. Sums of multiples are exact in float32, so that a
# difference of two long sums (strong decay reaches thousands) keeps the absolute error of the remainders alone.
COARSE_STEP = 1.0 / 64.0
# Nothing is left after such a decay in float32; sums over one of millions would lose what stands beside it.
ENOUGH = -128.0
Arrays = TypeVarTuple("Arrays")  # Each an array or None.


def step_size(dt: Array, dt_bias: Array | None = None, real: Array | None = None) -> Array:
    """Turns raw steps into step sizes, delta = softplus(dt + dt_bias), and stops the clock at padding.

    Args:
      dt: [b, l, k] raw steps of k heads or channels.
      dt_bias: [k], or None for 0.
      real: bool [b, l], or None for all; other positions get delta = 0 exactly.

    Returns:
      [b, l, k] in float32, or float64 where dt is float64.
    """
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    delta = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(dt.dtype))
    return delta if real is None else jnp.where(real[..., None], delta, jnp.zeros((), delta.dtype))


def cumsum_matmul(a: Array, *, reverse: bool = False, exclusive: bool = False, together: Array | None = None) -> Array:
    """Cumulative sum over the last axis as a product with ones: a few dozen terms, one operation.

    `reverse` sums from the end; `exclusive` leaves the position itself out; `together` [.., c, c] tells which positions
    are summed with which.
    """
    ones = jnp.ones((a.shape[-1], a.shape[-1]), a.dtype)
    triangle = jnp.tril(ones, -int(exclusive)) if reverse else jnp.triu(ones, int(exclusive))
    if together is not None:
        triangle = jnp.where(together, triangle, 0)
    return jnp.matmul(a, triangle, precision=jax.lax.Precision.HIGHEST)


def cumulative_log_decay(log_decay: Array, together: Array | None = None) -> tuple[Array, Array]:
    """Sums of log decays [.., c] up to each position, as coarse and fine parts."""
    log_decay = jnp.maximum(log_decay, -1024.0 if log_decay.dtype == jnp.float64 else ENOUGH)
    coarse = jnp.round(log_decay / COARSE_STEP) * COARSE_STEP
    return cumsum_matmul(coarse, together=together), cumsum_matmul(log_decay - coarse, together=together)


def between_sums(parts: tuple[Array, Array], *, transposed: bool = False, together: Array | None = None) -> Array:
    """Decay factors [.., i, j] from position j to i of `cumulative_log_decay`, or [.., j, i]; 0 unless j < i."""
    rows, columns = [part[..., :, None] for part in parts], [part[..., None, :] for part in parts]
    later, sooner = (columns, rows) if transposed else (rows, columns)
    segments = sum(end - start for end, start in zip(later, sooner, strict=True))
    ones = jnp.ones((parts[0].shape[-1],) * 2, bool)
    earlier = jnp.triu(ones, 1) if transposed else jnp.tril(ones, -1)
    if together is not None:
        earlier = earlier & together
    # The mask comes before exp: above the diagonal the sums are positive and overflow for strong decay.
    return jnp.exp(jnp.where(earlier, segments, -jnp.inf))


def decays_between(log_decay: Array) -> Array:
    """Builds decay factors [.., c, c] between steps from log decays [.., c].

    L[i, j] = exp(sum_{k=j+1..i} log_decay_k) for i > j, else 0
    """
    return between_sums(cumulative_log_decay(log_decay))


def in_accum_dtype(*arrays: *Arrays) -> tuple[*Arrays]:
    """Returns arrays in float32 at least: decays, skips and states are, also beside bfloat16 inputs."""
    given = cast(tuple[Array | None, ...], arrays)
    wide = (None if a is None else a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in given)
    return cast(tuple[*Arrays], tuple(wide))
