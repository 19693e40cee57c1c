"""Targets that their users have had before, where seen items are left out of the ranking.

A recommender that leaves out what was seen never names such a target. Ranked among the unseen items alone, as if it
were one of them, it would come out far ahead.
"""

from typing import NamedTuple

import numpy as np

from tim4rec_jax.config import EvalConfig, ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import Examples, describe


class Measured(NamedTuple):
    """What of an evaluated part is ranked.

    Attributes:
      examples: those to rank, in the order given.
      lists: int [n] which list each is of, ascending; None: each has its own.
      seen: how many targets were seen before, of all `total`; None where seen items stay in the ranking.
      total: all examples of the part.
    """

    examples: Examples
    lists: np.ndarray | None
    seen: int | None
    total: int

    def report(self) -> dict[str, float]:
        """What a record says of the part: {"seen_target_share": ..}, or nothing where seen items stay."""
        return {} if self.seen is None else {"seen_target_share": self.seen / self.total}

    def protocol(self, config: ExperimentConfig, split: str = "test") -> str:
        """Says how the part `split` was cut off and ranked under an experiment's settings."""
        seen = describe_seen(config.eval, self.report().get("seen_target_share"))
        lists = ", one list per user for all its targets" if config.eval.lists == "user" else ""
        return f"full ranking of the {split} part{lists}, {describe(config.data)}, seen items {seen}"


def describe_seen(evaluation: EvalConfig, share: float | None = None) -> str:
    """Says in a table's words what becomes of seen items and targets.

    Args:
      evaluation: reads exclude_seen and seen_targets.
      share: of the targets that were seen, or None where it is not known.
    """
    if not evaluation.exclude_seen:
        return "not excluded"
    fate = "left out" if evaluation.seen_targets == "leave_out" else "ranked all the same"
    return f"excluded; seen targets{'' if share is None else f' ({share:.1%} of all)'} {fate}"


def were_seen(log: InteractionLog, examples: Examples) -> np.ndarray:
    """Tells which targets occur among the events that they are predicted from; bool [n].

    Args:
      log: the cleaned log.
      examples: what is predicted.
    """
    users = np.repeat(np.arange(log.num_users, dtype=np.int64), np.diff(log.offsets))
    pairs = users * (log.num_items + 1) + log.items
    # The first event of each pair of user and item; later ones repeat it.
    _, first, which = np.unique(pairs, return_index=True, return_inverse=True)
    return first[which[examples.target_rows(log)]] < log.offsets[examples.users] + examples.ends


def measured(log: InteractionLog, examples: Examples, evaluation: EvalConfig) -> Measured:
    """Chooses the examples that are ranked: all, or with exclude_seen those whose target is new to the user.

    With eval.lists="user", a user's targets are predicted together, from what it had before the first of them.

    Args:
      log: the cleaned log.
      examples: an evaluated part of it.
      evaluation: reads lists, exclude_seen and seen_targets.

    Raises:
      ValueError: every target was seen, so that nothing is left.
    """
    if evaluation.lists == "user":
        examples = examples.one_list_per_user(log)
    count, seen = len(examples), None
    if evaluation.exclude_seen:
        seen = were_seen(log, examples)
        if evaluation.seen_targets == "leave_out":
            if count and seen.all():
                raise ValueError(
                    f"eval.exclude_seen: all {count} targets were seen before by their users, and none is left to "
                    "rank; set eval.seen_targets=rank, or do not exclude seen items"
                )
            examples = examples.where(~seen)
    lists = examples.users if evaluation.lists == "user" else None
    return Measured(examples, lists, None if seen is None else int(np.count_nonzero(seen)), count)
