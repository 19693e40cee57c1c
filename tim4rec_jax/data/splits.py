"""Which events train, validate and test: leave-one-out (RecBole 1.2 protocol), or one cut in time for all users."""

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from tim4rec_jax.data.examples import Examples
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.statistics import utc
from tim4rec_jax.data_config import DataConfig, TemporalTargets, parse_time


@dataclass(frozen=True)
class SplitReport:
    """What a temporal split gave to each part, and what it left out.

    Attributes:
      valid_from, test_from: the cuts, int seconds.
      train, valid, test: targets of each part.
      first_events: users' first events, which have nothing before them to predict them from: one a user.
      valid_not_targets, test_not_targets: further events of each period that `temporal_targets` does not choose.
      users_without_train, users_without_valid, users_without_test: users without a target in that part.
      items_not_in_train: items without an event in the training period; they stay in the ranking.
      valid_unseen_targets, test_unseen_targets: targets that are such items.
    """

    valid_from: int
    test_from: int
    train: int
    valid: int
    test: int
    first_events: int
    valid_not_targets: int
    test_not_targets: int
    users_without_train: int
    users_without_valid: int
    users_without_test: int
    items_not_in_train: int
    valid_unseen_targets: int
    test_unseen_targets: int

    def table(self) -> Table:
        """Returns the report as a table for `rich.print`."""
        table = Table("", title="temporal split", show_header=False)
        table.add_column(justify="right")
        table.add_row("validation from", utc(self.valid_from))
        table.add_row("test from", utc(self.test_from))
        for part in ("train", "valid", "test"):
            table.add_row(f"{part}: targets", f"{getattr(self, part):,}")
            table.add_row(f"{part}: users without a target", f"{getattr(self, f'users_without_{part}'):,}")
        table.add_row("first events of users, no targets", f"{self.first_events:,}")
        table.add_row("items without a training event", f"{self.items_not_in_train:,}")
        for part in ("valid", "test"):
            table.add_row(f"{part}: other events, no targets", f"{getattr(self, f'{part}_not_targets'):,}")
            table.add_row(f"{part}: targets among those items", f"{getattr(self, f'{part}_unseen_targets'):,}")
        return table


@dataclass(frozen=True)
class Split:
    """The examples of each part, ordered by user and then by end.

    Attributes:
      train: every prefix of length >= 1 of a user's training part.
      valid: what validates.
      test: what tests.
      first_held_out: one example a user, the first event that is not trained on; its end is 0 for a user without
        training events, and the number of events for one with nothing else.
      report: of a temporal split.
    """

    train: Examples
    valid: Examples
    test: Examples
    first_held_out: Examples
    report: SplitReport | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        extra = 0 if self.first_held_out is self.valid else self.first_held_out.nbytes
        return self.train.nbytes + self.valid.nbytes + self.test.nbytes + extra


def split_log(log: InteractionLog, config: DataConfig) -> Split:
    """Splits a cleaned log as `data.split` says.

    Raises:
      ValueError: as `leave_one_out` and `temporal_split`, and for shares whose cuts coincide.
    """
    if config.split == "leave_one_out":
        return leave_one_out(log)
    if config.valid_from is not None and config.test_from is not None:
        cuts = parse_time(config.valid_from, "data.valid_from"), parse_time(config.test_from, "data.test_from")
    else:
        cuts = _cuts_of_shares(log.timestamps, config.valid_share, config.test_share)
    return temporal_split(log, *cuts, targets=config.temporal_targets)


def describe(config: DataConfig) -> str:
    """Returns how `split_log` splits, in words."""
    if config.split == "leave_one_out":
        return "leave one out"
    shares = f"shares {config.valid_share:g} and {config.test_share:g}"
    cuts = shares if config.valid_from is None else f"{config.valid_from} and {config.test_from}"
    targets = {"last": "the last event", "first": "the first event", "all": "every event"}[config.temporal_targets]
    return f"temporal split ({cuts}; {targets} of a user and period)"


def leave_one_out(log: InteractionLog) -> Split:
    """Splits a cleaned log by each user's last two events.

    A user with n events e_0 .. e_{n-1} gives the targets e_1 .. e_{n-3} to training, e_{n-2} to validation and e_{n-1}
    to the test.

    Args:
      log: cleaned log.

    Raises:
      ValueError: if a user has fewer than 3 events.
    """
    counts = np.diff(log.offsets)
    short = np.flatnonzero(counts < 3)
    if short.size:
        user = int(short[0])
        raise ValueError(
            f"user {log.user_ids[user]!r} has {counts[user]} events; leave-one-out needs at least 3 of every user, "
            "clean the log with `tim4rec_jax.data.interactions.clean` first"
        )
    users = np.arange(len(counts), dtype=np.int32)
    valid = Examples(users, (counts - 2).astype(np.int32))
    return Split(
        train=_examples(np.ones_like(counts), counts - 2),
        valid=valid,
        test=Examples(users, (counts - 1).astype(np.int32)),
        first_held_out=valid,
    )


