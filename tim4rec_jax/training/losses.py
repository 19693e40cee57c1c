"""Losses of next-item prediction, one value per target, and their weighted sum over many positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.products import matmul
from kernels.softmax_cross_entropy import softmax_cross_entropy
from tim4rec_jax.data.negatives import Negatives

# Fewer at once would leave matrix products too small.
_LEAST_LOSS_POSITIONS = 256
# Up to here all scores of a piece are kept for its gradient, which saves computing them again: on one core, with 256
# positions and 12,102 items, 0.62 of the time of tiles that are computed twice.
_SCORE_BYTES = 16 * 2**20


def cross_entropy(scores: Array, targets: Array) -> Array:
    """Softmax cross-entropy over all rows of the embedding, row 0 (padding) included as in the original program.

      loss = log sum_v exp(score_v) - score_target

    Args:
      scores: [b, v]; the arithmetic is float32 or wider.
      targets: int [b].

    Returns:
      [b].
    """
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    at_target = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - at_target


def sampled_cross_entropy(hidden: Array, table: Array, targets: Array, negatives: Negatives) -> Array:
    """Softmax cross-entropy with the sum over the catalogue estimated from the target and a sample.

      loss = log(exp(s_target) + sum_{j, n_j != target} exp(s_{n_j} - log(m q(n_j)))) - s_target,    s = E h

    Each term is divided by how often it is expected: the target is there once for certain, an item n among m draws
    m q(n) times. So the sum is without bias that over all items but the padding, whatever q is; a negative that is the
    target is left out, for the target is in the sum already. After Bengio & Senecal 2008 (IEEE TNN 19:4) and Jean et
    al. 2015 (arXiv 1412.2007).

    Args:
      hidden: [b, d]; the scores are float32 or wider.
      table: [v, d].
      targets: int [b].
      negatives: m items and the logarithms of m q.

    Returns:
      [b].
    """
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    at_target = jnp.einsum("bd,bd->b", hidden, table[targets], preferred_element_type=wide)
    scores = jnp.matmul(hidden, table[negatives.items].T, preferred_element_type=wide)
    hits = negatives.items == targets[:, None]
    scores = jnp.where(hits, -jnp.inf, scores - negatives.log_expected.astype(wide))
    return jax.nn.logsumexp(jnp.concatenate([at_target[:, None], scores], axis=1), axis=1) - at_target


BPR_GAMMA = 1e-10


def bpr(positive: Array, negative: Array) -> Array:
    """Bayesian personalised ranking (Rendle et al. 2009), with RecBole's guard inside the logarithm.

      loss = -log(1e-10 + sigmoid(positive - negative))

    Args:
      positive: [b] scores of the targets.
      negative: [b] scores of the sampled negatives.

    Returns:
      [b].
    """
    return -jnp.log(BPR_GAMMA + jax.nn.sigmoid(positive - negative))


def sample_negatives(key: Array, target: Array, num: int, vocab_size: int) -> Array:
    """Draws items uniformly, with replacement, from 1 to vocab_size - 1 without the target.

    Args:
      key: PRNG key.
      target: int [], the item that must not be drawn.
      num: m, how many.
      vocab_size: rows of the embedding, at least 3.

    Returns:
      int [m].

    Raises:
      ValueError: for a smaller vocabulary.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size={vocab_size} must be at least 3: the padding row, the target and another item")
    draw = jax.random.randint(key, (num,), 1, vocab_size - 1)
    return jnp.where(draw >= target, draw + 1, draw)


def sample_negative(key: Array, target: Array, vocab_size: int) -> Array:
    """Draws one item as `sample_negatives` does, int []."""
    return sample_negatives(key, target, 1, vocab_size)[0]


