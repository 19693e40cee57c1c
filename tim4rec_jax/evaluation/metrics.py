"""Metrics of ranked lists, from the ranks of what is relevant and from the items at the top.

The ranking rule: rank = 1 + the number of items of greater score + half the number of others of the target's own score,
which is the mean rank over all orders of the equals and may end in a half; the metrics take it as it is. A model's
scores hardly ever tie, and then this is the rank of RecBole's protocol. Where they do, as all do after a hidden state
of 0, the target is no better than any other of the equals. Column 0 of the scores is the padding and never counts as an
item.

A list is made before a target, and that is all that is relevant to it: recall@k is then hit@k, map@k is mrr@k, and
precision@k is hit@k / k. Where one list is made for several targets of a user (eval.lists="user"), `lists` says which
ranks belong together, and the metrics are those of RecTools and ranx: with R the relevant items of a list and r_1 < r_2
< .. their ranks. Relevant items of equal rank stand around it, one behind the other.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.parallel.item_table import halves_ahead


def rank_of_target(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Ranks each row's target among all items: 1 + #{j : score_j > score_target} + #{j : score_j = score_target} / 2.

    j runs over the items but the padding and the target. A target whose score is NaN gets the rank v, one behind the
    last item, so that it can never count as a hit.

    Args:
      scores: [b, v] float; column 0 is the padding.
      targets: [b] int, columns of the relevant items, at least 1.

    Returns:
      [b] float32, ranks from 1, multiples of 1/2 (exact for fewer than 2**23 items).
    """
    target_scores = jnp.take_along_axis(scores, targets[:, None].astype(jnp.int32), axis=1)
    # The target ties with itself: a half that is none of another item.
    halves = halves_ahead(scores, target_scores).at[:, 0].set(0).sum(axis=1, dtype=jnp.int32) - 1
    return jnp.where(jnp.isnan(target_scores[:, 0]), scores.shape[1], 1 + halves / 2).astype(jnp.float32)


def ahead_among(scores: jax.Array, targets: jax.Array, items: jax.Array) -> jax.Array:
    """Counts listed items ahead of each row's target: #{j : score_j > score_target} + #{j : equal} / 2.

    j runs over the listed items but the target: its rank among what is not listed, itself always with it, is
    `rank_of_target` less this.

    Args:
      scores: [b, v] float.
      targets: [b] int.
      items: [b, s] int, each item of a row once, 0 for none.

    Returns:
      [b] float32, multiples of 1/2.
    """
    targets = targets[:, None].astype(jnp.int32)
    halves = halves_ahead(jnp.take_along_axis(scores, items, axis=1), jnp.take_along_axis(scores, targets, axis=1))
    halves = jnp.where((items > 0) & (items != targets), halves, 0).sum(axis=1, dtype=jnp.int32)
    return (halves / 2).astype(jnp.float32)


def _places(ranks: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the ranks of each list upwards and distinct, which of the list's each is (from 1), and where lists begin.

    Args:
      ranks: [t] ranks from 1.
      lists: [t] which list each is of, ascending.
    """
    starts = np.flatnonzero(np.diff(lists, prepend=lists[:1] - 1))
    sizes = np.diff(np.append(starts, len(lists)))
    ordered = np.asarray(ranks, np.float64)[np.lexsort((ranks, lists))]
    nth = np.arange(len(lists)) - np.repeat(starts, sizes) + 1.0
    # Two that tie with each other alone have rank g + 1.5 and stand at g + 1 and g + 2.
    list_of = np.repeat(np.arange(len(starts)), sizes)
    differs = (np.diff(ordered, prepend=-1) != 0) | (np.diff(list_of, prepend=-1) != 0)
    equals = np.diff(np.flatnonzero(differs), append=len(lists))
    behind = ordered - np.repeat((equals - 1) / 2, equals) - nth
    # r_i = i + max over j <= i of (r_j - j) within each list; a step that no rank reaches keeps lists apart.
    apart = list_of * (ordered.max(initial=0) + len(lists) + 1)
    return nth + np.maximum.accumulate(np.maximum(behind, 0) + apart) - apart, nth, starts


def hit(ranks: np.ndarray, k: int, lists: np.ndarray | None = None) -> np.ndarray:
    """hit@k = 1 if r_1 <= k else 0, one float64 per list.

    Args:
      ranks: [t] ranks from 1, whole or in halves.
      k: length of the list.
      lists: [t] int, which list each rank is of, ascending; None: each is of its own.
    """
    found = (np.asarray(ranks) <= k).astype(np.float64)
    return found if lists is None else np.minimum(_found(ranks, k, lists)[0], 1.0)


def _found(ranks: np.ndarray, k: int, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many relevant items of each list stand among its first k, and how many there are."""
    places, _, starts = _places(ranks, lists)
    return np.add.reduceat((places <= k).astype(np.float64), starts), np.diff(np.append(starts, len(lists)))


def recall(ranks: np.ndarray, k: int, lists: np.ndarray | None = None) -> np.ndarray:
    """recall@k = #{i : r_i <= k} / |R|, one float64 per list; arguments as of `hit`."""
    if lists is None:
        return hit(ranks, k)
    found, relevant = _found(ranks, k, lists)
    return found / relevant


def precision(ranks: np.ndarray, k: int, lists: np.ndarray | None = None) -> np.ndarray:
    """precision@k = #{i : r_i <= k} / k, one float64 per list; arguments as of `hit`."""
    return (hit(ranks, k) if lists is None else _found(ranks, k, lists)[0]) / k


def ndcg(ranks: np.ndarray, k: int, lists: np.ndarray | None = None) -> np.ndarray:
    """ndcg@k = sum over r_i <= k of 1 / log2(r_i + 1) by sum over i <= min(|R|, k) of 1 / log2(i + 1); one per list.

    With one relevant item: 1 / log2(rank + 1) if rank <= k else 0. Arguments as of `hit`; float64.
    """
    if lists is None:
        ranks = np.asarray(ranks, np.float64)
        return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)
    places, nth, starts = _places(ranks, lists)
    gains, ideal = (np.add.reduceat(np.where(of <= k, 1.0 / np.log2(of + 1.0), 0.0), starts) for of in (places, nth))
    return gains / ideal


