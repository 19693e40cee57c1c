"""One optimiser step: losses and gradients by microbatches of rows of like length, one update."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.softmax_cross_entropy import softmax_cross_entropy
from tim4rec_jax.config import BINARY_LOSSES, ExperimentConfig, TrainConfig
from tim4rec_jax.data.loader import Batch, Loader, PackedBatch
from tim4rec_jax.data.negatives import Negatives
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.models import (
    MASK,
    SequentialModel,
    apply_method,
    draw_masks,
    init_params,
    item_scores,
    last_hidden,
    scores_read_history,
    variables,
)
from tim4rec_jax.parallel.item_table import (
    DATA_AXIS,
    ROW_AXES,
    TABLE,
    fetch_rows,
    ids_read,
    num_shards,
    partition_specs,
    sharded_cross_entropy,
    shardings,
    with_rows,
)
from tim4rec_jax.training.lazy_adam import Axis, in_gathered_rows, lazy_update, scatter_rows, shard_index, sum_rows
from tim4rec_jax.training.losses import (
    binary_cross_entropy,
    bpr,
    cross_entropy,
    gbce_beta,
    sample_negative,
    sampled_cross_entropy,
    seen_log_sums,
    softmax_losses,
    target_and_negative_scores,
    weighted_cross_entropy,
    weighted_losses,
    with_seen_bias,
)

PyTree = Any
Rows = Batch | PackedBatch
Carry = TypeVar("Carry")
Statistics = Mapping[str, Any]
# Folded into a step's key for its negatives, which are the same for all rows and on all devices.
_NEGATIVES = 0x6E656761
# The same for what is masked, which a row draws under its id.
_MASKS = 0x6D61736B


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
        learning_rate_schedule(config, total_steps),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    return adam if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def init_state(model: SequentialModel, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step; initial values and dropout follow from the seed."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    params = jax.jit(functools.partial(init_params, model))(init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(dropout_key))


def _encode(
    model: SequentialModel, params: PyTree, rows: Rows, example_ids: Array, key: Array, statistics: Statistics
) -> Array:
    """Returns hidden states with dropout, [b, d] of last positions or [b, l, d]; a row's follow from its id alone."""
    read, options = variables({**params, **statistics}), {"deterministic": False, "example_ids": example_ids}
    if isinstance(rows, Batch):
        dropout_key, _ = jax.random.split(key)
        options["rngs"] = {"dropout": dropout_key}
        return last_hidden(model, read, rows.items, rows.lengths, rows.timestamps, **options)
    options |= {"rngs": {"dropout": key}, "segment_ids": rows.segment_ids}
    return model.apply(read, rows.items, rows.timestamps, **options)[0]


def _binary_losses(
    model: SequentialModel, config: TrainConfig, hidden: Array, table: Array, targets: Array, ids: Array, key: Array
) -> Array:
    """Returns binary cross-entropies [t]; a target's negatives follow from its id in the whole batch alone."""
    assert config.num_negatives is not None
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(ids)
    vocab_size = model.config.vocab_size
    scores = target_and_negative_scores(hidden, table, targets, keys, config.num_negatives, vocab_size)
    beta = gbce_beta(config.num_negatives, vocab_size - 1, config.calibration) if config.loss == "gbce" else 1.0
    return binary_cross_entropy(*scores, beta)


def _loss_of_last(
    model: SequentialModel,
    config: TrainConfig,
    params: PyTree,
    rows: Batch,
    example_ids: Array,
    key: Array,
    negatives: Negatives | None,
    statistics: Statistics,
) -> Array:
    """Returns the weighted sum of the losses at the rows' last positions."""
    hidden = _encode(model, params, rows, example_ids, key, statistics)
    if negatives is not None:
        table = apply_method(model, variables(params), "item_table")
        return jnp.sum(rows.weights * sampled_cross_entropy(hidden, table, rows.targets, negatives))
    if config.loss_in_tiles:
        table = apply_method(model, variables(params), "item_table")
        losses = softmax_cross_entropy(
            hidden, table, rows.targets, implementation=model.config.backend("softmax_cross_entropy")
        )
        return jnp.sum(rows.weights * losses)
    _, negative_key = jax.random.split(key)
    if config.loss in BINARY_LOSSES:
        table = apply_method(model, variables(params), "item_table")
        losses = _binary_losses(model, config, hidden, table, rows.targets, example_ids, negative_key)
        return jnp.sum(rows.weights * losses)
    scores = item_scores(model, variables(params), hidden, rows.items)
    if config.loss == "ce":
        return jnp.sum(rows.weights * cross_entropy(scores, rows.targets))
    keys = jax.vmap(lambda i: jax.random.fold_in(negative_key, i))(example_ids)
    sampled = jax.vmap(sample_negative, in_axes=(0, 0, None))(keys, rows.targets, scores.shape[1])
    positive, negative = (jnp.take_along_axis(scores, ids[:, None], axis=1)[:, 0] for ids in (rows.targets, sampled))
    return jnp.sum(rows.weights * bpr(positive, negative))


