"""The two ways to rank, with all items and with those of the history left out, and targets that were seen before.

Both follow from one set of scores, and either is measured wherever the other is. A recommender that leaves out what was
seen never names a target that its user has had before. Ranked among the unseen items alone, as if it were one of them,
such a target would come out far ahead.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from tim4rec_jax.config import EvalConfig, ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import Examples, describe

Protocol = Literal["all_items", "seen_excluded"]
ALL_ITEMS: Protocol = "all_items"
SEEN_EXCLUDED: Protocol = "seen_excluded"
PROTOCOLS: tuple[Protocol, Protocol] = (ALL_ITEMS, SEEN_EXCLUDED)
# As tables head them.
TITLES: dict[str, str] = {ALL_ITEMS: "all items", SEEN_EXCLUDED: "seen excluded"}


def main_protocol(evaluation: EvalConfig) -> Protocol:
    """Returns the protocol of eval.monitor and of what records call "valid" and "test"."""
    return SEEN_EXCLUDED if evaluation.exclude_seen else ALL_ITEMS


def other_protocol(evaluation: EvalConfig) -> Protocol:
    """Returns the protocol that is measured beside it; its name follows "valid_" and "test_" in records."""
    return ALL_ITEMS if evaluation.exclude_seen else SEEN_EXCLUDED


def by_protocol(values: Mapping[str, Any], part: str, evaluation: EvalConfig) -> dict[Protocol, Any]:
    """Returns what a record says of a part under either protocol, as far as it says it; earlier ones say one.

    Args:
      values: such as results.json, with "test" and "test_seen_excluded", or "test_all_items".
      part: such as "test".
      evaluation: that it was measured by.
    """
    names = {main_protocol(evaluation): part, other_protocol(evaluation): f"{part}_{other_protocol(evaluation)}"}
    return {protocol: values[names[protocol]] for protocol in PROTOCOLS if names[protocol] in values}


class Measured(NamedTuple):
    """What of an evaluated part is ranked under one protocol.

    Attributes:
      examples: those to rank, in the order given.
      lists: int [n] which list each is of, ascending; None: each has its own.
      kept: bool [total], which they are of the part.
      seen: how many targets were seen before, of all `total`.
      total: all examples of the part.
      protocol_name: of `PROTOCOLS`.
    """

    examples: Examples
    lists: np.ndarray | None
    kept: np.ndarray
    seen: int
    total: int
    protocol_name: Protocol

    def report(self) -> dict[str, float]:
        """What a record says of the part."""
        return {"seen_target_share": self.seen / self.total}

    def protocol(self, config: ExperimentConfig, split: str = "test") -> str:
        """Says how the part `split` was cut off and ranked under an experiment's settings."""
        seen = describe_seen(config.eval, self.protocol_name, self.seen / self.total)
        lists = ", one list per user for all its targets" if config.eval.lists == "user" else ""
        return f"full ranking of the {split} part{lists}, {describe(config.data)}, seen items {seen}"


def describe_seen(evaluation: EvalConfig, protocol: Protocol, share: float | None = None) -> str:
    """Says in a table's words what becomes of seen items and targets.

    Args:
      evaluation: reads seen_targets.
      protocol: of `PROTOCOLS`.
      share: of the targets that were seen, or None where it is not known.
    """
    if protocol == ALL_ITEMS:
        return "not excluded"
    fate = "left out" if evaluation.seen_targets == "leave_out" else "ranked all the same"
    return f"excluded; seen targets{'' if share is None else f' ({share:.1%} of all)'} {fate}"


def first_rows(log: InteractionLog) -> np.ndarray:
    """Returns for every event the row of its user's first event with that item, its own where it is that; int64 [rows].

    Args:
      log: the cleaned log.
    """
    users = np.repeat(np.arange(log.num_users, dtype=np.int64), np.diff(log.offsets))
    _, first, which = np.unique(users * (log.num_items + 1) + log.items, return_index=True, return_inverse=True)
    return first[which]


def new_items(log: InteractionLog, first: np.ndarray) -> np.ndarray:
    """Returns the items of all events, 0 where a user has had the item before; int32 [rows].

    Args:
      log: the cleaned log.
      first: its `first_rows`.
    """
    return np.where(first == np.arange(log.num_rows), log.items, 0).astype(np.int32)


def were_seen(log: InteractionLog, examples: Examples, first: np.ndarray | None = None) -> np.ndarray:
    """Tells which targets occur among the events that they are predicted from; bool [n].

    Args:
      log: the cleaned log.
      examples: what is predicted.
      first: `first_rows` of the log, where they are known already.
    """
    first = first_rows(log) if first is None else first
    return first[examples.target_rows(log)] < log.offsets[examples.users] + examples.ends


def measured(
    log: InteractionLog, examples: Examples, evaluation: EvalConfig, first: np.ndarray | None = None
) -> dict[Protocol, Measured]:
    """Chooses the examples that are ranked: all, and with seen items excluded those whose target is new to the user.

    With eval.lists="user", a user's targets are predicted together, from what it had before the first of them.

    Args:
      log: the cleaned log.
      examples: an evaluated part of it.
      evaluation: reads lists, exclude_seen and seen_targets.
      first: `first_rows` of the log, where they are known already.

    Returns:
      Either protocol, that of exclude_seen first; one alone where every target was seen, so that nothing is left.

    Raises:
      ValueError: nothing is left of what exclude_seen asks for.
    """
    if evaluation.lists == "user":
        examples = examples.one_list_per_user(log)
    seen, count = were_seen(log, examples, first), len(examples)
    if evaluation.exclude_seen and evaluation.seen_targets == "leave_out" and count and seen.all():
        raise ValueError(
            f"eval.exclude_seen: all {count} targets were seen before by their users, and none is left to "
            "rank; set eval.seen_targets=rank, or do not exclude seen items"
        )
    found = {}
    for protocol in (main_protocol(evaluation), other_protocol(evaluation)):
        leaves_out = protocol == SEEN_EXCLUDED and evaluation.seen_targets == "leave_out"
        kept = ~seen if leaves_out else np.ones(count, bool)
        own = examples.where(kept) if leaves_out else examples
        lists = own.users if evaluation.lists == "user" else None
        if kept.any() or not count:
            found[protocol] = Measured(own, lists, kept, int(np.count_nonzero(seen)), count, protocol)
    return found
