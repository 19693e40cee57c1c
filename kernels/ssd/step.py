"""State space duality at one position: what streaming computes for every event."""

import jax.numpy as jnp
from jax import Array

from kernels.step_size import step_size


def ssd_step(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    state: Array,
    *,
    D: Array | None = None,
    dt_bias: Array | None = None,
    lengths: Array | None = None,
) -> tuple[Array, Array]:
    """Goes on by one position: `ssd` with an initial state at length 1, in one pass over the states.

      state' = exp(delta A) state + delta x B^T,    y = state' C + D x

    Args:
      x: [b, 1, h, p] values.
      dt: [b, 1, h] raw steps.
      A: [h] decay rates, negative.
      B, C: [b, 1, n], or [b, 1, g, n] with one map for each group of h/g heads.
      state: [b, h, p, n], float32 or wider.
      D: [h] skip weights, or None.
      dt_bias: [h] added to dt before softplus, or None.
      lengths: int [b], 0 where a row has no position and its state stays as it is, bit by bit; or None.

    Returns:
      y [b, 1, h, p] in the dtype of x, and state' [b, h, p, n].

    Raises:
      ValueError: for shapes that do not fit.

    Source: Dao & Gu 2024 (Mamba-2), section 3.
    """
    batch, heads, width, state_width = state.shape
    if x.shape != (batch, 1, heads, width) or dt.shape != (batch, 1, heads):
        raise ValueError(f"x {x.shape} and dt {dt.shape} must be [b, 1, h, p] and [b, 1, h] for state {state.shape}")
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    groups = B.shape[2]
    if B.shape != (batch, 1, groups, state_width) or C.shape != B.shape or heads % groups:
        raise ValueError(f"B {B.shape} and C {C.shape} must be [b, 1, g, n] with g dividing h for state {state.shape}")
    dtype = state.dtype
    B, C = (jnp.repeat(m[:, 0].astype(dtype), heads // groups, axis=1)[:, :, None] for m in (B, C))
    delta, values = step_size(dt, dt_bias, lengths)[:, 0].astype(dtype), x[:, 0].astype(dtype)
    decay = jnp.exp(delta * A.astype(dtype))[..., None, None]
    state = decay * state + (delta[..., None] * values)[..., None] * B
    y = (state * C).sum(axis=-1)
    if D is not None:
        y = y + D.astype(dtype)[:, None] * values
    return y[:, None].astype(x.dtype), state