def _seen_value_and_grad(
    model: SequentialModel,
    config: TrainConfig,
    params: PyTree,
    rows: PackedBatch,
    encode: Callable[[PyTree], tuple[Array, Array]],
) -> tuple[Array, PyTree]:
    """Does what `_packed_value_and_grad` does where items that were seen have a score of their own."""

    def read(params: PyTree) -> tuple[tuple[Any, Any], Array]:
        hidden, table = encode(params)
        in_rows = hidden.reshape(*rows.items.shape, -1)
        log_seen, target_seen = seen_log_sums(in_rows, table, rows.items, rows.segment_ids, rows.targets)
        bias = apply_method(model, variables(params), "seen_bias")
        own, shared = {"hidden": hidden, "log_seen": log_seen.ravel()}, {"table": table, "bias": bias}
        return (own, shared), target_seen.ravel()

    (own, shared), pull_back, target_seen = jax.vjp(read, params, has_aux=True)
    kernels = model.config.backend("softmax_cross_entropy")

    def losses(own: Any, shared: Any, targets: Array, index: Array) -> Array:
        hidden, table = own["hidden"], shared["table"]
        plain = softmax_losses(hidden, table, targets, config.loss_in_tiles, kernels, None)
        wide = jnp.promote_types(jnp.float32, hidden.dtype)
        at_target = jnp.einsum("td,td->t", hidden, table[targets], preferred_element_type=wide)
        return with_seen_bias(plain, at_target, own["log_seen"], target_seen[index], shared["bias"])

    total, gradients = weighted_losses(losses, own, shared, rows.targets.ravel(), rows.weights.ravel())
    return total, pull_back(gradients)[0]


def _packed_value_and_grad(
    model: SequentialModel,
    config: TrainConfig,
    params: PyTree,
    rows: PackedBatch,
    example_ids: Array,
    key: Array,
    negatives: Negatives | None,
    statistics: Statistics,
) -> tuple[Array, PyTree]:
    """Returns the weighted sum of the losses at every position of packed rows and its gradient."""

    def encode(params: PyTree) -> tuple[Array, Array]:
        hidden = _encode(model, params, rows, example_ids, key, statistics)
        return hidden.reshape(rows.items.size, -1), apply_method(model, variables(params), "item_table")

    if scores_read_history(model):
        return _seen_value_and_grad(model, config, params, rows, encode)
    (hidden, table), pull_back = jax.vjp(encode, params)
    given = hidden, table, rows.targets.ravel(), rows.weights.ravel()
    if config.loss in BINARY_LOSSES:
        _, negative_key = jax.random.split(key)
        ids = (example_ids[:, None] * rows.items.shape[1] + jnp.arange(rows.items.shape[1])).ravel()

        def losses(hidden: Array, table: Array, targets: Array, index: Array) -> Array:
            return _binary_losses(model, config, hidden, table, targets, ids[index], negative_key)

        total, gradients = weighted_losses(losses, *given)
        return total, pull_back(gradients)[0]
    total, gradients = weighted_cross_entropy(
        *given,
        in_tiles=config.loss_in_tiles,
        kernels=model.config.backend("softmax_cross_entropy"),
        negatives=negatives,
    )
    return total, pull_back(gradients)[0]


def _masked(config: TrainConfig, rows: PackedBatch, first_id: Array | int, key: Array) -> PackedBatch:
    """Draws events of packed rows and puts MASK in their place; they alone keep their weight."""
    example_ids = first_id + jnp.arange(rows.items.shape[0])
    masked = draw_masks(key, example_ids, rows.segment_ids, rows.weights > 0, *config.masking)
    return dataclasses.replace(
        rows, items=jnp.where(masked, MASK, rows.items), weights=jnp.where(masked, rows.weights, 0)
    )


