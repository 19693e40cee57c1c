"""Ranks and best items over an item embedding in parts; all of it runs inside `jax.shard_map`, on one device's part.

Devices of one `MODEL_AXIS` gather hidden states, score their own items a tile at a time, and exchange counts or lists.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from tim4rec_jax.models.catalogue_shards import MODEL_AXIS, own_rows

# Items that are scored at once.
ITEM_TILE = 8192

Carry = TypeVar("Carry")
Step = Callable[[Carry, Array, Array, Array], Carry]


def _scores(hidden: Array, rows: Array) -> Array:
    """Returns hidden rows^T as the models score, [t, rows] in float32 or wider."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("td,vd->tv", hidden, rows.astype(hidden.dtype), preferred_element_type=wide)


def _over_tiles(step: Step, carry: Carry, hidden: Array, shard: Array, vocab_size: int, tile: int) -> Carry:
    """Takes `carry = step(carry, scores [t, tile], ids [tile], counts [tile])` through this device's items in order.

    `counts` is false for what is no item and, in the last tile, for what another had.
    """
    rows = shard.shape[0]
    tile = min(tile, rows)
    first = jax.lax.axis_index(MODEL_AXIS) * rows

    def add(k: Array, carry: Carry) -> Carry:
        # The last tile ends with the last row and so overlaps the one before.
        start = jnp.minimum(k * tile, rows - tile)
        places = start + jnp.arange(tile)
        ids = first + places
        counts = (places >= k * tile) & (ids > 0) & (ids < vocab_size)
        return step(carry, _scores(hidden, jax.lax.dynamic_slice_in_dim(shard, start, tile)), ids, counts)

    return jax.lax.fori_loop(0, -(-rows // tile), add, carry)


def _among(excluded: Array, ids: Array) -> Array:
    """Returns which of ascending, consecutive ids [tile] are among each row's excluded ones [t, s], bool [t, tile]."""
    places = excluded - ids[0]
    places = jnp.where((places >= 0) & (places < ids.size), places, ids.size)
    found = jnp.zeros((excluded.shape[0], ids.size), bool)
    return found.at[jnp.arange(excluded.shape[0])[:, None], places].set(True, mode="drop")


def _broken(scores: Array, counts: Array) -> Array:
    return jnp.sum(~jnp.isfinite(scores) & counts, axis=1, dtype=jnp.int32)


def rank_on_parts(
    hidden: Array, targets: Array, shard: Array, excluded: Array | None, *, vocab_size: int, tile: int = ITEM_TILE
) -> tuple[Array, Array]:
    """Ranks targets as `evaluation.metrics.rank_of_target`, by counting the better items of each part.

    Args:
      hidden: [t, d] of this device's rows, in the arithmetic's dtype; as many on every device.
      targets: int [t], at least 1.
      shard: [rows, d], this device's part of the embedding.
      excluded: int [t n, s] items left out of the ranking, 0 for none, of the rows of all n devices of the axis, or
        None.
      vocab_size: v; rows beyond it are no items.
      tile: items scored at once.

    Returns:
      int32 [t] ranks from 1, and whether all scores of a row are finite, bool [t]; of this device's rows.
    """
    hidden, targets = (jax.lax.all_gather(a, MODEL_AXIS, tiled=True) for a in (hidden, targets))
    # By a product of matrices like that of the tiles, so that items with equal rows tie.
    at_target = jax.lax.psum(jnp.diagonal(_scores(hidden, own_rows(shard, targets))), MODEL_AXIS)

    def count(carry: tuple[Array, Array], scores: Array, ids: Array, counts: Array) -> tuple[Array, Array]:
        better = (scores > at_target[:, None]) & counts & (ids != targets[:, None])
        if excluded is not None:
            better &= ~_among(excluded, ids)
        return carry[0] + jnp.sum(better, axis=1, dtype=jnp.int32), carry[1] + _broken(scores, counts)

    zeros = jnp.zeros(targets.shape, jnp.int32)
    found = jnp.stack(_over_tiles(count, (zeros, zeros), hidden, shard, vocab_size, tile), axis=1)
    better, broken = jax.lax.psum_scatter(found, MODEL_AXIS, scatter_dimension=0, tiled=True).T
    first = jax.lax.axis_index(MODEL_AXIS) * better.shape[0]
    own_target = jax.lax.dynamic_slice_in_dim(at_target, first, better.shape[0])
    return jnp.where(jnp.isnan(own_target), vocab_size, 1 + better).astype(jnp.int32), broken == 0


def top_k_on_parts(
    hidden: Array, shard: Array, excluded: Array, k: int, *, vocab_size: int, tile: int = ITEM_TILE
) -> tuple[Array, Array, Array]:
    """Picks the k best items a row, best first; equal scores in order of id, as `serving.recommender.best_columns`.

    Args:
      hidden: [t, d] of this device's rows, in the arithmetic's dtype; as many on every device.
      shard: [rows, d], this device's part of the embedding.
      excluded: int [t, s] items to leave out, 0 for none.
      k: items a row; no more than are left.
      vocab_size: v; rows beyond it are no items.
      tile: items scored at once.

    Returns:
      Scores [t, k], ids int32 [t, k], and whether all scores of a row are finite, bool [t]; of this device's rows.
    """
    own = hidden.shape[0]
    hidden, excluded = (jax.lax.all_gather(a, MODEL_AXIS, tiled=True) for a in (hidden, excluded))
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def merge(carry: tuple[Array, Array, Array], scores: Array, ids: Array, counts: Array) -> tuple[Array, ...]:
        best, best_ids, broken = carry
        broken = broken + _broken(scores, counts)
        scores = jnp.where(counts & ~_among(excluded, ids), scores, -jnp.inf)
        # What was found before has lower ids and stands first, where `top_k` takes equal ones from.
        return *_best(jnp.concatenate([best, scores], axis=1), _beside(best_ids, ids), k), broken

    carry = (
        jnp.full((hidden.shape[0], k), -jnp.inf, wide),
        jnp.zeros((hidden.shape[0], k), jnp.int32),
        jnp.zeros(hidden.shape[0], jnp.int32),
    )
    best, ids, broken = _over_tiles(merge, carry, hidden, shard, vocab_size, tile)

    def to_owner(found: Array) -> Array:
        """From the lists of all rows by one device to those of its own rows by all, [own, n k]."""
        parts = jax.lax.all_to_all(found.reshape(-1, own, k), MODEL_AXIS, split_axis=0, concat_axis=0, tiled=True)
        return jnp.moveaxis(parts, 0, 1).reshape(own, -1)

    best, ids = _best(to_owner(best), to_owner(ids), k)
    return best, ids, jax.lax.psum_scatter(broken, MODEL_AXIS, scatter_dimension=0, tiled=True) == 0


def _beside(best_ids: Array, ids: Array) -> Array:
    ids = jnp.broadcast_to(ids.astype(jnp.int32), (best_ids.shape[0], ids.size))
    return jnp.concatenate([best_ids, ids], axis=1)


def _best(scores: Array, ids: Array, k: int) -> tuple[Array, Array]:
    best, places = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(ids, places, axis=1)
