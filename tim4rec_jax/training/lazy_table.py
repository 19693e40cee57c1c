"""An update of those rows of the item table that a step touches; its cost does not depend on how many others there are.

The step reads a few of the table's rows: the items of the batch, the targets and the negatives. They are gathered into
a working table, under whose row numbers the model and the optimiser run as they are, and the new rows are written over
the old ones in the donated state. Where the table lies in parts on several devices, each of them gets what it reads
from the others and writes the rows that are its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tim4rec_jax.data.loader import Batch, PackedBatch
from tim4rec_jax.data.negatives import Negatives
from tim4rec_jax.models import SequentialModel
from tim4rec_jax.models.catalogue_shards import TABLE, fetch_rows, on_working_table, own_places

_TABLE = (TABLE, "embedding")

Axis = str | tuple[str, ...]
ValueAndGrad = Callable[[SequentialModel, Any, Any, Negatives], tuple[Array, Any]]


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


def _spread_behind(ids: Array, vocab_size: int) -> Array:
    """Gives ids that only fill different values behind the table's end, so that no two are equal."""
    return jnp.where(ids < vocab_size, ids, vocab_size + jnp.arange(ids.size, dtype=ids.dtype))


def in_working_rows(
    batch: Batch | PackedBatch, negatives: Negatives, vocab_size: int
) -> tuple[Array, Batch | PackedBatch, Negatives]:
    """Returns the rows that a step touches, and what it reads in numbers of those rows.

    Row 0, the padding, is always the first of them. What has no weight has no target.

    Args:
      batch: of b rows.
      negatives: m.
      vocab_size: v.

    Returns:
      ids int32 [u], ascending, filled up with different numbers from v on; u depends on shapes alone. Then the batch
      and the negatives.
    """
    targets = jnp.where(batch.weights > 0, batch.targets, 0)
    parts = (jnp.zeros(1, jnp.int32), batch.items.ravel(), targets.ravel(), negatives.items)
    touched = jnp.concatenate(parts)
    size = min(touched.size, vocab_size)
    ids, places = jnp.unique(touched, return_inverse=True, size=size, fill_value=vocab_size)
    ends = [1, 1 + batch.items.size, 1 + batch.items.size + targets.size]
    _, items, targets_in, drawn = jnp.split(places.astype(jnp.int32), ends)
    batch = batch.replace(items=items.reshape(batch.items.shape), targets=targets_in.reshape(targets.shape))
    return _spread_behind(ids, vocab_size), batch, negatives.replace(items=drawn)


def sum_rows(ids: Array, rows: Array, axis: Axis, vocab_size: int) -> tuple[Array, Array]:
    """Sums what several devices have for some rows each, one device after the other, so that all get the same bits.

    Args:
      ids: int32 [u] of this device as of `in_working_rows`.
      rows: [u, d], zeros where ids only fill.
      axis: name of the devices' axis, or of several.
      vocab_size: v.

    Returns:
      The ids of all devices as of `in_working_rows`, [w], and their sums [w, d].
    """
    of_all, rows_of_all = jax.lax.all_gather((ids, rows), axis)
    real = of_all < vocab_size
    size = min(of_all.size, vocab_size + 1)
    flat = jnp.where(real, of_all, vocab_size).ravel()
    union, places = jnp.unique(flat, return_inverse=True, size=size, fill_value=vocab_size)
    behind = size + jnp.arange(ids.size, dtype=places.dtype)
    places = jnp.where(real, places.reshape(of_all.shape), behind)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        own, values = part
        # Within a device no two ids are equal, so that the order of the additions is that of the devices.
        return total.at[own].add(values, mode="drop", unique_indices=True, indices_are_sorted=True), None

    total, _ = jax.lax.scan(add, jnp.zeros((size, rows.shape[1]), rows.dtype), (places, rows_of_all))
    return _spread_behind(union, vocab_size), total


def _total_of_devices(
    total: Array, weight: Array, grads: Any, ids: Array, axis: Axis, vocab_size: int
) -> tuple[Array, Array, Any, Array]:
    """Sums over devices: everything at once but the table's rows, of which each has others."""
    leaves, tree = jax.tree.flatten_with_path(grads)
    (place,) = (i for i, (path, _) in enumerate(leaves) if _is_table(path))
    values = [leaf for _, leaf in leaves]
    rows = values.pop(place)
    total, weight, values = jax.lax.psum((total, weight, values), axis)
    ids, rows = sum_rows(ids, rows, axis, vocab_size)
    values.insert(place, rows)
    return total, weight, tree.unflatten(values), ids


def _places_in_part(params: Any, ids: Array) -> Array:
    """Returns where in this device's part the rows lie; different numbers behind its end where others have them."""
    shard = params[TABLE]["embedding"]
    return _spread_behind(own_places(shard, ids), shard.shape[0])


def update_from_touched(
    value_and_grad: ValueAndGrad,
    model: SequentialModel,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    batch: Batch | PackedBatch,
    negatives: Negatives,
    *,
    lazy: bool = True,
    axis: Axis | None = None,
    in_parts: bool = False,
) -> tuple[Any, Any, Array]:
    """Makes one update from the rows of the item table that the step touches.

    If it is lazy, the table changes only there: the moments of other rows stay as they are, as in TensorFlow's LazyAdam
    and PyTorch's SparseAdam; the correction of their bias counts all steps. Where all rows are touched it is the dense
    update.

    Args:
      value_and_grad: (model, params, batch, negatives) -> weighted sum of the losses and its gradient, of which the
        rows of the item table that no id names are zero.
      model: its table has v rows.
      optimizer: each value of its state and its updates depends on that value's gradients alone, but for a norm. If
        lazy, it sees the gradients of all touched rows on every device; else those of the table as it lies there.
      params: parameter tree.
      opt_state: Optax state.
      batch: in ids of the catalogue.
      negatives: likewise.
      lazy: leave other rows as they are.
      axis: name of the devices' axis, or of several, each with its share of the batch and all with the same negatives;
        None on one.
      in_parts: the table and its moments lie in equal parts along the axis "model".

    Returns:
      The new parameters, the new state and the mean loss [].
    """
    vocab_size = model.config.embedding_rows
    ids, batch, negatives = in_working_rows(batch, negatives, vocab_size)
    table = params[TABLE]["embedding"]
    rows = fetch_rows(table, ids) if in_parts else table.at[ids].get(mode="fill", fill_value=0)
    own, working = on_working_table(model, params, rows)
    total, grads = value_and_grad(own, working, batch, negatives)
    weight = jnp.sum(batch.weights).astype(total.dtype)
    if axis is not None:
        total, weight, grads, ids = _total_of_devices(total, weight, grads, ids, axis, vocab_size)
    grads = jax.tree.map(lambda g: g / weight, grads)
    places = _places_in_part(params, ids) if in_parts else ids
    if not lazy:
        grads = scatter_rows(jax.tree.map(jnp.zeros_like, params), grads, places, ascending=not in_parts)
        updates, new_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_state, total / weight
    rows = gather_rows(params, places)
    updates, new_state = optimizer.update(grads, gather_rows(opt_state, places), rows)
    new_params = optax.apply_updates(rows, updates)
    write = functools.partial(scatter_rows, ids=places, ascending=not in_parts)
    return write(params, new_params), write(opt_state, new_state), total / weight
