"""Items that the targets of a step are told from, drawn from a fixed distribution over the catalogue."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Weights are whole numbers of about this sum, so that int32 holds any running sum and every q is known exactly.
_TOTAL_WEIGHT = 2**30


@flax.struct.dataclass
class Negatives:
    """Items drawn with replacement, the same for all targets of a step.

    Attributes:
      items: int32 [m], 1 and up.
      log_expected: float32 or wider [m], log(m q(item)): how often each is expected among the m.
    """

    items: Array
    log_expected: Array


@flax.struct.dataclass
class Proposal:
    """The distribution q that negatives are drawn from; every item has q > 0 and the padding none.

    Attributes:
      bounds: int32 [v] running sums of the items' weights: q(i) = (bounds[i] - bounds[i - 1]) / bounds[v - 1]. None is
        the uniform distribution.
      vocab_size: v, at least 2.
    """

    bounds: Array | np.ndarray | None
    vocab_size: int = flax.struct.field(pytree_node=False)


def make_proposal(counts: np.ndarray, power: float) -> Proposal:
    """Returns the distribution that draws items by their frequency, flattened.

      q(i) proportional to max(count_i, 1)^power

    Power 0 is uniform, 1 the frequency itself, 3/4 as of word2vec (Mikolov et al. 2013, arXiv 1310.4546).

    Args:
      counts: int [v], how often each item is a target; entry 0, the padding, is not read.
      power: 0 to 1.

    Raises:
      ValueError: for a catalogue without items, or of more than int32 running sums can hold.
    """
    vocab_size = len(counts)
    if not 2 <= vocab_size <= _TOTAL_WEIGHT:
        raise ValueError(
            f"vocab_size={vocab_size} must lie between 2, the padding row and one item, and {_TOTAL_WEIGHT}"
        )
    if power == 0:
        return Proposal(None, vocab_size)
    shares = np.maximum(counts[1:], 1).astype(np.float64) ** power
    weights = np.maximum(np.rint(shares * (_TOTAL_WEIGHT / shares.sum())), 1)
    return Proposal(np.concatenate([[0], np.cumsum(weights)]).astype(np.int32), vocab_size)


def draw_negatives(proposal: Proposal, key: Array, num: int) -> Negatives:
    """Draws items independently of each other, by bisection of the running sums: O(log v) per draw.

    Args:
      proposal: on the device.
      key: PRNG key.
      num: m, at least 1.
    """
    if proposal.bounds is None:
        items = jax.random.randint(key, (num,), 1, proposal.vocab_size)
        log_expected = jnp.full(num, np.log(num / (proposal.vocab_size - 1)))
        return Negatives(items.astype(jnp.int32), log_expected)
    bounds = jnp.asarray(proposal.bounds)
    draws = jax.random.randint(key, (num,), 0, bounds[-1], bounds.dtype)
    items = jnp.searchsorted(bounds, draws, side="right").astype(jnp.int32)
    weights = bounds[items] - bounds[items - 1]
    return Negatives(items, jnp.log(weights) - jnp.log(bounds[-1]) + np.log(num))
