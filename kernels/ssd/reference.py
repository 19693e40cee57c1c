"""The definition of the state space duality operator: a step-by-step recurrence and its dense dual form."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.decays import step_size
from kernels.dispatch import Precision, check_shape, matmul_precision, precision_name
from kernels.segment_ids import history_starts, real_positions


def check_inputs(x: Array, dt: Array, A: Array, B: Array, D: Array | None, dt_bias: Array | None) -> None:
    """Raises a ValueError unless the shapes are [b, l, h, p], [b, l, h], [h], [b, l, g, n] and [h]."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}, expected [b, l, h, p]")
    batch, length, heads, _ = x.shape
    if length < 1:
        raise ValueError(f"x has shape {x.shape}: its length {length} must be at least 1")
    check_shape("dt", dt, (batch, length, heads))
    check_shape("A", A, (heads,))
    if B.ndim != 4 or B.shape[2] < 1 or heads % B.shape[2]:
        raise ValueError(f"B has shape {B.shape}, expected [b, l, n] or [b, l, g, n] with g dividing h={heads}")
    check_shape("B", B, (batch, length, *B.shape[2:]))
    check_shape("D", D, (heads,))
    check_shape("dt_bias", dt_bias, (heads,))


def ssd_reference(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    dt_bias: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    *,
    return_final_state: bool = True,
    chunk_size: int = 1,
    precision: Precision = None,
) -> tuple[Array, Array]:
    """Runs the recurrence one position after the other, in the widest dtype of the inputs.

      state_t = exp(delta_t A) state_{t-1} + delta_t x_t B_t^T,    y_t = state_t C_t + D x_t

    Args:
      x, dt, A, C, D, dt_bias, initial_state, segment_ids, precision: as in `kernels.ssd.ssd`.
      B: [b, l, g, n], as C.
      return_final_state, chunk_size: change nothing here.

    Returns:
      y [b, l, h, p] and the final state [b, h, p, n].

    Source: Dao & Gu 2024 (Mamba-2), section 3.
    """
    with matmul_precision(precision_name(precision)):
        delta = step_size(dt, dt_bias, real_positions(segment_ids))
        return _recurrence(x, delta, A, B, C, D, initial_state, history_starts(segment_ids))


def _recurrence(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    starts: Array | None,
) -> tuple[Array, Array]:
    batch, _, heads, width = x.shape
    dtype = jnp.result_type(x, delta, A, B, C)
    heads_per_group = heads // B.shape[2]
    B, C = (jnp.repeat(m.astype(dtype), heads_per_group, axis=2) for m in (B, C))
    state = jnp.zeros((batch, heads, width, B.shape[-1]), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)

    def step(state: Array, inputs: tuple[Any, ...]) -> tuple[Array, Array]:
        x_t, delta_t, B_t, C_t, start = inputs
        if start is not None:
            state = jnp.where(start[:, None, None, None], 0, state)
        decay = jnp.exp(delta_t * A)[..., None, None]
        state = decay * state + jnp.einsum("bh,bhp,bhn->bhpn", delta_t, x_t, B_t)
        return state, jnp.einsum("bhpn,bhn->bhp", state, C_t)

    by_time = [jnp.moveaxis(a.astype(dtype), 1, 0) for a in (x, delta, B, C)]
    state, y = jax.lax.scan(step, state, (*by_time, None if starts is None else starts.T))
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D[:, None] * x
    return y.astype(x.dtype), state


def dense_mask(delta: Array, A: Array) -> Array:
    """Builds the decay mask of the dual form, for looking at.

      L[i, j] = exp(A * sum_{k=j+1..i} delta_k) for i >= j, else 0;    Y = (L o (C B^T)) (delta x) + D x

    With delta = softplus(dt * g + dt_bias) this is the time-aware mask of TiM4Rec (arXiv 2409.16182).

    Args:
      delta: [b, l, h] step sizes after softplus.
      A: [h] decay rates, negative.

    Returns:
      [b, h, l, l] with zeros above the diagonal.
    """
    log_decay = jnp.moveaxis(delta * A, 1, 2)
    later = jnp.tril(jnp.ones((log_decay.shape[-1],) * 2, bool), -1)
    # Summed from each j on: a difference of two sums would lose small steps beside large ones.
    segments = jnp.cumsum(jnp.where(later, log_decay[..., :, None], 0), axis=-2)
    return jnp.where(later | jnp.eye(log_decay.shape[-1], dtype=bool), jnp.exp(segments), 0)
