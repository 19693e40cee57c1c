"""The item table in equal shards on the devices of a mesh's axis: lookups, softmax, ranks and best items.

Everything else is a global array under `jax.jit`. What says so runs inside `jax.shard_map`, on the shard of one device:
devices of one `MODEL_AXIS` gather hidden states, work through their own items, and exchange sums, counts or lists.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.softmax_cross_entropy import log_sum_exp
from tim4rec_jax.models.recommender import SequentialModel, last_hidden, variables

PyTree = Any
DATA_AXIS, MODEL_AXIS = "data", "model"
# Rows of a batch are shared among all devices, also among those that hold shards of the same table.
ROW_AXES = (DATA_AXIS, MODEL_AXIS)
TABLE = "item_embedding"
# Items that are scored at once.
ITEM_TILE = 8192

Carry = TypeVar("Carry")
Model = TypeVar("Model", bound=nn.Module)
Step = Callable[[Carry, Array, Array, Array], Carry]


def partition_specs(tree: PyTree) -> PyTree:
    """Returns what lies where: rows of the item table, and of what an optimiser keeps of them, over `MODEL_AXIS`.

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
    """Returns how many devices a copy of the item table is spread over."""
    return 1 if mesh is None else mesh.shape.get(MODEL_AXIS, 1)


def local_index(shard: Array, ids: Array) -> Array:
    """Returns where in this device's shard the rows of ids lie; the number of its rows where another has them."""
    index = ids - jax.lax.axis_index(MODEL_AXIS) * shard.shape[0]
    return jnp.where((index >= 0) & (index < shard.shape[0]), index, shard.shape[0])


def local_rows(shard: Array, ids: Array) -> Array:
    """Returns rows [n, d] for ids [n], zeros where another device has them; the sum over devices is the lookup."""
    return shard.at[local_index(shard, ids)].get(mode="fill", fill_value=0)


def fetch_rows(shard: Array, ids: Array) -> Array:
    """Looks up rows [n, d] of the whole table for ids [n] inside `shard_map`; every device has its own, as many."""
    everyone = jax.lax.all_gather(ids, MODEL_AXIS, tiled=True)
    return jax.lax.psum_scatter(local_rows(shard, everyone), MODEL_AXIS, scatter_dimension=0, tiled=True)


def with_rows(model: Model, params: PyTree, rows: Array) -> tuple[Model, PyTree]:
    """Returns the model and parameters that read a small table of rows [n, d] in place of the whole one."""
    config = dataclasses.replace(model.config, vocab_size=rows.shape[0], vocab_multiple=1)
    return model.clone(config=config), {**params, TABLE: {"embedding": rows}}


def ids_read(items: Array) -> tuple[Array, Array]:
    """Returns the ids [1 + b l] that a batch reads, and its items [b, l] as indices among them.

    Padding and MASK stay what they are, for models tell them by that.
    """
    ids = jnp.concatenate([jnp.zeros(1, items.dtype), items.ravel()])
    index = 1 + jnp.arange(items.size, dtype=items.dtype).reshape(items.shape)
    return ids, jnp.where(items <= 0, items, index)


def sharded_last_hidden(model: nn.Module, params: PyTree, items: Array, *inputs: Array) -> Array:
    """Returns `models.last_hidden` of this device's rows inside `shard_map`, from a shard of the table."""
    ids, items = ids_read(items)
    small, small_params = with_rows(model, params, fetch_rows(params[TABLE]["embedding"], ids))
    return last_hidden(small, variables(small_params), items, *inputs).astype(model.config.dtype)


def _own(array: Array, size: int) -> Array:
    """Returns this device's `size` values of what the devices of its `MODEL_AXIS` have together."""
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(MODEL_AXIS) * size, size)


def sharded_cross_entropy(
    hidden: Array, shard: Array, targets: Array, *, vocab_size: int, implementation: str | None = None
) -> Array:
    """Softmax cross-entropy over a sharded table inside `shard_map`, without all scores of a shard existing at once.

      loss_t = log sum_i exp(lse_it) - hidden_t . E_target,    lse_it = log sum_{v in shard i} exp(hidden_t . E_v)

    Args:
      hidden: [t, d] of this device's rows; as many on every device.
      shard: [rows, d] of the table.
      targets: int [t].
      vocab_size: v; rows beyond it have probability 0.
      implementation: backend of `kernels.softmax_cross_entropy`; None chooses.

    Returns:
      [t], float32 or wider.
    """
    everyone, all_targets = (jax.lax.all_gather(a, MODEL_AXIS, tiled=True) for a in (hidden, targets))
    ids = jax.lax.axis_index(MODEL_AXIS) * shard.shape[0] + jnp.arange(shard.shape[0])
    filled = vocab_size == shard.shape[0] * jax.lax.axis_size(MODEL_AXIS)
    local = log_sum_exp(everyone, shard, masked=None if filled else ids >= vocab_size, implementation=implementation)
    largest = jax.lax.pmax(jax.lax.stop_gradient(local), MODEL_AXIS)
    target_rows = local_rows(shard, all_targets).astype(hidden.dtype)
    at_target = jnp.einsum("td,td->t", everyone, target_rows, preferred_element_type=local.dtype)
    # One exchange for both sums.
    sums = jnp.stack([jnp.exp(local - largest), at_target], axis=1)
    sums = jax.lax.psum_scatter(sums, MODEL_AXIS, scatter_dimension=0, tiled=True)
    return jnp.log(sums[:, 0]) + _own(largest, targets.shape[0]) - sums[:, 1]


