"""The recurrence between segments of a row, in few steps: segments are few and their states small."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.ssd.tiles import Plan
from kernels.ssd.xla import decays_between


def uncut_segments(plan: Plan, numbers: Array | None) -> Array | None:
    """Returns bool [b, s], true where no history begins in a segment; or None where every row is one history.

    Args:
      plan: static numbers of the call.
      numbers: as from `kernels.starts.history_numbers`, or None.
    """
    if numbers is None:
        return None
    at_borders = numbers[:, :: plan.num_chunks * plan.chunk]
    return at_borders[:, 1:] == at_borders[:, :-1]


def _walk(added: Array, decay: Array, initial: Array) -> Array:
    """Finds the states step by step, where a decay of 0 lets nothing pass, not even what has overflowed."""

    def join(sooner: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        factor = later[0][..., None, None]
        return sooner[0] * later[0], jnp.where(factor == 0, 0, factor * sooner[1]) + later[1]

    # The initial state counts as what a segment before the first adds; what the last adds is no longer asked for.
    brought = jnp.concatenate([initial[:, None], added[:, :-1]], axis=1)
    decays = jnp.concatenate([jnp.zeros_like(decay[:, :1]), decay[:, :-1]], axis=1)
    return jax.lax.associative_scan(join, (decays, brought), axis=1)[1]


def states_before(
    added: Array, log_decay: Array, initial: Array | None, *, uncut: Array | None = None, reverse: bool = False
) -> Array:
    """Finds the state before each segment.

      state_0 = initial,    state_{s+1} = exp(log_decay_s) state_s + added_s, or added_s where segment s is cut

    Args:
      added: [b, s, h, p, n] what a segment adds to its decayed state.
      log_decay: [b, s, h] total log decay of a segment.
      initial: [b, h, p, n] before the first segment, or None for zeros.
      uncut: bool [b, s], false where a history begins in a segment, or None for nowhere.
      reverse: walk from the last segment to the first; "before" then means after it in time.

    Returns:
      [b, s, h, p, n], without the state that comes out of the last segment walked.
    """
    if reverse:
        added, log_decay = jnp.flip(added, 1), jnp.flip(log_decay, 1)
    first = jnp.zeros_like(added[:, 0]) if initial is None else initial
    if uncut is not None:
        uncut = jnp.flip(uncut, 1) if reverse else uncut
        before = _walk(added, jnp.where(uncut[..., None], jnp.exp(log_decay), 0), first)
        return jnp.flip(before, 1) if reverse else before
    # Segment s brings what segment s - 1 added: shifted by one, with the initial state as what came first.
    brought = jnp.concatenate([first[:, None], added[:, :-1]], axis=1)
    steps = jnp.concatenate([jnp.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], axis=1)
    between = decays_between(jnp.moveaxis(steps, 1, 2))
    weights = between + jnp.eye(between.shape[-1], dtype=between.dtype)
    before = jnp.einsum("bhst,bthpn->bshpn", weights, brought, precision=jax.lax.Precision.HIGHEST)
    return jnp.flip(before, 1) if reverse else before
