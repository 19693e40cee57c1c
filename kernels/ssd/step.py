"""State space duality at one position: the next one, as streaming computes it, and the last one of whole rows."""

import jax.numpy as jnp
from jax import Array

from kernels.decays import cumsum_matmul, in_accum_dtype, step_size
from kernels.dispatch import check_shape
from kernels.segment_ids import checked_segment_ids, real_positions
from kernels.ssd.reference import check_inputs


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
    segment_ids: Array | None = None,
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
      segment_ids: int32 [b, 1], 0 where a row has no position and its state stays as it is, bit by bit; or None.

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
    real = real_positions(checked_segment_ids(segment_ids, (batch, 1)))
    dtype = state.dtype
    B, C = (jnp.repeat(m[:, 0].astype(dtype), heads // groups, axis=1)[:, :, None] for m in (B, C))
    delta, values = step_size(dt, dt_bias, real)[:, 0].astype(dtype), x[:, 0].astype(dtype)
    decay = jnp.exp(delta * A.astype(dtype))[..., None, None]
    state = decay * state + (delta[..., None] * values)[..., None] * B
    y = (state * C).sum(axis=-1)
    if D is not None:
        y = y + D.astype(dtype)[:, None] * values
    return y[:, None].astype(x.dtype), state


def ssd_last(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C_last: Array,
    last: Array,
    *,
    D: Array | None = None,
    dt_bias: Array | None = None,
) -> Array:
    """Returns `ssd`'s output at one position per row, of rows of one history, in one linear pass.

      y_T = sum_{j<=T} exp(A sum_{k=j+1..T} delta_k) delta_j (C_T . B_j) x_j + D x_T

    Args:
      x, dt, A, B, D, dt_bias: as in `ssd`.
      C_last: [b, n] or [b, g, n], C at position T.
      last: int [b], T; what lies behind it is not read.

    Returns:
      [b, h, p] in the dtype of x.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if B.ndim == 3:
        B, C_last = B[:, :, None], C_last[:, None] if C_last.ndim == 2 else C_last
    check_inputs(x, dt, A, B, D, dt_bias)
    check_shape("C_last", C_last, (x.shape[0], *B.shape[2:]))
    check_shape("last", last, (x.shape[0],))
    A, D = in_accum_dtype(A, D)
    heads, groups = x.shape[2], B.shape[2]
    real = jnp.arange(x.shape[1]) <= last[:, None]
    steps = jnp.moveaxis(step_size(dt, dt_bias, real), 1, 2)
    log_decay = steps * A[:, None]
    # What is still to be decayed after position j: summed without j, for a difference of sums cancels badly.
    decay = jnp.exp(cumsum_matmul(log_decay, reverse=True, exclusive=True))
    scores = jnp.einsum("bgn,blgn->bgl", C_last, B, preferred_element_type=decay.dtype)
    weights = decay * steps * jnp.repeat(scores, heads // groups, axis=1)
    y = jnp.einsum("bhl,blhp->bhp", weights.astype(x.dtype), x, preferred_element_type=decay.dtype)
    if D is not None:
        y = y + D[:, None] * jnp.take_along_axis(x, last[:, None, None, None], axis=1)[:, 0]
    return y.astype(x.dtype)
