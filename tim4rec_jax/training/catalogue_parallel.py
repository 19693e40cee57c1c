"""The training step with the item embedding in parts: no device holds all of its rows, or a row of all scores.

A device encodes its own rows of the batch with a working table of the embedding rows that they read, fetched once a
step. Devices that hold parts of the same embedding then share the cross-entropy: each takes the log-sum-exp over its
own items, for the targets of all of them. Loops whose number of turns depends on the data exchange nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kernels.softmax_cross_entropy import log_sum_exp
from tim4rec_jax.config import ExperimentConfig, TrainConfig
from tim4rec_jax.data.loader import Batch, Loader, PackedBatch
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.models import SequentialModel, last_hidden, variables
from tim4rec_jax.models.catalogue_shards import (
    DATA_AXIS,
    MODEL_AXIS,
    ROW_AXES,
    TABLE,
    beyond_catalogue,
    fetch_rows,
    on_working_table,
    own_rows,
    partition_specs,
    working_ids,
)
from tim4rec_jax.training.step import TrainState, fold_groups, make_optimizer, train_step

PyTree = Any
Rows = Batch | PackedBatch
Encode = Callable[[PyTree, Rows, Array], Array]


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns Optax's clipping of the global norm for gradients whose item embedding lies in parts."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del params

        def square(spec: Any, leaf: Array) -> Array:
            total = jnp.sum(jnp.square(leaf))
            return jax.lax.psum(total, MODEL_AXIS) if MODEL_AXIS in spec else total

        norm = jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(square, partition_specs(updates), updates))))
        clipped = jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm.astype(g.dtype) * max_norm), updates)
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def choose_step(config: ExperimentConfig) -> Callable[..., tuple[TrainState, Array]]:
    """Returns the step of one device that the settings ask for: `train_step`, or one for a table in parts."""
    if config.parallel.catalogue_shards == 1:
        return train_step
    return functools.partial(train_step, axis=ROW_AXES) if config.train.loss == "sampled_ce" else catalogue_train_step


def choose_optimizer(config: ExperimentConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimiser for `choose_step`; all of them have a state of the same tree."""
    # A lazy update shows it the gradients of all devices at once.
    sees_a_part = config.parallel.catalogue_shards > 1 and config.train.table_optimizer == "adam"
    return (make_sharded_optimizer if sees_a_part else make_optimizer)(config.train, total_steps)


def make_sharded_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns `training.step.make_optimizer`, with a state of the same tree, for gradients in parts."""
    if config.clip_norm is None:
        return make_optimizer(config, total_steps)
    clip = clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, make_optimizer(dataclasses.replace(config, clip_norm=None), total_steps))


def catalogue_cross_entropy(
    hidden: Array, shard: Array, targets: Array, *, vocab_size: int, implementation: str | None = None
) -> Array:
    """Softmax cross-entropy over a catalogue in parts, without scores for all of a part existing at once.

      loss_t = log sum_i exp(lse_it) - hidden_t . E_target,    lse_it = log sum_{v in part i} exp(hidden_t . E_v)

    Devices of one `MODEL_AXIS` exchange hidden states, targets and two numbers a target.

    Args:
      hidden: [t, d] of this device's rows; as many on every device.
      shard: [rows, d], this device's part of the embedding.
      targets: int [t].
      vocab_size: v; rows beyond it have probability 0.
      implementation: backend of `kernels.softmax_cross_entropy`; None chooses.

    Returns:
      [t], float32 or wider.
    """
    everyone, all_targets = (jax.lax.all_gather(a, MODEL_AXIS, tiled=True) for a in (hidden, targets))
    masked = beyond_catalogue(shard, vocab_size)
    own = log_sum_exp(everyone, shard, masked=masked, implementation=implementation)
    largest = jax.lax.pmax(jax.lax.stop_gradient(own), MODEL_AXIS)
    target_rows = own_rows(shard, all_targets).astype(hidden.dtype)
    at_target = jnp.einsum("td,td->t", everyone, target_rows, preferred_element_type=own.dtype)
    # One exchange for both sums.
    sums = jnp.stack([jnp.exp(own - largest), at_target], axis=1)
    sums = jax.lax.psum_scatter(sums, MODEL_AXIS, scatter_dimension=0, tiled=True)
    first = jax.lax.axis_index(MODEL_AXIS) * targets.shape[0]
    return jnp.log(sums[:, 0]) + jax.lax.dynamic_slice_in_dim(largest, first, targets.shape[0]) - sums[:, 1]


def _fold(
    add: Callable[[PyTree, Rows, Array], PyTree], carry: PyTree, batch: Rows, groups: tuple[LengthGroup, ...]
) -> PyTree:
    """Takes carry = add(carry, rows, places) through a batch in microbatches; rows that fill one have weight 0."""
    if isinstance(batch, Batch):
        return fold_groups(add, carry, batch, groups)
    rows_at_once, num_rows = groups[0].rows, batch.items.shape[0]
    places = jnp.arange(num_rows)
    if rows_at_once >= num_rows:
        return add(carry, batch, places)
    missing = -num_rows % rows_at_once
    batch = jax.tree.map(lambda a: jnp.pad(a, ((0, missing), (0, 0))), batch)
    places = jnp.pad(places, (0, missing))

    def add_microbatch(k: Array, carry: PyTree) -> PyTree:
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=k * rows_at_once, slice_size=rows_at_once)
        return add(carry, *jax.tree.map(take, (batch, places)))

    real = jnp.sum(jnp.any(batch.weights > 0, axis=1), dtype=jnp.int32)
    return jax.lax.fori_loop(0, (real + rows_at_once - 1) // rows_at_once, add_microbatch, carry)


def _hidden(encode: Encode, params: PyTree, batch: Rows, groups: tuple[LengthGroup, ...], dtype: Any) -> Array:
    """Returns the hidden states that have a target, [b, d] or [b, l, d]; 0 where no weight of a row is."""
    width = params[TABLE]["embedding"].shape[1]

    def add(hidden: Array, rows: Rows, places: Array) -> Array:
        real = jnp.any(rows.weights.reshape(len(places), -1) != 0, axis=1)
        # What fills a microbatch may repeat a row, which must be written once.
        once = jnp.where(real, places, hidden.shape[0])
        return hidden.at[once].set(encode(params, rows, places).astype(hidden.dtype), mode="drop")

    return _fold(add, jnp.zeros((*batch.weights.shape, width), dtype), batch, groups)


def _pulled_back(
    encode: Encode, params: PyTree, batch: Rows, groups: tuple[LengthGroup, ...], d_hidden: Array
) -> PyTree:
    """Returns the gradient by the parameters, given that by the hidden states; microbatches are computed again."""

    def add(total: PyTree, rows: Rows, places: Array) -> PyTree:
        real = jnp.any(rows.weights.reshape(len(places), -1) != 0, axis=1)
        own = jnp.where(real.reshape(-1, *(1,) * (d_hidden.ndim - 1)), d_hidden[places], 0)
        hidden, pull_back = jax.vjp(lambda params: encode(params, rows, places), params)
        return jax.tree.map(jnp.add, total, pull_back(own.astype(hidden.dtype))[0])

    return _fold(add, jax.tree.map(jnp.zeros_like, params), batch, groups)


def _encoder(model: SequentialModel, key: Array, first_id: Array, statistics: Mapping[str, Any]) -> Encode:
    """Returns (params, rows, places in the batch) -> hidden states; a row's dropout follows from its name."""

    def encode(params: PyTree, rows: Rows, places: Array) -> Array:
        params = {**params, **statistics}
        options = {"deterministic": False, "example_ids": first_id + places, "rngs": {"dropout": key}}
        if isinstance(rows, Batch):
            return last_hidden(model, variables(params), rows.items, rows.lengths, rows.timestamps, **options)
        options |= {"segment_ids": rows.segment_ids}
        return model.apply(variables(params), rows.items, rows.timestamps, **options)[0]

    return encode


