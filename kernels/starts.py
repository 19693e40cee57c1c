"""Where histories begin inside a row: what operators do with `starts`."""

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
