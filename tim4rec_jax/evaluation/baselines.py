"""Popularity and item-to-item transitions as recommenders, ranked by the same rule as the models.

They have nothing to train: the floor that any model must clear.
"""

from typing import NamedTuple

import numpy as np

from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import Examples, split_log
from tim4rec_jax.evaluation.measures import metrics_of_ranks
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, SEEN_EXCLUDED, Protocol, measured

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
    multiple of 1/2, and the metrics are those of this rank. (A model's scores do not tie; `metrics.rank_of_target`
    reads ties in the target's favour.)

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


def _ahead(scores: np.ndarray, target_score: int) -> float:
    """Counts the items ahead of a target: those with a greater score, and half of those with an equal one."""
    return np.count_nonzero(scores > target_score) + np.count_nonzero(scores == target_score) / 2


def users_of_items(log: InteractionLog, first_held_out: Examples) -> tuple[np.ndarray, int]:
    """Counts the users that have an item in the training part, int64 [v], and the users with any; as above."""
    trained = in_training(log, first_held_out)
    users = np.repeat(np.arange(log.num_users, dtype=np.int64), np.diff(log.offsets))[trained]
    pairs = np.unique(users * (log.num_items + 1) + log.items[trained])
    counts = np.bincount(pairs % (log.num_items + 1), minlength=log.num_items + 1)
    return counts, len(np.unique(users))


class Transitions(NamedTuple):
    """How often one item directly follows another, as sparse rows; row i holds what followed item i.

    Attributes:
      offsets: [v + 1] int64; row i is offsets[i] : offsets[i + 1].
      items: [pairs] int32, the following items, ascending within a row.
      counts: [pairs] int64, at least 1.
    """

    offsets: np.ndarray
    items: np.ndarray
    counts: np.ndarray

    def row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items that followed `item` and how often."""
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


def transition_counts(log: InteractionLog, first_held_out: Examples) -> Transitions:
    """Counts pairs of consecutive events of a user in the training part; memory grows with the pairs, not with v^2.

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
    return Transitions(offsets, (pairs % v).astype(np.int32), counts)


def markov_ranks(log: InteractionLog, transitions: Transitions, popularity: np.ndarray, examples: Examples) -> Ranks:
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


def baseline_ranks(log: InteractionLog, first_held_out: Examples, examples: Examples) -> dict[str, Ranks]:
    """Ranks each example's target by either baseline, from counts of the training part.

    Args:
      log: the cleaned log.
      first_held_out: one example a user, the earliest that is not trained on, as for `popularity_counts`.
      examples: what to predict.

    Returns:
      {"Markov": ranks under either protocol, "popularity": ...}.

    Raises:
      ValueError: for a user with two first held-out examples.
    """
    popularity = popularity_counts(log, first_held_out)
    transitions = transition_counts(log, first_held_out)
    return {
        "Markov": markov_ranks(log, transitions, popularity, examples),
        "popularity": popularity_ranks(log, popularity, examples),
    }
