"""What every layer knows of the rows it reads."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


def take_at(x: Array, positions: Array) -> Array:
    """Returns x [b, l, d] at positions [b, m] as [b, m, d]."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)


def one_segment(lengths: Array | np.ndarray, length: int) -> Array:
    """Returns segment ids int32 [b, length] of one history per row, of the given lengths [b]."""
    return (jnp.arange(length) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)


class Rows(NamedTuple):
    """Padding, borders of histories, the names of rows for dropout, and where outputs are wanted.

    Attributes:
      real: bool [b, l], false for padding, which follows the events.
      segment_ids: int32 [b, l], which history a position belongs to, 0 for padding; or None where a row is one history.
      example_ids: int [b] names of the rows for their dropout masks.
      deterministic: no dropout.
      positions: int [b, m], the only places whose outputs are wanted, or None for all.
    """

    real: Array
    segment_ids: Array | None
    example_ids: Array
    deterministic: bool
    positions: Array | None = None

    @property
    def real_ids(self) -> Array:
        """Segment ids int32 [b, l] of rows of one history: a cache ends with the last of its real positions."""
        return self.real.astype(jnp.int32)

    @property
    def starts(self) -> Array | None:
        """Bool [b, l], true where a history or padding begins; or None where a row is one history."""
        if self.segment_ids is None:
            return None
        return self.segment_ids != jnp.pad(self.segment_ids[:, :-1], ((0, 0), (1, 0)))

    @property
    def lengths(self) -> Array:
        """Real positions per row, int32 [b]."""
        return jnp.sum(self.real, axis=1, dtype=jnp.int32)

    @property
    def drop(self) -> dict[str, Any]:
        """Arguments of `Dropout` for values at `positions`."""
        return {"deterministic": self.deterministic, "positions": self.positions}

    def behind(self, before: Array, states: Array) -> Array:
        """Returns the state [b, w] behind the last real position: of `states` [b, l, w], or the one `before` them."""
        return take_at(jnp.concatenate([before[:, None], states], axis=1), self.lengths[:, None])[:, 0]

    def at(self, x: Array) -> Array:
        """Returns x [b, l, d] where outputs are wanted."""
        return x if self.positions is None else take_at(x, self.positions)


def rows_of(
    items: Array | np.ndarray,
    segment_ids: Array | np.ndarray | None,
    example_ids: Array | np.ndarray | None,
    deterministic: bool,
) -> tuple[Array, Rows]:
    """Returns the items with 0 at every padded position, and what layers know of their rows.

    Args:
      items: int [b, l], 0 for padding.
      segment_ids: int [b, l], which history a position belongs to, 0 for padding; or None for one history per row.
      example_ids: int [b], or None to count from 0.
      deterministic: no dropout.

    Raises:
      ValueError: for segment ids of another shape or dtype.
    """
    items = jnp.asarray(items)
    ids = jnp.arange(items.shape[0]) if example_ids is None else jnp.asarray(example_ids)
    if segment_ids is None:
        return items, Rows(items != 0, None, ids, deterministic)
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != items.shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids are {segment_ids.dtype}{list(segment_ids.shape)}, expected integers of the items' shape "
            f"{list(items.shape)}: which history a position belongs to, 0 for padding"
        )
    real = (segment_ids != 0) & (items != 0)
    return jnp.where(real, items, 0), Rows(real, segment_ids.astype(jnp.int32), ids, deterministic)
