"""Losses of next-item prediction, one value an example."""

import jax
import jax.numpy as jnp
from jax import Array

from tim4rec_jax.data.negatives import Negatives


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


def sample_negative(key: Array, target: Array, vocab_size: int) -> Array:
    """Draws one item uniformly from 1 to vocab_size - 1 without the target.

    Args:
      key: PRNG key.
      target: int [], the item that must not be drawn.
      vocab_size: rows of the embedding, at least 3.

    Raises:
      ValueError: for a smaller vocabulary.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size={vocab_size} must be at least 3: the padding row, the target and another item")
    draw = jax.random.randint(key, (), 1, vocab_size - 1)
    return jnp.where(draw >= target, draw + 1, draw)
