"""Loss and gradient over every position of packed rows, for models whose outputs depend on what came before only."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.softmax_cross_entropy import softmax_cross_entropy
from tim4rec_jax.config import TrainConfig
from tim4rec_jax.data.loader import PackedBatch
from tim4rec_jax.data.negatives import Negatives
from tim4rec_jax.models import SequentialModel, variables
from tim4rec_jax.training.losses import cross_entropy, sampled_cross_entropy

# Fewer at once would leave matrix products too small.
_LEAST_LOSS_POSITIONS = 256
# Up to here all scores of a piece are kept for its gradient, which saves computing them again: on one core, with 256
# positions and 12,102 items, 0.62 of the time of tiles that are computed twice.
_SCORE_BYTES = 16 * 2**20


def loss_positions(num_positions: int) -> int:
    """Returns how many positions' losses are computed at once: about an eighth, so that few without weight are."""
    return min(num_positions, max(_LEAST_LOSS_POSITIONS, -(-num_positions // 8)))


def _losses(
    hidden: Array, table: Array, targets: Array, in_tiles: bool, kernels: str | None, negatives: Negatives | None
) -> Array:
    """Softmax cross-entropy [t] of a piece."""
    if negatives is not None:
        return sampled_cross_entropy(hidden, table, targets, negatives)
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    if not in_tiles and hidden.shape[0] * table.shape[0] * wide.itemsize <= _SCORE_BYTES:
        return cross_entropy(jnp.matmul(hidden, table.T, preferred_element_type=wide), targets)
    return softmax_cross_entropy(hidden, table, targets, implementation=kernels)


def weighted_cross_entropy(
    hidden: Array, table: Array, targets: Array, weights: Array, *, in_tiles: bool = False, kernels: str | None = None,
    negatives: Negatives | None = None,
) -> tuple[Array, tuple[Array, Array]]:  # fmt: skip
    """Returns the weighted sum of the softmax cross-entropy and its gradients, computed only where weights are not 0.

      sum_t weight_t (log sum_v exp(h_t . E_v) - h_t . E_target)

    What has weight goes first and is taken piece by piece until none is left; the number of pieces is found while the
    program runs, which is why the gradients are made here and not by differentiating this function.

    Args:
      hidden: [t, d].
      table: [v, d].
      targets: int [t].
      weights: [t], float32 or wider.
      in_tiles: by `kernels.softmax_cross_entropy`; else all scores of a piece are computed at once where they are few.
      kernels: backend of that operator, or None.
      negatives: estimate the sum over v from these, see `losses.sampled_cross_entropy`; None computes it.

    Returns:
      The sum [], and its gradients by hidden [t, d] and table [v, d] in their dtypes.
    """
    num_positions = hidden.shape[0]
    piece = loss_positions(num_positions)
    order = jnp.argsort(weights == 0, stable=True)
    missing = -num_positions % piece
    sorted_inputs = tuple(
        jnp.pad(a[order], ((0, missing), *((0, 0),) * (a.ndim - 1))) for a in (hidden, targets, weights)
    )

    def loss_sum(hidden: Array, table: Array, targets: Array, weights: Array) -> Array:
        return jnp.sum(weights * _losses(hidden, table, targets, in_tiles, kernels, negatives))

    def add_piece(k: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, d_hidden, d_table = carry
        own, own_targets, own_weights = (jax.lax.dynamic_slice_in_dim(a, k * piece, piece) for a in sorted_inputs)
        value, (d_own, d_all) = jax.value_and_grad(loss_sum, argnums=(0, 1))(own, table, own_targets, own_weights)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_own, k * piece, axis=0)
        return total + value, d_hidden, d_table + d_all

    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    carry = jnp.zeros((), wide), jnp.zeros_like(sorted_inputs[0]), jnp.zeros(table.shape, wide)
    pieces = (jnp.sum(weights != 0, dtype=jnp.int32) + piece - 1) // piece
    total, d_hidden, d_table = jax.lax.fori_loop(0, pieces, add_piece, carry)
    return total, (d_hidden[jnp.argsort(order)], d_table.astype(table.dtype))


def _of_rows(
    model: SequentialModel, config: TrainConfig, params: Any, rows: PackedBatch, example_ids: Array, key: Array,
    negatives: Negatives | None, statistics: Mapping[str, Any],
) -> tuple[Array, Any]:  # fmt: skip
    """Returns the weighted sum of the rows' losses and its gradient."""
    num_rows, length = rows.items.shape

    def encode(params: Any) -> tuple[Array, Array]:
        hidden, _ = model.apply(
            variables({**params, **statistics}), rows.items, rows.timestamps, segment_ids=rows.segment_ids,
            deterministic=False, example_ids=example_ids, rngs={"dropout": key},
        )  # fmt: skip
        return hidden.reshape(num_rows * length, -1), model.apply(variables(params), method="item_table")

    (hidden, table), pull_back = jax.vjp(encode, params)
    total, gradients = weighted_cross_entropy(
        hidden, table, rows.targets.ravel(), rows.weights.ravel(), in_tiles=config.loss_in_tiles,
        kernels=model.config.kernels, negatives=negatives,
    )  # fmt: skip
    return total, pull_back(gradients)[0]


def packed_value_and_grad(
    model: SequentialModel, config: TrainConfig, params: Any, batch: PackedBatch, rows_at_once: int, key: Array,
    first_id: Array | int = 0, negatives: Negatives | None = None, statistics: Mapping[str, Any] | None = None,
) -> tuple[Array, Any]:  # fmt: skip
    """Returns the weighted sum of the cross-entropy at every position and its gradient.

    Rows are computed in microbatches; those of rows that only fill the batch, which come last, are left out.

    Args:
      model: causal, and packable.
      config: how the cross-entropy is computed.
      params: parameter tree.
      batch: [b, l].
      rows_at_once: rows of a microbatch, at least 1; bounds the memory.
      key: of the step's dropout; a row's masks follow from its place in the whole batch.
      first_id: place of the first of these rows in it.
      negatives: of the step, with the sampled cross-entropy.
      statistics: beside the parameters, as in `training.step.train_step`.
    """
    beside = statistics or {}
    num_rows = batch.items.shape[0]
    ids = first_id + jnp.arange(num_rows)
    if rows_at_once >= num_rows:
        return _of_rows(model, config, params, batch, ids, key, negatives, beside)
    missing = -num_rows % rows_at_once
    rows = jax.tree.map(lambda a: jnp.pad(a, ((0, missing), (0, 0))), batch)
    ids = jnp.pad(ids, (0, missing))

    def add_microbatch(k: Array, total: Any) -> Any:
        part = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, k * rows_at_once, rows_at_once), (rows, ids))
        return jax.tree.map(jnp.add, total, _of_rows(model, config, params, *part, key, negatives, beside))

    real = jnp.sum(jnp.any(batch.weights > 0, axis=1), dtype=jnp.int32)
    wide = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    total = (jnp.zeros((), wide), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.fori_loop(0, (real + rows_at_once - 1) // rows_at_once, add_microbatch, total)