def binary_cross_entropy(positive: Array, negative: Array, beta: float = 1.0) -> Array:
    """Binary cross-entropy of a target and m sampled negatives; with beta < 1 the generalised one (gBCE).

      loss = -(beta log sigmoid(positive) + sum_j log(1 - sigmoid(negative_j))) / (m + 1)

    With beta 1 this is SASRec's loss (Kang & McAuley 2018, arXiv 1808.09781), which sums where this takes the mean.
    gBCE: Petrov & Macdonald, "gSASRec", RecSys 2023, arXiv 2308.07192; beta as of `gbce_beta`.

    Args:
      positive: [b] scores of the targets.
      negative: [b, m] scores of their negatives.
      beta: power of the target's probability, in (0, 1].

    Returns:
      [b].
    """
    told_apart = jax.nn.log_sigmoid(-negative).sum(axis=1)
    return -(beta * jax.nn.log_sigmoid(positive) + told_apart) / (negative.shape[1] + 1)


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """The power of gBCE: beta = alpha (t (1 - 1/alpha) + 1/alpha), alpha = m / (items - 1) being the share sampled.

    Args:
      num_negatives: m, at least 1 and at most items - 1.
      num_items: of the catalogue.
      t: calibration, in [0, 1]: 0 is the plain binary cross-entropy (beta 1), 1 makes probabilities those of a softmax
        (beta alpha).
    """
    alpha = num_negatives / (num_items - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def target_and_negative_scores(
    hidden: Array, table: Array, targets: Array, keys: Array, num: int, vocab_size: int
) -> tuple[Array, Array]:
    """Scores of each target, and of m items that are drawn for it alone, uniformly among all others.

    Args:
      hidden: [b, d]; the scores are float32 or wider.
      table: [rows, d].
      targets: int [b].
      keys: [b] PRNG keys.
      num: m.
      vocab_size: v, at least 3; rows beyond it are no items.

    Returns:
      [b], and [b, m].
    """
    draw = jax.vmap(lambda key, target: sample_negatives(key, target, num, vocab_size))
    items = jnp.concatenate([targets[:, None], draw(keys, targets)], axis=1)
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    if (num + 1) * table.shape[1] > table.shape[
        0
    ]:  # A row of all scores is smaller than the embeddings of those asked.
        scores = jnp.matmul(hidden, table.T, preferred_element_type=wide)
        scores = jnp.take_along_axis(scores, items, axis=1)
    else:
        scores = jnp.einsum("bd,bmd->bm", hidden, table[items], preferred_element_type=wide)
    return scores[:, 0], scores[:, 1:]


def loss_positions(num_positions: int) -> int:
    """Returns how many positions' losses are computed at once: about an eighth, so that few without weight are."""
    return min(num_positions, max(_LEAST_LOSS_POSITIONS, -(-num_positions // 8)))


def softmax_losses(
    hidden: Array, table: Array, targets: Array, in_tiles: bool, kernels: str | None, negatives: Negatives | None
) -> Array:
    """Softmax cross-entropy [t] of a piece of positions; arguments as of `weighted_cross_entropy`."""
    if negatives is not None:
        return sampled_cross_entropy(hidden, table, targets, negatives)
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    if not in_tiles and hidden.shape[0] * table.shape[0] * wide.itemsize <= _SCORE_BYTES:
        return cross_entropy(matmul(hidden, table.T, wide), targets)
    return softmax_cross_entropy(hidden, table, targets, implementation=kernels)


def seen_log_sums(
    hidden: Array, table: Array, items: Array, segment_ids: Array | None, targets: Array
) -> tuple[Array, Array]:
    """Sums exp of the scores of what each position has seen, and tells whether its target is among that.

      A_i = sum over the distinct items v of x_1 .. x_i of exp(h_i . E_v)

    One product [l, l] per row, like attention's: an item counts at its first place in its history.

    Args:
      hidden: [b, l, d].
      table: [v, d].
      items: int [b, l], x, 0 for padding.
      segment_ids: int [b, l], which history of its row a position belongs to; None for one per row.
      targets: int [b, l].

    Returns:
      log A [b, l], float32 or wider, and whether the target was seen, bool [b, l]. Padding has values of no meaning.
    """
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    scores = jnp.einsum("bid,bjd->bij", hidden, table[items], preferred_element_type=wide)
    read = jnp.tri(items.shape[1], dtype=bool)[None] & (items != 0)[:, None, :]
    if segment_ids is not None:
        read &= segment_ids[:, :, None] == segment_ids[:, None, :]
    repeats = jnp.any(read & (items[:, :, None] == items[:, None, :]) & ~jnp.eye(items.shape[1], dtype=bool), axis=2)
    counted = (read & ~repeats[:, None, :]) | (items == 0)[:, :, None]
    log_sums = jax.nn.logsumexp(jnp.where(counted, scores, -jnp.inf), axis=2)
    return log_sums, jnp.any(read & (items[:, None, :] == targets[:, :, None]), axis=2)


def with_seen_bias(losses: Array, at_target: Array, log_seen: Array, target_seen: Array, bias: Array) -> Array:
    """Turns softmax cross-entropies of scores s into those of s_v + w [v seen], exactly.

      log(Z + (e^w - 1) A) - s_target - w [target seen],    Z = sum_v e^{s_v},    A = sum over seen v of e^{s_v}

    Args:
      losses: [t], log Z - s_target.
      at_target: [t], s_target.
      log_seen: [t], log A.
      target_seen: bool [t].
      bias: [], w.

    Returns:
      [t].
    """
    share = jnp.exp(jnp.minimum(log_seen - losses - at_target, 0))  # Rounding alone makes A larger than Z.
    return losses + jnp.log1p(jnp.expm1(bias) * share) - jnp.where(target_seen, bias, 0)


def weighted_cross_entropy(
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
    *,
    in_tiles: bool = False,
    kernels: str | None = None,
    negatives: Negatives | None = None,
) -> tuple[Array, tuple[Array, Array]]:
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

    def losses(hidden: Array, table: Array, targets: Array, index: Array) -> Array:
        return softmax_losses(hidden, table, targets, in_tiles, kernels, negatives)

    return weighted_losses(losses, hidden, table, targets, weights)


def weighted_losses(
    losses: Callable[[Any, Any, Array, Array], Array], own: Any, shared: Any, targets: Array, weights: Array
) -> tuple[Array, tuple[Any, Any]]:
    """Does for any loss what `weighted_cross_entropy` does for its own.

    Args:
      losses: of `own` of p positions, `shared`, targets [p] and their indices among all t, one loss each [p].
      own: tree of arrays [t, ..] that each position has for itself, such as hidden.
      shared: tree of arrays that all positions read, such as the table.
      targets, weights: as there.

    Returns:
      The sum [], and its gradients by `own` and `shared`.
    """
    num_positions = targets.shape[0]
    piece = loss_positions(num_positions)
    order = jnp.argsort(weights == 0, stable=True)
    missing = -num_positions % piece

    def in_order(a: Array) -> Array:
        return jnp.pad(a[order], ((0, missing), *((0, 0),) * (a.ndim - 1)))

    sorted_own = jax.tree.map(in_order, own)
    sorted_rest = tuple(in_order(a) for a in (targets, weights, jnp.arange(num_positions)))

    def loss_sum(own: Any, shared: Any, targets: Array, weights: Array, index: Array) -> Array:
        return jnp.sum(weights * losses(own, shared, targets, index))

    def add_piece(k: Array, carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
        total, d_own, d_shared = carry
        piece_own, rest = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, k * piece, piece), (sorted_own, sorted_rest)
        )
        value, (d_piece, d_all) = jax.value_and_grad(loss_sum, argnums=(0, 1))(piece_own, shared, *rest)
        d_own = jax.tree.map(
            lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, k * piece, axis=0), d_own, d_piece
        )
        return total + value, d_own, jax.tree.map(jnp.add, d_shared, d_all)

    def wide(a: Array) -> Any:
        return jnp.promote_types(jnp.float32, a.dtype)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a)), shared)
    total = jnp.zeros((), jnp.result_type(*map(wide, jax.tree.leaves(own))))
    carry = total, jax.tree.map(jnp.zeros_like, sorted_own), zeros
    pieces = (jnp.sum(weights != 0, dtype=jnp.int32) + piece - 1) // piece
    total, d_own, d_shared = jax.lax.fori_loop(0, pieces, add_piece, carry)
    back = jnp.argsort(order)
    d_own = jax.tree.map(lambda a: a[back], d_own)
    return total, (d_own, jax.tree.map(lambda a, like: a.astype(like.dtype), d_shared, shared))
