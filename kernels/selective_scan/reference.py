"""The definition of the selective scan: a recurrence, step by step."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.decays import step_size
from kernels.segment_ids import history_starts, real_positions


def selective_scan_reference(
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
) -> tuple[Array, Array]:
    """Runs the recurrence one position after the other, in the widest dtype of the inputs.

      state_t = exp(delta_t A) state_{t-1} + delta_t x_t B_t,    y_t = state_t . C_t + D x_t        for each channel

    Args:
      x, dt, A, B, C, D, dt_bias, initial_state, segment_ids: as in `kernels.selective_scan.selective_scan`.
      return_final_state, chunk_size: change nothing here.

    Returns:
      y [b, l, e] in the dtype of x, and the final state [b, e, n].

    Source: Gu & Dao 2023 (Mamba), algorithm 2.
    """
    delta, starts = step_size(dt, dt_bias, real_positions(segment_ids)), history_starts(segment_ids)
    dtype = jnp.result_type(x, delta, A, B, C)
    state = jnp.zeros((x.shape[0], *A.shape), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)

    def step(state: Array, inputs: tuple[Any, ...]) -> tuple[Array, Array]:
        x_t, delta_t, B_t, C_t, start = inputs
        if start is not None:
            state = jnp.where(start[:, None, None], 0, state)
        added = jnp.einsum("be,bn->ben", delta_t * x_t, B_t)
        state = jnp.exp(delta_t[..., None] * A) * state + added
        return state, jnp.einsum("ben,bn->be", state, C_t)

    by_time = [jnp.moveaxis(a.astype(dtype), 1, 0) for a in (x, delta, B, C)]
    state, y = jax.lax.scan(step, state, (*by_time, None if starts is None else starts.T))
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D * x
    return y.astype(x.dtype), state