def mrr(ranks: np.ndarray, k: int, lists: np.ndarray | None = None) -> np.ndarray:
    """mrr@k = 1 / r_1 if r_1 <= k else 0, one float64 per list; arguments as of `hit`."""
    firsts = np.asarray(ranks, np.float64)
    if lists is not None:
        places, _, starts = _places(ranks, lists)
        firsts = places[starts]
    return np.where(firsts <= k, 1.0 / firsts, 0.0)


def mean_average_precision(ranks: np.ndarray, k: int, lists: np.ndarray | None = None) -> np.ndarray:
    """map@k, of one list: sum over r_i <= k of i / r_i, by |R|; one float64 per list; arguments as of `hit`."""
    if lists is None:
        return mrr(ranks, k)
    places, nth, starts = _places(ranks, lists)
    sizes = np.diff(np.append(starts, len(lists)))
    return np.add.reduceat(np.where(places <= k, nth / places, 0.0), starts) / sizes


def novelty(items: np.ndarray, information: np.ndarray) -> np.ndarray:
    """Mean self-information of what is listed: -1/k sum_i log2(users(i) / users), one float64 per list.

    Args:
      items: int [n, k], 0 where a list is shorter.
      information: float64 [v], see `self_information`.

    Source: Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender systems", PNAS 2010; as
    RecTools' MeanInvUserFreq.
    """
    there = items > 0
    return np.where(there, information[items], 0.0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)


def self_information(users_of_item: np.ndarray, num_users: int) -> np.ndarray:
    """-log2(users(i) / users) of every item; one without a training event counts as one that a single user had.

    Args:
      users_of_item: int [v], users that have the item in the training part.
      num_users: users with a training event.
    """
    return -np.log2(np.maximum(users_of_item, 1) / max(num_users, 1))


def diversity(items: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Intra-list diversity: the mean over pairs of listed items of 1 - cos(e_i, e_j), one float64 per list.

    0 for a list of fewer than 2 items. With unit vectors u, the sum over pairs of cosines is (|sum_i u_i|^2 - sum_i
    |u_i|^2) / 2: no distances of pairs are held.

    Args:
      items: int [n, k], 0 where a list is shorter.
      directions: float64 [v, d], the items' embeddings in the model at length 1; zeros stay zeros.

    Source: Ziegler et al., "Improving recommendation lists through topic diversification", WWW 2005; as RecTools'
    IntraListDiversity with that distance. The embeddings are the measured model's own: compare by it its versions
    rather than different models.
    """
    there = items > 0
    listed = there.sum(axis=1)
    sums, squares = np.zeros((len(items), directions.shape[1])), np.zeros(len(items))
    for column, inside in zip(items.T, there.T, strict=True):
        vectors = directions[column] * inside[:, None]
        sums += vectors
        squares += (vectors * vectors).sum(axis=1)
    cosines = (np.einsum("nd,nd->n", sums, sums) - squares) / 2
    pairs = listed * (listed - 1) / 2
    return np.where(pairs > 0, 1 - cosines / np.maximum(pairs, 1), 0.0)


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


def checked_ranks(ranks: np.ndarray) -> np.ndarray:
    """Returns ranks as an array.

    Raises:
      ValueError: there are none, or one is under 1.
    """
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("there are no ranks to average: the evaluated part of the log has 0 examples")
    if ranks.min() < 1:
        raise ValueError(f"rank {ranks.min()} must be at least 1")
    return ranks