def _in_one_piece(batch: Rows, groups: tuple[LengthGroup, ...]) -> bool:
    return len(groups) == 1 and groups[0].rows >= batch.items.shape[0]


def fold_microbatches(
    add: Callable[[Carry, Rows, Array], Carry], carry: Carry, batch: Rows, groups: tuple[LengthGroup, ...]
) -> Carry:
    """Takes `carry = add(carry, rows, indices in the batch)` through a batch, in microbatches of static shape.

    Packed rows go in their order; those that only fill the batch come last and are left out. Rows of many lengths go by
    descending length: each group takes microbatches until no row is left that is longer than the next group's length;
    the last microbatch of a group is filled with shorter rows. Only the end of the batch is padded, with weight 0.

    Args:
      add: the step; rows are cut to the length of their group.
      carry: tree of arrays.
      batch: rows of any length up to the first group's.
      groups: by descending length; one of packed rows.
    """
    num_rows = batch.items.shape[0]
    if _in_one_piece(batch, groups):
        return add(carry, batch, jnp.arange(num_rows))
    if isinstance(batch, PackedBatch):
        missing = -num_rows % groups[0].rows
        rows = jax.tree.map(lambda a: jnp.pad(a, ((0, missing), (0, 0))), batch)
        index = jnp.pad(jnp.arange(num_rows), (0, missing))
        left = [jnp.sum(jnp.any(batch.weights > 0, axis=1), dtype=jnp.int32)]
    else:
        order = jnp.argsort(batch.lengths, descending=True, stable=True)
        spare = max(group.rows for group in groups)
        index = jnp.concatenate([order, jnp.broadcast_to(order[-1:], (spare,))])
        rows = jax.tree.map(lambda a: a[index], batch)
        real = jnp.arange(index.shape[0]) < num_rows
        rows = dataclasses.replace(rows, weights=jnp.where(real, rows.weights, 0.0))
        shorter = [group.length for group in groups[1:]] + [0]
        left = [jnp.sum(batch.lengths > length, dtype=jnp.int32) for length in shorter]

    taken = jnp.zeros((), jnp.int32)
    for group, until in zip(groups, left, strict=True):
        count = jnp.maximum(until - taken + group.rows - 1, 0) // group.rows

        def add_microbatch(k: Array, carry: Carry, *, group: LengthGroup = group, taken: Array = taken) -> Carry:
            start = taken + k * group.rows
            part, ids = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, group.rows), (rows, index))
            return add(carry, dataclasses.replace(part, items=part.items[:, : group.length]), ids)

        carry = jax.lax.fori_loop(0, count, add_microbatch, carry)
        taken = taken + count * group.rows
    return carry


def value_and_grad(
    model: SequentialModel,
    config: TrainConfig,
    params: PyTree,
    batch: Rows,
    groups: tuple[LengthGroup, ...],
    key: Array,
    first_id: Array | int = 0,
    negatives: Negatives | None = None,
    statistics: Statistics = MappingProxyType({}),
) -> tuple[Array, PyTree]:
    """Returns the weighted sum of a batch's losses and its gradient, computed in microbatches.

    Args:
      model: packable, if the batch is packed; and causal, or its events are masked.
      config: names the loss.
      params: parameter tree.
      batch: rows of one device.
      groups: see `fold_microbatches`.
      key: of the step's dropout.
      first_id: index of the first of these rows in the whole batch.
      negatives: of the step, with the sampled cross-entropy.
      statistics: as in `train_step`.
    """

    def of_rows(rows: Rows, index: Array) -> tuple[Array, PyTree]:
        given = first_id + index, key, negatives, statistics
        if isinstance(rows, PackedBatch):
            return _packed_value_and_grad(model, config, params, rows, *given)
        return jax.value_and_grad(functools.partial(_loss_of_last, model, config))(params, rows, *given)

    if _in_one_piece(batch, groups):
        return of_rows(batch, jnp.arange(batch.items.shape[0]))
    accum_dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    zero = jnp.zeros((), accum_dtype), jax.tree.map(jnp.zeros_like, params)
    return fold_microbatches(lambda total, *rows: jax.tree.map(jnp.add, total, of_rows(*rows)), zero, batch, groups)


