"""Where histories begin inside a row: what operators do with `starts`."""

import jax
import jax.numpy as jnp
from jax import Array


def real_starts(starts: Array | None, rows: tuple[int, int], lengths: Array | None = None) -> Array | None:
    """Checks `starts` and leaves out those after a row's end, where nothing changes any more.

    Args:
      starts: bool [b, l], true where a history begins, or None for none.
      rows: b and l.
      lengths: int [b] real positions a row, or None for all.

    Returns:
      bool [b, l], or None.

    Raises:
      ValueError: for another shape or dtype.
    """
    if starts is None:
        return None
    if starts.shape != rows:
        raise ValueError(f"starts has shape {starts.shape}, expected [b, l] = {rows}")
    if starts.dtype != jnp.bool_:
        raise ValueError(f"starts is {starts.dtype}, expected bool: true where a history begins")
    if lengths is None:
        return starts
    return starts & (jnp.arange(rows[1]) < lengths[:, None])


def history_numbers(starts: Array, length: int) -> Array:
    """Counts the histories of each row, with the one that goes on from before the row as number 0.

      numbers[0] = 0,    numbers[t + 1] = number of starts up to position t

    Args:
      starts: bool [b, l], true where a history begins.
      length: positions to number, at least l; those after the row belong to its last history.

    Returns:
      int32 [b, length + 1]; entry t + 1 is of position t, and entry t of the position before it.
    """
    numbers = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    numbers = jnp.pad(numbers, ((0, 0), (0, length - starts.shape[1])), mode="edge")
    return jnp.pad(numbers, ((0, 0), (1, 0)))


def positions_before(starts: Array, most: int) -> Array:
    """Counts the earlier positions that lie in the row and in the history of each position.

    Args:
      starts: bool [b, l], true where a history begins.
      most: larger counts are given as this, which is at most 127.

    Returns:
      int8 [b, l].
    """
    position = jnp.arange(starts.shape[1], dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(starts, position, 0), axis=1)
    return jnp.minimum(position - first, most).astype(jnp.int8)
