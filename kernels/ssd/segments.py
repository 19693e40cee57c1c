"""The recurrence between segments of a row, as one dense product: segments are few and their states small."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.ssd.xla import decays_between


def states_before(added: Array, log_decay: Array, initial: Array | None, *, reverse: bool = False) -> Array:
    """Finds the state before each segment.

      state_0 = initial,    state_{s+1} = exp(log_decay_s) state_s + added_s

    Args:
      added: [b, s, h, p, n] what a segment adds to its decayed state.
      log_decay: [b, s, h] total log decay of a segment.
      initial: [b, h, p, n] before the first segment, or None for zeros.
      reverse: walk from the last segment to the first; "before" then means after it in time.

    Returns:
      [b, s, h, p, n], without the state that comes out of the last segment walked.
    """
    if reverse:
        added, log_decay = jnp.flip(added, 1), jnp.flip(log_decay, 1)
    # Segment s brings what segment s - 1 added: shifted by one, with the initial state as what came first.
    first = jnp.zeros_like(added[:, 0]) if initial is None else initial
    brought = jnp.concatenate([first[:, None], added[:, :-1]], axis=1)
    steps = jnp.concatenate([jnp.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], axis=1)
    between = decays_between(jnp.moveaxis(steps, 1, 2))
    weights = between + jnp.eye(between.shape[-1], dtype=between.dtype)
    before = jnp.einsum("bhst,bthpn->bshpn", weights, brought, precision=jax.lax.Precision.HIGHEST)
    return jnp.flip(before, 1) if reverse else before
