"""Adam on those rows of the item table that a step touches; its cost does not depend on how many others there are.

The step reads a few of the table's rows: the items of the batch, the targets and the negatives. They are gathered into
a small table, under whose row numbers the model and the optimiser run as they are, and the new rows are written over
the old ones in the donated state.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tim4rec_jax.data.loader import Batch, PackedBatch
from tim4rec_jax.data.negatives import Negatives
from tim4rec_jax.parallel.item_table import TABLE, local_index

_TABLE = (TABLE, "embedding")

Axis = str | tuple[str, ...]


def _is_table(path: tuple[Any, ...]) -> bool:
    """True of the table in the parameters, and of its moments in the optimiser's state."""
    return tuple(getattr(entry, "key", None) for entry in path[-2:]) == _TABLE


def gather_rows(tree: Any, ids: Array) -> Any:
    """Returns the tree with these rows in the place of the item table; zeros for ids behind its end."""

    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf.at[ids].get(mode="fill", fill_value=0) if _is_table(path) else leaf

    return jax.tree.map_with_path(gather, tree)


def scatter_rows(tree: Any, rows: Any, ids: Array, *, ascending: bool = True) -> Any:
    """Returns `rows`, with the item table of `tree` in which these rows are replaced; no two ids are equal."""

    def scatter(path: tuple[Any, ...], leaf: Array, new: Array) -> Array:
        if not _is_table(path):
            return new
        return leaf.at[ids].set(new, mode="drop", unique_indices=True, indices_are_sorted=ascending)

    return jax.tree.map_with_path(scatter, tree, rows)


def spread_behind(ids: Array, vocab_size: int) -> Array:
    """Gives ids that only fill different values behind the table's end, so that no two are equal."""
    return jnp.where(ids < vocab_size, ids, vocab_size + jnp.arange(ids.size, dtype=ids.dtype))


def in_gathered_rows(
    batch: Batch | PackedBatch, negatives: Negatives, vocab_size: int
) -> tuple[Array, Batch | PackedBatch, Negatives]:
    """Returns the rows that a step touches, and what it reads in numbers of those rows.

    Row 0, the padding, is always the first of them; MASK reads none. What has no weight has no target.

    Args:
      batch: of b rows.
      negatives: m.
      vocab_size: v.

    Returns:
      ids int32 [u], ascending, filled up with different numbers from v on; u depends on shapes alone. Then the batch
      and the negatives.
    """
    targets = jnp.where(batch.weights > 0, batch.targets, 0)
    parts = (jnp.zeros(1, jnp.int32), jnp.maximum(batch.items, 0).ravel(), targets.ravel(), negatives.items)
    touched = jnp.concatenate(parts)
    size = min(touched.size, vocab_size)
    ids, index = jnp.unique(touched, return_inverse=True, size=size, fill_value=vocab_size)
    ends = [1, 1 + batch.items.size, 1 + batch.items.size + targets.size]
    _, items, targets_in, drawn = jnp.split(index.astype(jnp.int32), ends)
    items = jnp.where(batch.items < 0, batch.items, items.reshape(batch.items.shape))
    batch = dataclasses.replace(batch, items=items, targets=targets_in.reshape(targets.shape))
    return spread_behind(ids, vocab_size), batch, dataclasses.replace(negatives, items=drawn)


def sum_rows(ids: Array, rows: Array, axis: Axis, vocab_size: int) -> tuple[Array, Array]:
    """Sums what several devices have for some rows each, one device after the other, so that all get the same bits.

    Args:
      ids: int32 [u] of this device as of `in_gathered_rows`.
      rows: [u, d], zeros where ids only fill.
      axis: name of the devices' axis, or of several.
      vocab_size: v.

    Returns:
      The ids of all devices as of `in_gathered_rows`, [w], and their sums [w, d].
    """
    of_all, rows_of_all = jax.lax.all_gather((ids, rows), axis)
    real = of_all < vocab_size
    size = min(of_all.size, vocab_size + 1)
    flat = jnp.where(real, of_all, vocab_size).ravel()
    union, index = jnp.unique(flat, return_inverse=True, size=size, fill_value=vocab_size)
    behind = size + jnp.arange(ids.size, dtype=index.dtype)
    index = jnp.where(real, index.reshape(of_all.shape), behind)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        own, values = part
        # Within a device no two ids are equal, so that the order of the additions is that of the devices.
        return total.at[own].add(values, mode="drop", unique_indices=True, indices_are_sorted=True), None

    total, _ = jax.lax.scan(add, jnp.zeros((size, rows.shape[1]), rows.dtype), (index, rows_of_all))
    return spread_behind(union, vocab_size), total


def shard_index(params: Any, ids: Array) -> Array:
    """Returns where in this device's shard the rows lie; different numbers behind its end where others have them."""
    shard = params[TABLE]["embedding"]
    return spread_behind(local_index(shard, ids), shard.shape[0])


def lazy_update(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, ids: Array, *, sharded: bool
) -> tuple[Any, Any]:
    """Updates the touched rows of the item table and all else; other rows and their moments stay as they are.

    As TensorFlow's LazyAdam and PyTorch's SparseAdam: the correction of the moments' bias counts all steps. Where all
    rows are touched it is the dense update.

    Args:
      optimizer: each value of its state and its updates depends on that value's gradients alone, but for a norm.
      grads: parameter tree whose item table holds the touched rows [u, d].
      opt_state: Optax state.
      params: parameter tree.
      ids: int32 [u] as of `in_gathered_rows`.
      sharded: the table and its moments are this device's shards, inside `jax.shard_map`.

    Returns:
      The new parameters and the new state.
    """
    index = shard_index(params, ids) if sharded else ids
    rows = gather_rows(params, index)
    updates, new_state = optimizer.update(grads, gather_rows(opt_state, index), rows)
    write = functools.partial(scatter_rows, ids=index, ascending=not sharded)
    return write(params, optax.apply_updates(rows, updates)), write(opt_state, new_state)
