"""One optimiser step: loss, gradients by groups of rows of like length, one update."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from kernels.softmax_cross_entropy import softmax_cross_entropy
from tim4rec_jax.config import ExperimentConfig, TrainConfig
from tim4rec_jax.data.loader import Batch, Loader, PackedBatch
from tim4rec_jax.data.negatives import Negatives
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.models import SequentialModel, init_params, last_hidden, variables
from tim4rec_jax.training.all_positions import packed_value_and_grad
from tim4rec_jax.training.lazy_table import Axis, update_from_touched
from tim4rec_jax.training.losses import bpr, cross_entropy, sample_negative, sampled_cross_entropy

# Folded into a step's key for its negatives, which are the same for all rows and on all devices.
_NEGATIVES = 0x6E656761


@flax.struct.dataclass
class TrainState:
    """All that an update changes.

    Attributes:
      step: int32 [], updates made.
      params: parameter tree.
      opt_state: Optax state.
      key: uint32 [2], base of dropout masks and negatives; the step is folded in.
    """

    step: Array
    params: Any
    opt_state: Any
    key: Array


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then constant or a cosine to 0 at `total_steps`."""
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.learning_rate, max(total_steps - config.warmup_steps, 1))
    else:
        decay = optax.constant_schedule(config.learning_rate)
    if config.warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns Adam (AdamW with weight decay) after optional clipping of the global norm."""
    adam = optax.adamw(
        learning_rate_schedule(config, total_steps), b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    return adam if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def init_state(model: SequentialModel, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step; initial values and dropout follow from the seed."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    params = jax.jit(functools.partial(init_params, model))(init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(dropout_key))


def _loss_sum(
    model: SequentialModel, config: TrainConfig, params: Any, rows: Batch, example_ids: Array, key: Array,
    negatives: Negatives | None,
) -> Array:  # fmt: skip
    """Returns the weighted sum of the rows' losses; a row's value depends on its id, not on the rows beside it."""
    dropout_key, negative_key = jax.random.split(key)
    hidden = last_hidden(
        model, variables(params), rows.items, rows.lengths, rows.timestamps, deterministic=False,
        example_ids=example_ids, rngs={"dropout": dropout_key},
    )  # fmt: skip
    if negatives is not None:
        table = model.apply(variables(params), method="item_table")
        return jnp.sum(rows.weights * sampled_cross_entropy(hidden, table, rows.targets, negatives))
    if config.loss_in_tiles:
        table = model.apply(variables(params), method="item_table")
        losses = softmax_cross_entropy(hidden, table, rows.targets, implementation=model.config.kernels)
        return jnp.sum(rows.weights * losses)
    scores = model.apply(variables(params), hidden, method="score")
    if config.loss == "ce":
        return jnp.sum(rows.weights * cross_entropy(scores, rows.targets))
    keys = jax.vmap(lambda i: jax.random.fold_in(negative_key, i))(example_ids)
    sampled = jax.vmap(sample_negative, in_axes=(0, 0, None))(keys, rows.targets, scores.shape[1])
    at = lambda ids: jnp.take_along_axis(scores, ids[:, None], axis=1)[:, 0]  # noqa: E731
    return jnp.sum(rows.weights * bpr(at(rows.targets), at(sampled)))


def fold_groups(
    add: Callable[[Any, Batch, Array], Any], carry: Any, batch: Batch, groups: tuple[LengthGroup, ...]
) -> Any:
    """Takes `carry = add(carry, rows, places in the batch)` through a batch, in microbatches of static shape.

    Rows go by descending length. Each group takes microbatches until no row is left that is longer than the next
    group's length; the last microbatch of a group is filled with shorter rows, so only the end of the batch is padded,
    with a row that is there already and has weight 0 then.

    Args:
      add: the step; rows are cut to the length of their group.
      carry: tree of arrays.
      batch: rows of any length up to the first group's.
      groups: by descending length.
    """
    if _in_one_piece(batch, groups):
        return add(carry, batch, jnp.arange(batch.lengths.shape[0]))
    order = jnp.argsort(batch.lengths, descending=True, stable=True)
    spare = max(group.rows for group in groups)
    fill = jnp.concatenate([order, jnp.broadcast_to(order[-1:], (spare,))])
    real = jnp.arange(fill.shape[0]) < order.shape[0]
    rows = jax.tree.map(lambda a: a[fill], batch)
    rows = rows.replace(weights=jnp.where(real, rows.weights, 0.0))

    taken = jnp.zeros((), jnp.int32)
    for group, next_length in zip(groups, [g.length for g in groups[1:]] + [0], strict=True):
        longer = jnp.sum(batch.lengths > next_length, dtype=jnp.int32)
        count = jnp.maximum(longer - taken + group.rows - 1, 0) // group.rows

        def add_microbatch(k: Array, carry: Any, *, group: LengthGroup = group, taken: Array = taken) -> Any:
            start = taken + k * group.rows
            part, ids = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, group.rows), (rows, fill))
            part = part.replace(items=part.items[:, : group.length])
            return add(carry, part, ids)

        carry = jax.lax.fori_loop(0, count, add_microbatch, carry)
        taken = taken + count * group.rows
    return carry


def _in_one_piece(batch: Batch, groups: tuple[LengthGroup, ...]) -> bool:
    return len(groups) == 1 and groups[0].rows >= batch.lengths.shape[0]


def grouped_value_and_grad(
    loss_sum: Callable[[Any, Batch, Array], Array], params: Any, batch: Batch, groups: tuple[LengthGroup, ...]
) -> tuple[Array, Any]:
    """Returns the summed loss and its gradient, computed group by group in microbatches; see `fold_groups`.

    Args:
      loss_sum: (params, rows, example ids [rows]) -> sum of weighted losses.
      params: parameter tree.
      batch: rows of any length up to the first group's.
      groups: by descending length.
    """
    if _in_one_piece(batch, groups):
        return jax.value_and_grad(loss_sum)(params, batch, jnp.arange(batch.lengths.shape[0]))

    def add(total: tuple[Array, Any], rows: Batch, ids: Array) -> tuple[Array, Any]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_sum)(params, rows, ids))

    wide = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    return fold_groups(add, (jnp.zeros((), wide), jax.tree.map(jnp.zeros_like, params)), batch, groups)


def train_step(
    model: SequentialModel,
    optimizer: optax.GradientTransformation,
    config: ExperimentConfig,
    groups: tuple[LengthGroup, ...],
    loader: Loader,
    state: TrainState,
    resident: Any,
    payload: Any,
    *,
    axis: Axis | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> tuple[TrainState, Array]:
    """Makes one update from the mean loss of the batch's targets.

    On several devices each has its share of the batch's rows and all make the same update; what they exchange is one
    sum of the gradients, the loss and the weight (with `train.table_optimizer="lazy_adam"` the item table's rows apart,
    see `lazy_table`).

    Args:
      model, optimizer, config, loader: fixed for the run.
      groups: rows computed together; of packed batches, one group of rows of max_len positions.
      state: is donated when jitted.
      resident: the loader's arrays on the device.
      payload: one of the loader's, see `data.loader.Loader`.
      axis: name of the devices' axis under `jax.shard_map` or `jax.pmap`, or of several; None on one device. With the
        item table in parts (`parallel.catalogue_shards`) the loss has to be "sampled_ce".
      statistics: {`STATISTICS`: of the model}, or nothing; they stand beside the parameters and have no gradient.

    Returns:
      The new state and the mean loss [], both on the device.
    """
    batch = loader.batch(resident, payload)
    # A row is named by its place in the whole batch, so that its dropout does not depend on the device.
    first_id = 0 if axis is None else jax.lax.axis_index(axis) * batch.weights.shape[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)

    negatives = None
    if config.train.loss == "sampled_ce":
        negatives = loader.negatives(resident, jax.random.fold_in(key, _NEGATIVES))

    def value_and_grad(
        model: SequentialModel, params: Any, batch: Any, negatives: Negatives | None
    ) -> tuple[Array, Any]:
        if isinstance(batch, PackedBatch):
            rows = groups[0].rows
            return packed_value_and_grad(model, config.train, params, batch, rows, key, first_id, negatives, statistics)

        def loss_sum(params: Any, rows: Batch, example_ids: Array) -> Array:
            params = {**params, **(statistics or {})}
            return _loss_sum(model, config.train, params, rows, first_id + example_ids, key, negatives)

        return grouped_value_and_grad(loss_sum, params, batch, groups)

    lazy, in_parts = config.train.table_optimizer == "lazy_adam", config.parallel.catalogue_shards > 1
    if lazy or in_parts:
        params, opt_state, loss = update_from_touched(
            value_and_grad, model, optimizer, state.params, state.opt_state, batch, negatives, lazy=lazy, axis=axis,
            in_parts=in_parts,
        )  # fmt: skip
        return TrainState(state.step + 1, params, opt_state, state.key), loss
    total, grads = value_and_grad(model, state.params, batch, negatives)
    # Of one dtype with the rest, so that the devices need one sum only.
    weight = jnp.sum(batch.weights).astype(total.dtype)
    if axis is not None:
        total, weight, grads = jax.lax.psum((total, weight, grads), axis)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.key), total / weight
