"""The item embedding in equal parts on the devices of a mesh's axis: who holds what, and how others get at it.

All but `partition_specs` and `shardings` run inside `jax.shard_map`, on the part of one device.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tim4rec_jax.models.recommender import SequentialModel

PyTree = Any
DATA_AXIS, MODEL_AXIS = "data", "model"
# Rows of a batch are shared among all devices, also among those that hold parts of the same embedding.
ROW_AXES = (DATA_AXIS, MODEL_AXIS)
TABLE = "item_embedding"


def partition_specs(tree: PyTree) -> PyTree:
    """Returns what lies where: rows of the item embedding, and of what an optimiser keeps of them, over `MODEL_AXIS`.

    Args:
      tree: parameters, or a state with parameters in it; arrays or their shapes.

    Returns:
      The same tree of `PartitionSpec`s.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        of_table = any(getattr(key, "key", None) == TABLE for key in path)
        return P(MODEL_AXIS) if of_table and leaf.ndim else P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns `partition_specs` on a mesh, the same tree of `NamedSharding`s."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree))


def num_shards(mesh: Mesh | None) -> int:
    """Returns how many devices a copy of the item embedding is spread over."""
    return 1 if mesh is None else mesh.shape.get(MODEL_AXIS, 1)


def own_places(shard: Array, ids: Array) -> Array:
    """Returns where in this device's part the rows of ids lie; the number of its rows where another has them."""
    places = ids - jax.lax.axis_index(MODEL_AXIS) * shard.shape[0]
    return jnp.where((places >= 0) & (places < shard.shape[0]), places, shard.shape[0])


def own_rows(shard: Array, ids: Array) -> Array:
    """Returns rows [n, d] for ids [n], zeros where another device has them; the sum over devices is the lookup."""
    return shard.at[own_places(shard, ids)].get(mode="fill", fill_value=0)


def beyond_catalogue(shard: Array, vocab_size: int) -> Array | None:
    """Returns which of this device's rows belong to no item, bool [rows]; None where the catalogue fills all parts."""
    if vocab_size == shard.shape[0] * jax.lax.axis_size(MODEL_AXIS):
        return None
    return jax.lax.axis_index(MODEL_AXIS) * shard.shape[0] + jnp.arange(shard.shape[0]) >= vocab_size


def fetch_rows(shard: Array, ids: Array) -> Array:
    """Looks up rows of the whole embedding; every device has its own ids, as many as the others.

    Args:
      shard: [rows, d], this device's part.
      ids: int [n].

    Returns:
      [n, d].
    """
    everyone = jax.lax.all_gather(ids, MODEL_AXIS, tiled=True)
    return jax.lax.psum_scatter(own_rows(shard, everyone), MODEL_AXIS, scatter_dimension=0, tiled=True)


def working_ids(items: Array) -> tuple[Array, Array]:
    """Returns the ids [1 + b l] that a batch reads, and its items [b, l] as places among them.

    Padding stays item 0, for models tell it by that.
    """
    ids = jnp.concatenate([jnp.zeros(1, items.dtype), items.ravel()])
    places = 1 + jnp.arange(items.size, dtype=items.dtype).reshape(items.shape)
    return ids, jnp.where(items == 0, jnp.zeros_like(items), places)


def on_working_table(model: SequentialModel, params: PyTree, rows: Array) -> tuple[SequentialModel, PyTree]:
    """Returns the model and parameters that read a small embedding of fetched rows [n, d] in place of the whole one."""
    config = dataclasses.replace(model.config, vocab_size=rows.shape[0], vocab_multiple=1)
    return model.clone(config=config), {**params, TABLE: {"embedding": rows}}
