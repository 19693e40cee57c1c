"""Hit rate, NDCG and MRR as pure functions of the rank of the one relevant item.

The ranking rule: rank = 1 + the number of items whose score is strictly greater than the target's. Items that tie with
the target do not push it down, so a tie is read in the target's favour. Column 0 of the scores is the padding and never
counts as an item. Counting baselines, whose scores do tie, give the mean rank over the orders of the equals, which may
end in a half (`evaluation.baselines`); the metrics take it as it is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def rank_of_target(scores: jax.Array, targets: jax.Array, *, excluded: jax.Array | None = None) -> jax.Array:
    """Ranks each row's target among all items: rank = 1 + #{j != 0 : score_j > score_target}.

    A target whose score is NaN gets the rank v, one behind the last item, so that it can never count as a hit.

    Args:
      scores: [b, v] float; column 0 is the padding.
      targets: [b] int, columns of the relevant items, at least 1.
      excluded: [b, v] bool, items left out of the ranking; the target itself always stays in it. None leaves none out.

    Returns:
      [b] int32, ranks from 1.
    """
    target_scores = jnp.take_along_axis(scores, targets[:, None].astype(jnp.int32), axis=1)
    better = (scores > target_scores).at[:, 0].set(False)
    if excluded is not None:
        better &= ~excluded
    ranks = 1 + better.sum(axis=1, dtype=jnp.int32)
    return jnp.where(jnp.isnan(target_scores[:, 0]), scores.shape[1], ranks).astype(jnp.int32)


def hit(ranks: np.ndarray, k: int) -> np.ndarray:
    """hit@k = 1 if rank <= k else 0, one float64 a row.

    Args:
      ranks: [n] ranks from 1, whole or in halves.
      k: length of the list.
    """
    return (np.asarray(ranks) <= k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """ndcg@k = 1 / log2(rank + 1) if rank <= k else 0, one float64 a row (one relevant item: the ideal gain is 1).

    Args:
      ranks: [n] ranks from 1, whole or in halves.
      k: length of the list.
    """
    ranks = np.asarray(ranks, np.float64)
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def mrr(ranks: np.ndarray, k: int) -> np.ndarray:
    """mrr@k = 1 / rank if rank <= k else 0, one float64 a row.

    Args:
      ranks: [n] ranks from 1, whole or in halves.
      k: length of the list.
    """
    ranks = np.asarray(ranks, np.float64)
    return np.where(ranks <= k, 1.0 / ranks, 0.0)


_BY_NAME = {"hit": hit, "ndcg": ndcg, "mrr": mrr}


def check_top_k(top_k: Sequence[int], num_items: int, setting: str = "k") -> None:
    """Refuses list lengths that no catalogue of this size can fill.

    Args:
      top_k: list lengths k.
      num_items: items of the catalogue, padding not counted.
      setting: name by which the message tells what to change.

    Raises:
      ValueError: for a k under 1 or over `num_items`, quoting both.
    """
    for k in top_k:
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        if k > num_items:
            raise ValueError(
                f"k={k} is larger than the catalogue of {num_items} items; set {setting} to at most {num_items}"
            )


def _check_ranks(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("there are no ranks to average: the evaluated part of the log has 0 examples")
    if ranks.min() < 1:
        raise ValueError(f"rank {ranks.min()} must be at least 1")
    return ranks


def summarise(ranks: np.ndarray, top_k: Sequence[int]) -> dict[str, float]:
    """Averages hit, ndcg and mrr over rows, in float64.

    Args:
      ranks: [n] ranks from 1, whole or in halves.
      top_k: list lengths k.

    Returns:
      {"hit@10": ..., "ndcg@10": ..., "mrr@10": ..., ...} for every k in the order given.

    Raises:
      ValueError: without ranks, or for a rank under 1.
    """
    ranks = _check_ranks(ranks)
    return {f"{name}@{k}": float(metric(ranks, k).mean()) for k in top_k for name, metric in _BY_NAME.items()}


def standard_errors(ranks: np.ndarray, top_k: Sequence[int]) -> dict[str, float]:
    """Standard error of each mean of `summarise`: s / sqrt(n), s^2 the unbiased variance over rows.

    Args:
      ranks: [n] ranks from 1, whole or in halves.
      top_k: list lengths k.

    Raises:
      ValueError: for fewer than 2 ranks, of which no spread can be told.
    """
    ranks = _check_ranks(ranks)
    if ranks.size < 2:
        raise ValueError(f"a standard error needs at least 2 ranks, got {ranks.size}")
    return {
        f"{name}@{k}": float(metric(ranks, k).std(ddof=1) / np.sqrt(ranks.size))
        for k in top_k
        for name, metric in _BY_NAME.items()
    }
