"""Popularity, item-to-item transitions and item neighbourhoods as recommenders, ranked by the same rule as the models.

They have nothing to train: the floor that any model must clear.
"""

from typing import Any, NamedTuple

import numpy as np

from tim4rec_jax.config import EvalConfig, ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import Examples, Split, split_log
from tim4rec_jax.evaluation.measures import list_length, metrics_of_ranks
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, SEEN_EXCLUDED, Protocol, main_protocol, measured

# What item-kNN is chosen from.
KNN_NEIGHBOURS = (10, 50, 200)
KNN_SHRINKAGES = (0.0, 10.0, 100.0, 1000.0)
# Ranks [n] float64 of the targets, in the order of the examples, under either protocol.
Ranks = dict[Protocol, np.ndarray]


def popularity_counts(log: InteractionLog, first_held_out: Examples) -> np.ndarray:
    """Counts how often each item occurs in the training part: everything before a user's first held-out event.

    Args:
      log: the cleaned log.
      first_held_out: one example a user, the earliest that is not trained on (leave-one-out: the validation examples;
        otherwise `Split.first_held_out`). Users without one count with all their events.

    Returns:
      [v] int64, v = num_items + 1; entry 0, the padding, is 0.

    Raises:
      ValueError: for a user with two examples.
    """
    return np.bincount(log.items[in_training(log, first_held_out)], minlength=log.num_items + 1)


def in_training(log: InteractionLog, first_held_out: Examples) -> np.ndarray:
    """Marks the events before a user's first held-out one; [rows] bool."""
    users, repeats = np.unique(first_held_out.users, return_counts=True)
    if (repeats > 1).any():
        raise ValueError(f"user {users[repeats > 1][0]} has {repeats.max()} examples; give one, the first held out")
    events = np.diff(log.offsets)
    events[first_held_out.users] = first_held_out.ends
    position = np.arange(len(log.items)) - np.repeat(log.offsets[:-1], np.diff(log.offsets))
    return position < np.repeat(events, np.diff(log.offsets))


def popularity_ranks(log: InteractionLog, counts: np.ndarray, examples: Examples) -> Ranks:
    """Ranks each example's target by popularity: rank = 1 + #{greater count} + #{other items of equal count} / 2.

    Counts tie often, and nothing says which of the equals comes first: this is the mean rank over all their orders, a
    multiple of 1/2, as of a model's scores (`metrics.rank_of_target`), and the metrics are those of this rank.

    Args:
      log: the cleaned log.
      counts: [v] int, from `popularity_counts`.
      examples: what to predict.

    Returns:
      Ranks among all items, and without those of the user's events before the target, the target excepted.
    """
    targets = examples.targets(log)
    ascending = np.sort(counts[1:])
    # Greater ones count once, equals half, and the target itself, which is one of the equals, is taken off.
    less, not_greater = (np.searchsorted(ascending, counts[targets], side=side) for side in ("left", "right"))
    ranks = 1 + len(ascending) - (less + not_greater + 1) / 2
    unseen = ranks.copy()
    for row, (user, end) in enumerate(zip(examples.users, examples.ends, strict=True)):
        start, target = log.offsets[user], targets[row]
        seen = np.setdiff1d(log.items[start : start + end], [target])
        unseen[row] -= _ahead(counts[seen], int(counts[target]))
    return {ALL_ITEMS: ranks, SEEN_EXCLUDED: unseen}


def _ahead(scores: np.ndarray, target_score: float) -> float:
    """Counts the items ahead of a target: those with a greater score, and half of those with an equal one."""
    return np.count_nonzero(scores > target_score) + np.count_nonzero(scores == target_score) / 2


def users_of_items(log: InteractionLog, first_held_out: Examples) -> tuple[np.ndarray, int]:
    """Counts the users that have an item in the training part, int64 [v], and the users with any; as above."""
    trained = in_training(log, first_held_out)
    users = np.repeat(np.arange(log.num_users, dtype=np.int64), np.diff(log.offsets))[trained]
    pairs = np.unique(users * (log.num_items + 1) + log.items[trained])
    counts = np.bincount(pairs % (log.num_items + 1), minlength=log.num_items + 1)
    return counts, len(np.unique(users))