def _scores(hidden: Array, rows: Array) -> Array:
    """Returns hidden rows^T as the models score, [t, rows] in float32 or wider."""
    accum_dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("td,vd->tv", hidden, rows.astype(hidden.dtype), preferred_element_type=accum_dtype)


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
        index = start + jnp.arange(tile)
        ids = first + index
        counts = (index >= k * tile) & (ids > 0) & (ids < vocab_size)
        return step(carry, _scores(hidden, jax.lax.dynamic_slice_in_dim(shard, start, tile)), ids, counts)

    return jax.lax.fori_loop(0, -(-rows // tile), add, carry)


def _among(excluded: Array, ids: Array) -> Array:
    """Returns which of ascending, consecutive ids [tile] are among each row's excluded ones [t, s], bool [t, tile]."""
    index = excluded - ids[0]
    index = jnp.where((index >= 0) & (index < ids.size), index, ids.size)
    found = jnp.zeros((excluded.shape[0], ids.size), bool)
    return found.at[jnp.arange(excluded.shape[0])[:, None], index].set(True, mode="drop")


def _broken(scores: Array, counts: Array) -> Array:
    return jnp.sum(~jnp.isfinite(scores) & counts, axis=1, dtype=jnp.int32)


def halves_ahead(scores: Array, target_scores: Array) -> Array:
    """Returns twice how far each item pushes a target down: 2 for a greater score, 1 for an equal one, else 0.

    Args:
      scores: [..., n] float.
      target_scores: [..., 1] float.

    Returns:
      [..., n] int32; sums of it are exact, and `1 + sum / 2` over the other items is the rank.
    """
    return (scores > target_scores).astype(jnp.int32) + (scores >= target_scores)


def sharded_ranks(
    hidden: Array, targets: Array, shard: Array, seen: Array, *, vocab_size: int, tile: int = ITEM_TILE
) -> tuple[Array, Array, Array]:
    """Ranks targets inside `shard_map` as `evaluation.metrics.rank_of_target`, by counting each shard's items ahead.

    The rank among unseen items is that among all, less the seen items ahead; the target itself always stays.

    Args:
      hidden: [t, d] of this device's rows, in the arithmetic's dtype; as many on every device.
      targets: int [t], at least 1.
      shard: [rows, d] of the table.
      seen: int [t n, s] items of the histories, each of a row once, 0 for none, of all n devices of the axis.
      vocab_size: v; rows beyond it are no items.
      tile: items scored at once.

    Returns:
      float32 [t] ranks from 1 among all items and among the unseen, and whether all scores of a row are finite, bool
      [t]; of this device's rows.
    """
    hidden, targets = (jax.lax.all_gather(a, MODEL_AXIS, tiled=True) for a in (hidden, targets))
    # By a product of matrices like that of the tiles, so that items with equal rows tie.
    at_target = jax.lax.psum(jnp.diagonal(_scores(hidden, local_rows(shard, targets))), MODEL_AXIS)

    def count(carry: Array, scores: Array, ids: Array, counts: Array) -> Array:
        halves = jnp.where(counts & (ids != targets[:, None]), halves_ahead(scores, at_target[:, None]), 0)
        index = seen - ids[0]
        here = (seen > 0) & (index >= 0) & (index < ids.size)
        of_seen = jnp.where(here, jnp.take_along_axis(halves, jnp.where(here, index, 0), axis=1), 0)
        found = (of_rows.sum(axis=1, dtype=jnp.int32) for of_rows in (halves, of_seen))
        return carry + jnp.stack([*found, _broken(scores, counts)], axis=1)

    zeros = jnp.zeros((targets.shape[0], 3), jnp.int32)
    found = _over_tiles(count, zeros, hidden, shard, vocab_size, tile)
    halves, of_seen, broken = jax.lax.psum_scatter(found, MODEL_AXIS, scatter_dimension=0, tiled=True).T
    is_nan = jnp.isnan(_own(at_target, halves.shape[0]))
    all_items, unseen = (
        jnp.where(is_nan, vocab_size, 1 + of / 2).astype(jnp.float32) for of in (halves, halves - of_seen)
    )
    return all_items, unseen, broken == 0


def local_top_k(
    hidden: Array, shard: Array, excluded: Array, k: int, *, vocab_size: int, tile: int = ITEM_TILE
) -> tuple[Array, Array, Array]:
    """Picks the k best items per row inside `shard_map`, best first; equal scores in order of id.

    Args:
      hidden: [t, d] of this device's rows, in the arithmetic's dtype; as many on every device.
      shard: [rows, d] of the table.
      excluded: int [t, s] items to leave out, 0 for none.
      k: items per row; no more than are left.
      vocab_size: v; rows beyond it are no items.
      tile: items scored at once.

    Returns:
      Scores [t, k], ids int32 [t, k], and whether all scores of a row are finite, bool [t]; of this device's rows.
    """
    own = hidden.shape[0]
    hidden, excluded = (jax.lax.all_gather(a, MODEL_AXIS, tiled=True) for a in (hidden, excluded))
    accum_dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def merge(carry: tuple[Array, Array, Array], scores: Array, ids: Array, counts: Array) -> tuple[Array, ...]:
        best, best_ids, broken = carry
        broken = broken + _broken(scores, counts)
        scores = jnp.where(counts & ~_among(excluded, ids), scores, -jnp.inf)
        ids = jnp.broadcast_to(ids.astype(jnp.int32), scores.shape)
        # What was found before has lower ids and stands first, where `top_k` takes equal ones from.
        return *_best(jnp.concatenate([best, scores], axis=1), jnp.concatenate([best_ids, ids], axis=1), k), broken

    carry = (
        jnp.full((hidden.shape[0], k), -jnp.inf, accum_dtype),
        jnp.zeros((hidden.shape[0], k), jnp.int32),
        jnp.zeros(hidden.shape[0], jnp.int32),
    )
    best, ids, broken = _over_tiles(merge, carry, hidden, shard, vocab_size, tile)

    def to_owner(found: Array) -> Array:
        """From the lists of all rows by one device to those of its own rows by all, [own, n k]."""
        lists = jax.lax.all_to_all(found.reshape(-1, own, k), MODEL_AXIS, split_axis=0, concat_axis=0, tiled=True)
        return jnp.moveaxis(lists, 0, 1).reshape(own, -1)

    best, ids = _best(to_owner(best), to_owner(ids), k)
    return best, ids, jax.lax.psum_scatter(broken, MODEL_AXIS, scatter_dimension=0, tiled=True) == 0


def _best(scores: Array, ids: Array, k: int) -> tuple[Array, Array]:
    best, index = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(ids, index, axis=1)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "k", "tile"))
