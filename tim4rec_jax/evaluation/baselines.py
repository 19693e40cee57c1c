"""Popularity as a recommender, ranked by the same rule as the models: the floor that any of them must clear."""

import numpy as np

from tim4rec_jax.data.examples import Examples
from tim4rec_jax.data.interactions import InteractionLog


def popularity_counts(log: InteractionLog, first_held_out: Examples) -> np.ndarray:
    """Counts how often each item occurs in the training part: everything before a user's first held-out event.

    Args:
      log: the cleaned log.
      first_held_out: one example a user, the earliest that is not trained on (leave-one-out: the validation examples).
        Users without one count with all their events.

    Returns:
      [v] int64, v = num_items + 1; entry 0, the padding, is 0.

    Raises:
      ValueError: for a user with two examples.
    """
    users, repeats = np.unique(first_held_out.users, return_counts=True)
    if (repeats > 1).any():
        raise ValueError(f"user {users[repeats > 1][0]} has {repeats.max()} examples; give one, the first held out")
    events = np.diff(log.offsets)
    events[first_held_out.users] = first_held_out.ends
    position = np.arange(len(log.items)) - np.repeat(log.offsets[:-1], np.diff(log.offsets))
    in_training = position < np.repeat(events, np.diff(log.offsets))
    return np.bincount(log.items[in_training], minlength=log.num_items + 1)


def popularity_ranks(
    log: InteractionLog, counts: np.ndarray, examples: Examples, *, exclude_seen: bool = False
) -> np.ndarray:
    """Ranks each example's target by popularity: rank = 1 + #{items with a strictly greater count}.

    Counts tie often; by the rule of `metrics.rank_of_target` every tie is read in the target's favour.

    Args:
      log: the cleaned log.
      counts: [v] int, from `popularity_counts`.
      examples: what to predict.
      exclude_seen: leave the items of the user's events before the target out of the ranking, the target excepted.

    Returns:
      [n] int32 in the order of `examples`.
    """
    targets = log.items[log.offsets[examples.users] + examples.ends]
    ascending = np.sort(counts[1:])
    ranks = 1 + len(ascending) - np.searchsorted(ascending, counts[targets], side="right")
    if exclude_seen:
        for row, (user, end) in enumerate(zip(examples.users, examples.ends, strict=True)):
            start = log.offsets[user]
            seen = np.unique(log.items[start : start + end])
            ranks[row] -= np.count_nonzero(counts[seen] > counts[targets[row]])
    return ranks.astype(np.int32)