def temporal_split(log: InteractionLog, valid_from: int, test_from: int, *, targets: TemporalTargets) -> Split:
    """Splits a cleaned log at two moments that are the same for all users.

    With t_i the time of a user's event e_i, targets train where t_i < valid_from, validate in [valid_from, test_from)
    and test from test_from on, i >= 1. Training takes all of its targets; a user's targets in either later period are
    its last event there, its first, or all of them. What a target is predicted from is every event before it,
    whichever period that belongs to.

    Args:
      log: cleaned log.
      valid_from, test_from: int seconds.
      targets: "last", "first" or "all".

    Raises:
      ValueError: for cuts out of order or outside the log's span, and if a part is left without a target.

    Source: global temporal splitting and the choices of targets (last, first, successive) in Gusak et al., "Time to
    Split", RecSys 2025, arXiv 2507.16289, whose experiments are run with the last one. It fixes no single standard.
    """
    first_time, last_time = int(log.timestamps.min()), int(log.timestamps.max())
    if not first_time < valid_from < test_from <= last_time:
        raise ValueError(
            f"validation from {utc(valid_from)} and test from {utc(test_from)} must lie in this order within the log's "
            f"span, {utc(first_time)} to {utc(last_time)}; set data.valid_from and data.test_from, or the shares, anew"
        )
    counts = np.diff(log.offsets)
    ends = [_events_before(log, cut) for cut in (valid_from, test_from)]
    train = _examples(np.ones_like(counts), ends[0])
    valid, valid_rest = _targets(ends[0], ends[1], targets)
    test, test_rest = _targets(ends[1], counts, targets)
    for part, examples in (("training example", train), ("validation target", valid), ("test target", test)):
        if not len(examples):
            raise ValueError(
                f"validation from {utc(valid_from)} and test from {utc(test_from)} leave no {part}: no user has an "
                "event in that period and one before it; move the cuts, or use --data.split=leave_one_out"
            )
    trained = np.zeros(log.num_items + 1, bool)
    trained[log.items[_positions(log) < np.repeat(ends[0], counts)]] = True
    unseen = [int((~trained[log.items[log.offsets[e.users] + e.ends]]).sum()) for e in (valid, test)]
    without = [log.num_users - len(np.unique(examples.users)) for examples in (train, valid, test)]
    return Split(
        train, valid, test,
        first_held_out=Examples(np.arange(log.num_users, dtype=np.int32), ends[0].astype(np.int32)),
        report=SplitReport(
            valid_from, test_from, len(train), len(valid), len(test), log.num_users, valid_rest, test_rest,
            *without, log.num_items - int(trained.sum()), *unseen,
        ),
    )  # fmt: skip


def _examples(firsts: np.ndarray, ends: np.ndarray) -> Examples:
    """Returns the positions firsts[u] .. ends[u] - 1 of every user."""
    counts = np.maximum(ends - firsts, 0)
    before = np.cumsum(counts) - counts
    num = int(counts.sum())
    # At tens of millions of examples an int64 would be the largest array of a run.
    places = np.arange(num, dtype=np.int32 if num < 2**31 else np.int64)
    places += np.repeat((firsts - before).astype(places.dtype), counts)
    users = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return Examples(users, places.astype(np.int32, copy=False))


def _targets(firsts: np.ndarray, ends: np.ndarray, targets: TemporalTargets) -> tuple[Examples, int]:
    """Chooses targets among the positions firsts[u] .. ends[u] - 1; returns them and how many others there are."""
    # A user's very first event has no history to predict it from.
    firsts = np.maximum(firsts, 1)
    candidates = int(np.maximum(ends - firsts, 0).sum())
    if targets == "last":
        firsts = np.maximum(firsts, ends - 1)
    elif targets == "first":
        ends = np.minimum(ends, firsts + 1)
    chosen = _examples(firsts, ends)
    return chosen, candidates - len(chosen)


def _positions(log: InteractionLog) -> np.ndarray:
    """Returns each row's place in its user's history."""
    return np.arange(log.num_rows) - np.repeat(log.offsets[:-1], np.diff(log.offsets))


def _events_before(log: InteractionLog, cut: int) -> np.ndarray:
    """Counts each user's events before a cut, int64 [users]."""
    before = log.timestamps < cut
    rises = np.flatnonzero(before[1:] & ~before[:-1]) + 1
    if not np.isin(rises, log.offsets).all():
        raise ValueError("the log is not sorted by time within each user; clean it first")
    return np.add.reduceat(before, log.offsets[:-1], dtype=np.int64)


def _cuts_of_shares(timestamps: np.ndarray, valid_share: float, test_share: float) -> tuple[int, int]:
    """Returns the cuts from which on (valid_share + test_share) and test_share of all events lie, or a few more."""
    num = len(timestamps)
    places = [min(max(num - round(share * num), 0), num - 1) for share in (valid_share + test_share, test_share)]
    valid_from, test_from = (int(cut) for cut in np.partition(timestamps, places)[places])
    if valid_from == test_from:
        raise ValueError(
            f"data.valid_share={valid_share} and data.test_share={test_share} of {num:,} events both begin at "
            f"{utc(test_from)}; give larger shares, or data.valid_from and data.test_from"
        )
    return valid_from, test_from