def _value_and_grad(
    model: SequentialModel,
    config: TrainConfig,
    params: PyTree,
    batch: Rows,
    groups: tuple[LengthGroup, ...],
    key: Array,
    first_id: Array,
    statistics: Mapping[str, Any],
) -> tuple[Array, PyTree]:
    """Returns this device's share of the summed loss and of the gradient.

    That by its part of the table holds what the rows of all devices of one `MODEL_AXIS` give; only the copies of that
    part are still to be summed.
    """
    ids, items = working_ids(batch.items)
    shard = params[TABLE]["embedding"]
    fetched, push_back = jax.vjp(lambda shard: fetch_rows(shard, ids), shard)
    small, small_params = on_working_table(model, params, fetched)
    batch = batch.replace(items=items)
    encode = _encoder(small, key, first_id, statistics)
    dtype = jnp.dtype(model.config.dtype)
    hidden = _hidden(encode, small_params, batch, groups, dtype)

    def loss_sum(hidden: Array, shard: Array) -> Array:
        losses = catalogue_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), shard, batch.targets.ravel(), vocab_size=model.config.vocab_size,
            implementation=model.config.kernels,
        )  # fmt: skip
        return jnp.sum(batch.weights.ravel() * losses)

    total, (d_hidden, d_scored) = jax.value_and_grad(loss_sum, argnums=(0, 1))(hidden, shard)
    grads = _pulled_back(encode, small_params, batch, groups, d_hidden)
    d_read = push_back(grads[TABLE]["embedding"])[0]
    return total, {**grads, TABLE: {"embedding": d_scored + d_read}}


def catalogue_train_step(
    model: SequentialModel,
    optimizer: optax.GradientTransformation,
    config: ExperimentConfig,
    groups: tuple[LengthGroup, ...],
    loader: Loader,
    state: TrainState,
    resident: PyTree,
    payload: PyTree,
    *,
    statistics: Mapping[str, Any] | None = None,
) -> tuple[TrainState, Array]:
    """Makes the update of `training.step.train_step`, one device of a mesh with the item embedding in parts.

    Args:
      model, config, loader, groups: as there.
      optimizer: from `make_sharded_optimizer`.
      state: this device's parts, see `models.catalogue_shards.partition_specs`.
      resident, payload, statistics: as there; every device has its own rows of the batch.

    Returns:
      The new state and the mean loss [].
    """
    batch = loader.batch(resident, payload)
    first_id = jax.lax.axis_index(ROW_AXES) * batch.weights.shape[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)
    if isinstance(batch, Batch):
        key, _ = jax.random.split(key)  # The other half draws negatives.
    total, grads = _value_and_grad(model, config.train, state.params, batch, groups, key, first_id, statistics or {})
    # Of one dtype with the rest, so that the devices need one sum only.
    weight = jnp.sum(batch.weights).astype(total.dtype)
    table, rest = grads[TABLE], {name: part for name, part in grads.items() if name != TABLE}
    total, weight, rest = jax.lax.psum((total, weight, rest), ROW_AXES)
    if jax.lax.axis_size(DATA_AXIS) > 1:
        table = jax.lax.psum(table, DATA_AXIS)
    grads = {**rest, TABLE: table}
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.key), total / weight