def _sharded_value_and_grad(
    model: SequentialModel,
    config: TrainConfig,
    params: PyTree,
    batch: Rows,
    groups: tuple[LengthGroup, ...],
    key: Array,
    first_id: Array | int,
    statistics: Statistics,
) -> tuple[Array, PyTree]:
    """Does what `value_and_grad` does with the softmax over a sharded table, inside `jax.shard_map`.

    A device encodes its rows with a small table of those that they read, fetched once; then all devices of one
    `MODEL_AXIS` share the cross-entropy. Loops whose number of turns depends on the data exchange nothing. The gradient
    of this device's shard holds what the rows of those devices give.
    """
    ids, items = ids_read(batch.items)
    shard = params[TABLE]["embedding"]
    fetched, push_back = jax.vjp(lambda shard: fetch_rows(shard, ids), shard)
    small, small_params = with_rows(model, params, fetched)
    batch = dataclasses.replace(batch, items=items)

    def encode(params: PyTree, rows: Rows, index: Array) -> Array:
        return _encode(small, params, rows, first_id + index, key, statistics)

    def is_real(rows: Rows) -> Array:
        return jnp.any(rows.weights.reshape(rows.weights.shape[0], -1) != 0, axis=1)

    def add_hidden(hidden: Array, rows: Rows, index: Array) -> Array:
        # What fills a microbatch may repeat a row, which must be written once.
        once = jnp.where(is_real(rows), index, hidden.shape[0])
        return hidden.at[once].set(encode(small_params, rows, index).astype(hidden.dtype), mode="drop")

    hidden = jnp.zeros((*batch.weights.shape, shard.shape[1]), model.config.dtype)
    hidden = fold_microbatches(add_hidden, hidden, batch, groups)

    def loss_sum(hidden: Array, shard: Array) -> Array:
        losses = sharded_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            shard,
            batch.targets.ravel(),
            vocab_size=model.config.vocab_size,
            implementation=model.config.backend("softmax_cross_entropy"),
        )
        return jnp.sum(batch.weights.ravel() * losses)

    total, (d_hidden, d_scored) = jax.value_and_grad(loss_sum, argnums=(0, 1))(hidden, shard)

    def add_gradient(total: PyTree, rows: Rows, index: Array) -> PyTree:
        real = is_real(rows).reshape(-1, *(1,) * (d_hidden.ndim - 1))
        hidden, pull_back = jax.vjp(lambda params: encode(params, rows, index), small_params)
        own = jnp.where(real, d_hidden[index], 0).astype(hidden.dtype)
        return jax.tree.map(jnp.add, total, pull_back(own)[0])

    grads = fold_microbatches(add_gradient, jax.tree.map(jnp.zeros_like, small_params), batch, groups)
    d_read = push_back(grads[TABLE]["embedding"])[0]
    return total, {**grads, TABLE: {"embedding": d_scored + d_read}}


def _gradient(
    model: SequentialModel,
    config: ExperimentConfig,
    groups: tuple[LengthGroup, ...],
    loader: Loader,
    params: PyTree,
    step: Array,
    key: Array,
    resident: PyTree,
    payload: PyTree,
    *,
    axis: Axis | None,
    sharded: bool,
    statistics: Statistics,
) -> tuple[Array, PyTree, Array | None]:
    """Returns the mean loss, its gradient, and with lazy Adam the ids of the table's rows that it holds.

    The work of one device; several sum what they have, of a sharded table each shard with its copies alone.
    """
    batch = loader.batch(resident, payload)
    # A row is named by its index in the whole batch, so that its dropout does not depend on the device.
    first_id = 0 if axis is None else jax.lax.axis_index(axis) * batch.weights.shape[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step)
    if config.train.positions == "masked":
        batch = _masked(config.train, batch, first_id, jax.random.fold_in(key, _MASKS))
    sampled, lazy = config.train.loss == "sampled_ce", config.train.table_optimizer == "lazy_adam"
    ids, num_rows = None, model.config.embedding_rows
    if sharded and not sampled:
        total, grads = _sharded_value_and_grad(model, config.train, params, batch, groups, key, first_id, statistics)
    else:
        reader, read, negatives = model, params, None
        if sampled:
            negatives = loader.negatives(resident, jax.random.fold_in(key, _NEGATIVES))
        if negatives is not None and (lazy or sharded):  # Neither comes here with another loss.
            ids, batch, negatives = in_gathered_rows(batch, negatives, num_rows)
            table = params[TABLE]["embedding"]
            rows = fetch_rows(table, ids) if sharded else table.at[ids].get(mode="fill", fill_value=0)
            reader, read = with_rows(model, params, rows)
        total, grads = value_and_grad(reader, config.train, read, batch, groups, key, first_id, negatives, statistics)
    # Of one dtype with the rest, so that the devices need one sum only.
    weight = jnp.sum(batch.weights).astype(total.dtype)
    if axis is not None:
        table = grads.pop(TABLE) if sharded or ids is not None else None
        total, weight, grads = jax.lax.psum((total, weight, grads), axis)
        if table is not None and ids is not None:
            ids, rows = sum_rows(ids, table["embedding"], axis, num_rows)
            grads[TABLE] = {"embedding": rows}
        elif table is not None:
            grads[TABLE] = jax.lax.psum(table, DATA_AXIS) if jax.lax.axis_size(DATA_AXIS) > 1 else table
    grads = jax.tree.map(lambda g: g / weight, grads)
    if ids is not None and not lazy:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return total / weight, scatter_rows(zeros, grads, shard_index(params, ids), ascending=False), None
    return total / weight, grads, ids


