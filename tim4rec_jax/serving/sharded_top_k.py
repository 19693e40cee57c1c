"""The best items after each history, with the item embedding in parts on the devices of a mesh."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tim4rec_jax.evaluation.catalogue_parts import ITEM_TILE, top_k_on_parts
from tim4rec_jax.models import last_hidden, variables
from tim4rec_jax.models.catalogue_shards import (
    ROW_AXES,
    TABLE,
    fetch_rows,
    on_working_table,
    partition_specs,
    working_ids,
)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "k", "tile"))
def _on_mesh(
    params: Any,
    items: jax.Array,
    lengths: jax.Array,
    timestamps: jax.Array,
    excluded: jax.Array,
    *,
    model: nn.Module,
    mesh: Mesh,
    k: int,
    tile: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def best(params: Any, *rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        items, lengths, timestamps, excluded = rows
        shard = params[TABLE]["embedding"]
        ids, places = working_ids(items)
        small, small_params = on_working_table(model, params, fetch_rows(shard, ids))
        inputs = places, lengths, timestamps
        hidden = last_hidden(small, variables(small_params), *inputs)
        hidden = hidden.astype(model.config.dtype)
        return top_k_on_parts(hidden, shard, excluded, k, vocab_size=model.config.vocab_size, tile=tile)

    rows = (P(ROW_AXES),) * 4
    return jax.shard_map(
        best, mesh=mesh, in_specs=(partition_specs(params), *rows), out_specs=P(ROW_AXES), check_vma=False
    )(params, items, lengths, timestamps, excluded)  # fmt: skip


def sharded_top_k(
    model: nn.Module,
    params: Any,
    mesh: Mesh,
    items: jax.Array,
    lengths: jax.Array,
    timestamps: jax.Array,
    excluded: jax.Array | None,
    k: int,
    *,
    tile: int = ITEM_TILE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the k best items after each history without the whole embedding or a row of all scores on any device.

    Args:
      model: from `build_model`.
      params: its parameters, placed by `models.catalogue_shards.shardings`.
      mesh: axes "data" and "model", see `training.parallel.make_layout`.
      items: int [b, l], padded on the right with 0.
      lengths: int [b].
      timestamps: [b, max_len].
      excluded: int [b, s] items to leave out, 0 for none; or None.
      k: items a history.
      tile: items that a device scores at once.

    Returns:
      Scores [b, k], ids int32 [b, k], best first and equal scores in order of id, and whether all scores of a row are
      finite, bool [b].

    Raises:
      ValueError: for a k that the catalogue may not fill.
    """
    num_rows, most = items.shape[0], 0 if excluded is None else excluded.shape[1]
    left = model.config.vocab_size - 1 - most
    if not 1 <= k <= left:
        raise ValueError(f"k={k} must lie between 1 and {left}, the items less the {most} a row that may be left out")
    excluded = jnp.zeros((num_rows, 1), jnp.int32) if excluded is None else excluded
    # Every device gets as many rows; those that are added repeat the last.
    filled = (
        jnp.pad(a, ((0, -num_rows % mesh.size), *((0, 0),) * (a.ndim - 1)), mode="edge")
        for a in (items, lengths, timestamps, excluded)
    )
    found = _on_mesh(params, *filled, model=model, mesh=mesh, k=k, tile=tile)
    return tuple(a[:num_rows] for a in found)
