"""Which history a position belongs to: one integer per position says where histories and rows end."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


def checked_segment_ids(segment_ids: Array | None, rows: tuple[int, ...]) -> Array | None:
    """Returns segment ids as int32.

    Ids of a row are positive and do not fall; zeros, for padding, only end it. Ids inside `jit` cannot be looked at:
    what comes out of others is not defined there.

    Args:
      segment_ids: integers [b, l], or None for rows of one history without padding.
      rows: b and l.

    Raises:
      ValueError: for another shape or dtype, or ids in another order.
    """
    if segment_ids is None:
        return None
    if segment_ids.shape != rows or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids is {segment_ids.dtype} of shape {segment_ids.shape}, expected int32 [b, l] = {rows}: which "
            "history a position belongs to, 0 for padding"
        )
    if not isinstance(segment_ids, Tracer):
        _check_order(np.asarray(segment_ids))
    return jnp.asarray(segment_ids, jnp.int32)


def _check_order(ids: np.ndarray) -> None:
    sooner, later = ids[:, :-1], ids[:, 1:]
    fits = (later == 0) | ((sooner != 0) & (later >= sooner))
    wrong = np.argwhere(~fits)
    if len(wrong):
        row, t = wrong[0]
        raise ValueError(
            f"segment_ids[{row}] has {ids[row, t + 1]} behind {ids[row, t]} at position {t + 1}: ids must not fall, "
            "and 0 (padding) only ends a row"
        )
    if (ids < 0).any():
        raise ValueError(f"segment_ids has {ids.min()}: ids must be positive, and 0 for padding")


def real_positions(segment_ids: Array | None) -> Array | None:
    """Returns bool [b, l], false for padding; or None where there is none."""
    return None if segment_ids is None else segment_ids != 0


def row_lengths(segment_ids: Array | None, rows: tuple[int, ...]) -> Array:
    """Returns the number of real positions per row, int32 [b]."""
    if segment_ids is None:
        return jnp.full(rows[0], rows[1], jnp.int32)
    return jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)


def history_starts(segment_ids: Array | None) -> Array | None:
    """Returns bool [b, l], true where a history begins behind another one of its row; or None where none does.

    A row's first history begins nowhere: it goes on from what came before the row. Padding goes on like the last one.
    """
    if segment_ids is None:
        return None
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return (segment_ids != before) & (segment_ids != 0)