def _top_k(params: PyTree, *rows: Array, model: SequentialModel, mesh: Mesh, k: int, tile: int) -> Any:
    def best(params: PyTree, *rows: Array) -> tuple[Array, Array, Array]:
        *inputs, excluded = rows
        hidden, shard = sharded_last_hidden(model, params, *inputs), params[TABLE]["embedding"]
        return local_top_k(hidden, shard, excluded, k, vocab_size=model.config.vocab_size, tile=tile)

    specs = (partition_specs(params), *(P(ROW_AXES),) * len(rows))
    return jax.shard_map(best, mesh=mesh, in_specs=specs, out_specs=P(ROW_AXES), check_vma=False)(params, *rows)


def sharded_top_k(
    model: SequentialModel,
    params: PyTree,
    mesh: Mesh,
    items: Array,
    lengths: Array,
    timestamps: Array,
    excluded: Array | None,
    k: int,
    *,
    tile: int = ITEM_TILE,
) -> tuple[Array, Array, Array]:
    """Finds the k best items after each history without the whole table or a row of all scores on any device.

    Args:
      model: from `build_model`.
      params: its parameters, placed by `shardings`.
      mesh: axes "data" and "model", see `parallel.mesh.make_layout`.
      items: int [b, l], padded on the right with 0.
      lengths: int [b].
      timestamps: [b, max_len].
      excluded: int [b, s] items to leave out, 0 for none; or None.
      k: items per history.
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
        raise ValueError(f"k={k} must lie between 1 and {left}, the items less the {most} per row that are left out")
    excluded = jnp.zeros((num_rows, 1), jnp.int32) if excluded is None else excluded
    # Every device gets as many rows; those that are added repeat the last.
    filled = (
        jnp.pad(a, ((0, -num_rows % mesh.size), *((0, 0),) * (a.ndim - 1)), mode="edge")
        for a in (items, lengths, timestamps, excluded)
    )
    return tuple(a[:num_rows] for a in _top_k(params, *filled, model=model, mesh=mesh, k=k, tile=tile))