class PairCounts(NamedTuple):
    """How often one item goes with another, as sparse rows.

    Attributes:
      offsets: [v + 1] int64; row i is offsets[i] : offsets[i + 1].
      items: [pairs] int32, the other items, ascending within a row.
      counts: [pairs] int64, at least 1.
    """

    offsets: np.ndarray
    items: np.ndarray
    counts: np.ndarray

    def row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items that go with `item` and how often."""
        row = slice(self.offsets[item], self.offsets[item + 1])
        return self.items[row], self.counts[row]


def popularity_metrics(log: InteractionLog, config: ExperimentConfig) -> dict[Protocol, dict[str, float]]:
    """Returns the test metrics of ranking by popularity in the training part, those that follow from ranks.

    Args:
      log: the cleaned log.
      config: reads data.split and eval.
    """
    split = split_log(log, config.data)
    parts = measured(log, split.test, config.eval)
    ranks = popularity_ranks(log, popularity_counts(log, split.first_held_out), parts[ALL_ITEMS].examples)
    return {
        name: metrics_of_ranks(ranks[name][part.kept], config.eval.measures, part.lists) for name, part in parts.items()
    }


def transition_counts(log: InteractionLog, first_held_out: Examples) -> PairCounts:
    """Counts what directly follows an item with a user in the training part; memory grows with the pairs, not with v^2.

    Args:
      log: the cleaned log.
      first_held_out: one example a user, the earliest that is not trained on, as for `popularity_counts`.

    Raises:
      ValueError: for a user with two examples.
    """
    trained = in_training(log, first_held_out)
    # The training part is a prefix of a user's events: an event in it that is no first one follows another in it.
    follows = trained[1:].copy()
    follows[log.offsets[1:-1] - 1] = False
    v = log.num_items + 1
    pairs, counts = np.unique(log.items[:-1][follows] * np.int64(v) + log.items[1:][follows], return_counts=True)
    offsets = np.searchsorted(pairs, np.arange(v + 1) * np.int64(v))
    return PairCounts(offsets, (pairs % v).astype(np.int32), counts)


def markov_ranks(log: InteractionLog, transitions: PairCounts, popularity: np.ndarray, examples: Examples) -> Ranks:
    """Ranks each example's target by a first-order Markov chain over items that backs off to popularity.

    With c_ij how often j directly follows i, n_j how often j occurs, N = max_j n_j, and i the item before the target,
    score(j | i) = c_ij + n_j / (1 + N): what followed i, the most frequent first, equals by popularity; then everything
    else by popularity. The rank is 1 + #{greater score} + #{other items of equal score} / 2, as in `popularity_ranks`.

    Args:
      log: the cleaned log.
      transitions: from `transition_counts`.
      popularity: [v] int, from `popularity_counts`.
      examples: what to predict.

    Returns:
      Ranks under either protocol, as of `popularity_ranks`.
    """
    targets = examples.targets(log)
    ranks = popularity_ranks(log, popularity, examples)[ALL_ITEMS]
    unseen = ranks.copy()
    # The equation times 1 + N, so that scores are whole numbers and ties are exact.
    scale = np.int64(1 + popularity.max())
    for row, (user, end, target) in enumerate(zip(examples.users, examples.ends, targets, strict=True)):
        history = log.items[log.offsets[user] : log.offsets[user] + end]
        followers, counts = transitions.row(history[-1])
        scores = counts * scale + popularity[followers]
        at = np.searchsorted(followers, target)
        if at < len(followers) and followers[at] == target:
            target_score = int(scores[at])
            # The target is one of its equals.
            ranks[row] = 1 / 2 + _ahead(scores, target_score)
        else:
            target_score = int(popularity[target])
            # All followers are ahead; as far as popularity puts them ahead they are in its rank already.
            ranks[row] += len(followers) - _ahead(popularity[followers], target_score)
        seen = np.setdiff1d(history, [target])
        seen_scores = popularity[seen].astype(np.int64)
        known = np.isin(seen, followers, assume_unique=True)
        seen_scores[known] = scores[np.searchsorted(followers, seen[known])]
        unseen[row] = ranks[row] - _ahead(seen_scores, target_score)
    return {ALL_ITEMS: ranks, SEEN_EXCLUDED: unseen}


def co_occurrences(log: InteractionLog, first_held_out: Examples) -> PairCounts:
    """Counts the users that have two different items in the training part; c_ij = c_ji.

    Args:
      log: the cleaned log.
      first_held_out: one example a user, the earliest that is not trained on, as for `popularity_counts`.

    Raises:
      ValueError: for a user with two examples.
    """
    v, trained = log.num_items + 1, in_training(log, first_held_out)
    users = np.repeat(np.arange(log.num_users, dtype=np.int64), np.diff(log.offsets))[trained]
    pairs = np.unique(users * v + log.items[trained])  # Each item of a user once.
    users, items = pairs // v, pairs % v
    starts = np.searchsorted(users, np.arange(log.num_users + 1)).tolist()
    by_item = users[np.argsort(items, kind="stable")].tolist()
    first = np.searchsorted(np.sort(items), np.arange(v + 1))
    others, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for item in range(1, v):
        holders = by_item[first[item] : first[item + 1]]
        had = [items[starts[user] : starts[user + 1]] for user in holders]
        found = np.bincount(np.concatenate(had), minlength=v) if had else np.zeros(v, np.int64)
        found[item] = 0
        others.append(np.flatnonzero(found).astype(np.int32))
        counts.append(found[others[-1]])
    # Item 0, the padding, goes with nothing.
    return PairCounts(np.cumsum([0, *map(len, others)]), np.concatenate(others), np.concatenate(counts))


class Neighbours(NamedTuple):
    """The items most similar to each, the nearest first; rows are filled up with item 0 at similarity 0.

    Attributes:
      items: [v, k] int32.
      similarities: [v, k] float64.
    """

    items: np.ndarray
    similarities: np.ndarray

    def nearest(self, k: int) -> "Neighbours":
        """Returns the first k of each."""
        return Neighbours(self.items[:, :k], self.similarities[:, :k])


def item_neighbours(pairs: PairCounts, users_of_item: np.ndarray, *, k: int, shrinkage: float) -> Neighbours:
    """Finds the k nearest items of each by the cosine between columns of the user-item matrix, with shrinkage.

      s_ij = c_ij / (sqrt(n_i n_j) + h),    c_ij users that have both, n_i users that have i, h the shrinkage

    Args:
      pairs: from `co_occurrences`.
      users_of_item: [v] int, from `users_of_items`.
      k: neighbours per item; of equals those of smaller id.
      shrinkage: h >= 0; the more, the less do items of few users count.

    Raises:
      ValueError: for a k under 1 or a negative shrinkage.

    Source: Sarwar et al., "Item-based collaborative filtering recommendation algorithms", WWW 2001; Deshpande and
    Karypis, "Item-based top-N recommendation algorithms", ACM TOIS 2004; the shrinkage as in Ferrari Dacrema et al.,
    "Are we really making much progress?", RecSys 2019.
    """
    if k < 1 or shrinkage < 0:
        raise ValueError(f"k={k} must be at least 1 and shrinkage={shrinkage} at least 0")
    v = len(users_of_item)
    found = Neighbours(np.zeros((v, k), np.int32), np.zeros((v, k)))
    for item in range(1, v):
        others, counts = pairs.row(item)
        similarities = counts / (np.sqrt(users_of_item[item] * users_of_item[others]) + shrinkage)
        if len(others) > k:  # Sorted are only those that are no less similar than the last.
            near = similarities >= np.partition(similarities, -k)[-k]
            others, similarities = others[near], similarities[near]
        nearest = np.argsort(-similarities, kind="stable")[:k]
        found.items[item, : len(nearest)] = others[nearest]
        found.similarities[item, : len(nearest)] = similarities[nearest]
    return found


def knn_ranks(log: InteractionLog, neighbours: Neighbours, examples: Examples) -> Ranks:
    """Ranks each example's target by its similarity to all that the user has had.

    score(j | history) = sum over the different items i of the history, j among the k nearest of i, of s_ij. The rank is
    1 + #{greater score} + #{other items of equal score} / 2, as in `popularity_ranks`; sums that differ by less than
    1e-12 of themselves are equal.

    Args:
      log: the cleaned log.
      neighbours: from `item_neighbours`.
      examples: what to predict.

    Returns:
      Ranks under either protocol, as of `popularity_ranks`.

    Source: Deshpande and Karypis, ACM TOIS 2004, section 4.
    """
    targets, v = examples.targets(log), log.num_items + 1
    ranks, unseen = np.zeros(len(targets)), np.zeros(len(targets))
    for row, (user, end, target) in enumerate(zip(examples.users, examples.ends, targets, strict=True)):
        history = np.unique(log.items[log.offsets[user] : log.offsets[user] + end])
        near, weights = neighbours.items[history].ravel(), neighbours.similarities[history].ravel()
        scores = np.bincount(near, weights, minlength=v)
        scores[np.abs(scores - scores[target]) <= 1e-12 * scores[target]] = scores[target]
        target_score = float(scores[target])
        # The target is one of its equals, and the padding is no item.
        ranks[row] = 1 / 2 + _ahead(scores[1:], target_score)
        unseen[row] = ranks[row] - _ahead(scores[history[history != target]], target_score)
    return {ALL_ITEMS: ranks, SEEN_EXCLUDED: unseen}


class KnnChoice(NamedTuple):
    """Item-kNN with the settings that validation chose.

    Attributes:
      k, shrinkage: of `item_neighbours`.
      grid: of every pair that was tried {"k": .., "shrinkage": .., metric: ..} on the validation part.
      neighbours: the chosen ones.
    """

    k: int
    shrinkage: float
    grid: list[dict[str, float]]
    neighbours: Neighbours

    def report(self) -> dict[str, Any]:
        """What a record says of the choice."""
        return {"item_knn": {"k": self.k, "shrinkage": self.shrinkage, "valid": self.grid}}


def choose_knn(log: InteractionLog, split: Split, evaluation: EvalConfig) -> KnnChoice:
    """Chooses the number of neighbours and the shrinkage of item-kNN on the validation part, of equals the first tried.

    Args:
      log: the cleaned log.
      split: the test part is not read.
      evaluation: eval.monitor decides, under the protocol of eval.exclude_seen; ndcg at the first k where that metric
        reads lists.
    """
    metric = evaluation.monitor if not list_length([evaluation.monitor]) else f"ndcg@{evaluation.top_k[0]}"
    parts = measured(log, split.valid, evaluation)
    part, pairs = parts[main_protocol(evaluation)], co_occurrences(log, split.first_held_out)
    users_of_item, _ = users_of_items(log, split.first_held_out)
    grid, chosen = [], None
    for shrinkage in KNN_SHRINKAGES:
        most = item_neighbours(pairs, users_of_item, k=max(KNN_NEIGHBOURS), shrinkage=shrinkage)
        for k in KNN_NEIGHBOURS:
            neighbours = most.nearest(k)
            ranks = knn_ranks(log, neighbours, part.examples)[part.protocol_name]
            grid.append({"k": k, "shrinkage": shrinkage, metric: metrics_of_ranks(ranks, [metric], part.lists)[metric]})
            if all(grid[-1][metric] > one[metric] for one in grid[:-1]):
                chosen = KnnChoice(k, shrinkage, grid, neighbours)
    assert chosen is not None  # The first is better than none.
    return chosen


def baseline_ranks(
    log: InteractionLog, split: Split, examples: Examples, evaluation: EvalConfig
) -> tuple[dict[str, Ranks], KnnChoice]:
    """Ranks each example's target by each baseline, from counts of the training part.

    Args:
      log: the cleaned log.
      split: of the log.
      examples: what to predict.
      evaluation: by which item-kNN is chosen, see `choose_knn`.

    Returns:
      {"Markov": ranks under either protocol, "item-kNN": .., "popularity": ..}, and the choice.

    Raises:
      ValueError: for a user with two first held-out examples.
    """
    popularity = popularity_counts(log, split.first_held_out)
    transitions, chosen = transition_counts(log, split.first_held_out), choose_knn(log, split, evaluation)
    return {
        "Markov": markov_ranks(log, transitions, popularity, examples),
        "item-kNN": knn_ranks(log, chosen.neighbours, examples),
        "popularity": popularity_ranks(log, popularity, examples),
    }, chosen