def train_step(
    model: SequentialModel,
    optimizer: optax.GradientTransformation,
    config: ExperimentConfig,
    groups: tuple[LengthGroup, ...],
    loader: Loader,
    state: TrainState,
    resident: PyTree,
    payload: PyTree,
    *,
    mesh: Mesh | None = None,
    axis: Axis | None = None,
    statistics: Statistics = MappingProxyType({}),
) -> tuple[TrainState, Array]:
    """Makes one update from the mean loss of the batch's targets.

    On several devices each has its share of the batch's rows; what they exchange is one sum of the gradients, the loss
    and the weight, beside the rows of a sharded or lazily updated item table.

    Args:
      model, optimizer, config, loader: fixed for the run.
      groups: rows computed together; of packed batches, one group of rows of max_len positions.
      state: is donated when jitted.
      resident: the loader's arrays on the device.
      payload: one of the loader's, see `data.loader.Loader`.
      mesh: devices of a step on global arrays, with the item table in shards along "model"; None is one device.
      axis: name of the devices' axis under `jax.pmap`, in place of a mesh.
      statistics: {`STATISTICS`: of the model}, or nothing; they stand beside the parameters and have no gradient.

    Returns:
      The new state and the mean loss [], both on the device.
    """
    sharded = num_shards(mesh) > 1
    gradient = functools.partial(_gradient, model, config, groups, loader, sharded=sharded, statistics=statistics)
    update = functools.partial(lazy_update, optimizer, sharded=sharded)
    if mesh is None:
        gradient = functools.partial(gradient, axis=axis)
    else:
        # JAX's check of what varies over the mesh would turn away interpreted kernels. A test makes it for the others.
        local = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        params, opt_state = (partition_specs(s) if sharded else P() for s in (state.params, state.opt_state))
        dense = params if config.train.table_optimizer == "adam" else P()
        gradient = local(
            functools.partial(gradient, axis=ROW_AXES),
            in_specs=(params, P(), P(), P(), P(ROW_AXES)),
            out_specs=(P(), dense, P()),
        )
        update = local(update, in_specs=(P(), opt_state, params, P()), out_specs=(params, opt_state))
    loss, grads, ids = gradient(state.params, state.step, state.key, resident, payload)
    if ids is None:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    else:
        params, opt_state = update(grads, state.opt_state, state.params, ids)
    state = TrainState(state.step + 1, params, opt_state, state.key)
    if mesh is not None and sharded:
        state = jax.lax.with_sharding_constraint(state, shardings(mesh, state))
    return state, loss


def train_steps(
    step: Callable[..., tuple[TrainState, Array]],
    state: TrainState,
    resident: PyTree,
    payloads: tuple[PyTree, ...],
    **where: Any,
) -> tuple[TrainState, Array]:
    """Makes the updates of several batches, one after the other, without coming back to the host in between.

    Args:
      step: `train_step` with what is fixed for the run.
      state, resident: as there.
      payloads: the loader's, one per step.
      where: mesh or axis, as there.

    Returns:
      The last state and the losses [steps], both on the device.
    """
    if len(payloads) == 1:
        state, loss = step(state, resident, payloads[0], **where)
        return state, loss[None]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *payloads)
    return jax.lax.scan(lambda state, payload: step(state, resident, payload, **where), state, stacked)
