"""The cloze: a model reads MASK in place of some events and tells from the others which items stood there."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from tim4rec_jax.layers.attention import first_positions
from tim4rec_jax.layers.dropout import keep_mask, row_keys

# Stands where an item would; it has no row in the item table, which may lie in parts or be a few rows of the whole.
MASK = -1


def with_mask_behind(items: Array, lengths: Array, max_len: int) -> tuple[Array, Array]:
    """Appends MASK to every history, for the item that comes next; one of max_len events or more loses its first.

    Args:
      items: int [b, l], padded on the right with 0.
      lengths: int [b].
      max_len: most positions of the result, at least 2.

    Returns:
      Items [b, l + 1], or [b, l] where that is max_len, and their lengths, one more than before up to max_len.
    """
    full = (lengths >= max_len)[:, None]
    items = jnp.pad(items, ((0, 0), (0, 1)))
    if items.shape[1] > max_len:
        items = jnp.where(full, items[:, 1:], items[:, :-1])
    events = jnp.minimum(lengths, max_len - 1)
    behind = jnp.arange(items.shape[1]) == events[:, None]
    return jnp.where(behind, MASK, items), events + 1


def draw_masks(
    key: Array, example_ids: Array, segment_ids: Array, candidates: Array, rate: float, last_share: float
) -> Array:
    """Draws the events that are masked: in each history a share of them, or the last alone.

    Every candidate is masked with probability `rate`; but in a history of which none was drawn, and in a share
    `last_share` of the others, the last event and no other is, as where a model is asked for the next item. What a row
    draws follows from the key and its id alone. Shares are resolved to 1/65536.

    Args:
      key: typed PRNG key of the step.
      example_ids: int [b] names of the rows.
      segment_ids: int [b, l], which history of its row a position belongs to, 0 for padding.
      candidates: bool [b, l], real positions that may be masked; the last of a history is always one.
      rate: in (0, 1].
      last_share: in [0, 1].

    Returns:
      bool [b, l], at least one a history.

    Source: Sun et al. 2019, arXiv 1904.06690; its authors' program masks a fixed number of events per history.
    """
    length = segment_ids.shape[1]
    index = jnp.arange(length)

    def drawn(key: Array, share: float) -> Array:
        return ~keep_mask(row_keys(key, example_ids), index, 1, share)[..., 0]

    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True) & (segment_ids != 0)
    firsts = first_positions(jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True))
    ends = jax.lax.cummin(jnp.where(last, index, length - 1), axis=1, reverse=True)
    at_end = functools.partial(jnp.take_along_axis, indices=ends, axis=1)  # Of each position's history.
    of_events, of_last = jax.random.split(key)
    masked = candidates & drawn(of_events, rate)
    latest = jax.lax.cummax(jnp.where(masked, index, -1), axis=1)
    alone = (at_end(latest) < firsts) | at_end(drawn(of_last, last_share))
    return jnp.where(alone, last, masked)
