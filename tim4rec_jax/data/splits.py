"""Which events train, validate and test: leave-one-out (RecBole 1.2 protocol), or one cut in time for all users.

Examples are (user, end) pairs over the flat log; a gather turns them into windows.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from tim4rec_jax.data.interactions import InteractionLog, titled_table, utc
from tim4rec_jax.data_config import DataConfig, TemporalTargets, parse_time


@dataclass(frozen=True, eq=False)
class Examples:
    """Which positions of the log are predicted.

    The input of example i is the first `ends[i]` items of that user, its target the next one, or a later one.

    Attributes:
      users: int32 [n], row of the log's `offsets`.
      ends: int32 [n], events of the user's history before what is predicted, at least 1.
      at: int32 [n], position of the target within the user's history, at least `ends`; None is `ends` itself.
    """

    users: np.ndarray
    ends: np.ndarray
    at: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.users.nbytes + self.ends.nbytes

    def target_rows(self, log: InteractionLog) -> np.ndarray:
        """Returns the rows of the log that are predicted, int64 [n]."""
        return log.offsets[self.users] + (self.ends if self.at is None else self.at)

    def targets(self, log: InteractionLog) -> np.ndarray:
        """Returns the items that are predicted, int32 [n]."""
        return log.items[self.target_rows(log)]

    def where(self, chosen: np.ndarray) -> "Examples":
        """Returns those that a mask [n] marks, or in the order of indices."""
        return Examples(self.users[chosen], self.ends[chosen], None if self.at is None else self.at[chosen])

    def one_list_per_user(self, log: InteractionLog) -> "Examples":
        """Returns the same targets predicted together, from what a user had before the first of them.

        An item that is a user's target twice is there once. The examples are by user and ascending in time.
        """
        pairs = self.users * np.int64(log.num_items + 1) + self.targets(log)
        _, kept = np.unique(pairs, return_index=True)  # The first of each pair.
        chosen = self.where(np.sort(kept))
        at = chosen.ends if chosen.at is None else chosen.at
        _, firsts, which = np.unique(chosen.users, return_index=True, return_inverse=True)
        return Examples(chosen.users, chosen.ends[firsts][which], at)


class Windows(NamedTuple):
    """A batch of model inputs and their targets.

    Attributes:
      items: int32 [b,l], the latest `max_len` items before the target, in time order, padded on the right with 0.
      lengths: int32 [b], items in each row, at least 1.
      timestamps: [b,l] in the log's dtype, seconds, padded with 0.
      targets: int32 [b], the next item.
    """

    items: Any
    lengths: Any
    timestamps: Any
    targets: Any


def gather_windows(
    log_items: Any,
    log_timestamps: Any,
    offsets: Any,
    users: Any,
    ends: Any,
    max_len: int,
    xp: ModuleType = np,
) -> Windows:
    """Gathers the windows of a batch of examples from the flat log.

    Row i holds `log_items[t - m : t]` with t = offsets[users[i]] + ends[i] and m = min(ends[i], max_len).
    Works on NumPy arrays and, with `xp=jax.numpy`, inside `jax.jit` (shapes depend on `max_len` and b alone).

    Args:
      log_items: int32 [rows].
      log_timestamps: [rows], seconds in any dtype; the windows keep it.
      offsets: integers [users + 1]; their dtype must hold the number of rows.
      users: int32 [b].
      ends: int32 [b], at least 1.
      max_len: l.
      xp: array module of the arguments.

    Returns:
      The windows.

    Raises:
      ValueError: if `max_len` is under 1.
    """
    if max_len < 1:
        raise ValueError(f"max_len={max_len} must be at least 1")
    lengths = xp.minimum(ends, max_len).astype(xp.int32)
    target_rows = offsets[users] + ends.astype(offsets.dtype)
    first_rows = target_rows - lengths.astype(offsets.dtype)
    steps = xp.arange(max_len, dtype=offsets.dtype)
    inside = steps[None, :] < lengths[:, None]
    rows = xp.where(inside, first_rows[:, None] + steps[None, :], 0)
    return Windows(
        items=xp.where(inside, log_items[rows], 0),
        lengths=lengths,
        timestamps=xp.where(inside, log_timestamps[rows], 0),
        targets=log_items[target_rows],
    )


@dataclass(frozen=True)
class SplitReport:
    """What a temporal split, or one by files, gave to each part, and what it left out.

    Attributes:
      valid_from, test_from: the cuts, int seconds; None for files already split.
      train, valid, test: targets of each part.
      first_events: users' first events, which have nothing before them to predict them from: one per user.
      valid_not_targets, test_not_targets: further events of each period that `temporal_targets` does not choose.
      users_without_train, users_without_valid, users_without_test: users without a target in that part.
      items_not_in_train: items without an event in the training period; they stay in the ranking.
      valid_unseen_targets, test_unseen_targets: targets that are such items.
    """

    valid_from: int | None
    test_from: int | None
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
        rows = []
        if self.valid_from is not None and self.test_from is not None:
            rows = [("validation from", utc(self.valid_from)), ("test from", utc(self.test_from))]
        for part in ("train", "valid", "test"):
            rows.append((f"{part}: targets", f"{getattr(self, part):,}"))
            rows.append((f"{part}: users without a target", f"{getattr(self, f'users_without_{part}'):,}"))
        rows.append(("first events of users, no targets", f"{self.first_events:,}"))
        rows.append(("items without a training event", f"{self.items_not_in_train:,}"))
        for part in ("valid", "test"):
            rows.append((f"{part}: other events, no targets", f"{getattr(self, f'{part}_not_targets'):,}"))
            rows.append((f"{part}: targets among those items", f"{getattr(self, f'{part}_unseen_targets'):,}"))
        return titled_table("files already split" if self.valid_from is None else "temporal split", rows)


@dataclass(frozen=True)
class Split:
    """The examples of each part, ordered by user and then by end.

    Attributes:
      train: every prefix of length >= 1 of a user's training part.
      valid: what validates; nothing where every event trains.
      test: what tests; likewise.
      first_held_out: one example per user, the first event that is not trained on; its end is 0 for a user without
        training events, and the number of events for one with nothing else.
      report: of a temporal split, or one by files.
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
      ValueError: as `leave_one_out`, `temporal_split` and `given_split`, and for shares whose cuts coincide.
    """
    if config.split == "leave_one_out":
        return leave_one_out(log)
    if config.split == "given":
        return given_split(log, targets=config.temporal_targets)
    if config.split == "none":
        return everything(log)
    if config.valid_from is not None and config.test_from is not None:
        cuts = parse_time(config.valid_from, "data.valid_from"), parse_time(config.test_from, "data.test_from")
    else:
        cuts = _cuts_of_shares(log.timestamps, config.valid_share, config.test_share)
    return temporal_split(log, *cuts, targets=config.temporal_targets)


def require_held_out(config: DataConfig, what: str) -> None:
    """Refuses to measure where nothing is held out.

    Args:
      config: reads split.
      what: wants to measure; the message begins with it.

    Raises:
      ValueError: for `data.split=none`.
    """
    if not config.holds_out:
        raise ValueError(
            f"{what} measures on what training has not seen, and data.split=none trains on every event; use another "
            "data.split to measure"
        )


def describe(config: DataConfig) -> str:
    """Returns how `split_log` splits, in words."""
    if config.split == "leave_one_out":
        return "leave one out"
    if config.split == "none":
        return "nothing held out"
    targets = {"last": "the last event", "first": "the first event", "all": "every event"}[config.temporal_targets]
    if config.split == "given":
        return f"files already split ({targets} of a user and file)"
    shares = f"shares {config.valid_share:g} and {config.test_share:g}"
    cuts = shares if config.valid_from is None else f"{config.valid_from} and {config.test_from}"
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


def everything(log: InteractionLog) -> Split:
    """Trains on every event of a cleaned log: a user with n events gives the targets e_1 .. e_{n-1}."""
    counts = np.diff(log.offsets)
    nothing = np.zeros(0, np.int32)
    return Split(
        train=_examples(np.ones_like(counts), counts),
        valid=Examples(nothing, nothing),
        test=Examples(nothing, nothing),
        first_held_out=Examples(np.arange(len(counts), dtype=np.int32), counts.astype(np.int32)),
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
    return _cut(
        log,
        [_events_before(log, cut) for cut in (valid_from, test_from)],
        targets,
        (valid_from, test_from),
        f"validation from {utc(valid_from)} and test from {utc(test_from)} leave no {{}}: no user has an event in that "
        "period and one before it; move the cuts, or use --data.split=leave_one_out",
    )


def given_split(log: InteractionLog, *, targets: TemporalTargets) -> Split:
    """Splits a cleaned log as the files were that it was read from.

    A user's history is its events of the training file, then of the validation file, then of the test file, none of
    which may lie in time before one of an earlier file: what a target is predicted from is every event before it.
    Training, popularity and the statistics of times know the training file alone.

    Args:
      log: cleaned log, with `parts`.
      targets: which of a user's events in the later files are predicted: "last", "first" or "all".

    Raises:
      ValueError: if the log was not read in parts, or a part is left without a target.
    """
    if log.parts is None:
        raise ValueError("the log was not read from files already split; load it with data.split=given")
    message = (
        "data.split=given leaves no {}: no user has an event in that file and one before it; another data.split "
        "cuts the log anew"
    )
    return _cut(log, [log.parts[:, 0], log.parts[:, 1]], targets, (None, None), message)


def _cut(
    log: InteractionLog,
    ends: list[np.ndarray],
    targets: TemporalTargets,
    cuts: tuple[int | None, int | None],
    message: str,
) -> Split:
    """Splits each user's events at two places."""
    counts = np.diff(log.offsets)
    train = _examples(np.ones_like(counts), ends[0])
    valid, valid_rest = _targets(ends[0], ends[1], targets)
    test, test_rest = _targets(ends[1], counts, targets)
    for part, examples in (("training example", train), ("validation target", valid), ("test target", test)):
        if not len(examples):
            raise ValueError(message.format(part))
    trained = np.zeros(log.num_items + 1, bool)
    trained[log.items[_positions(log) < np.repeat(ends[0], counts)]] = True
    unseen_valid, unseen_test = [int((~trained[log.items[log.offsets[e.users] + e.ends]]).sum()) for e in (valid, test)]
    no_train, no_valid, no_test = [log.num_users - len(np.unique(examples.users)) for examples in (train, valid, test)]
    return Split(
        train,
        valid,
        test,
        first_held_out=Examples(np.arange(log.num_users, dtype=np.int32), ends[0].astype(np.int32)),
        report=SplitReport(
            *cuts,
            len(train),
            len(valid),
            len(test),
            log.num_users,
            valid_rest,
            test_rest,
            no_train,
            no_valid,
            no_test,
            log.num_items - int(trained.sum()),
            unseen_valid,
            unseen_test,
        ),
    )


def _examples(firsts: np.ndarray, ends: np.ndarray) -> Examples:
    """Returns the positions firsts[u] .. ends[u] - 1 of every user."""
    counts = np.maximum(ends - firsts, 0)
    before = np.cumsum(counts) - counts
    num = int(counts.sum())
    # At tens of millions of examples an int64 would be the largest array of a run.
    positions = np.arange(num, dtype=np.int32 if num < 2**31 else np.int64)
    positions += np.repeat((firsts - before).astype(positions.dtype), counts)
    users = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return Examples(users, positions.astype(np.int32, copy=False))


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
    """Returns each row's position in its user's history."""
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
    ranks = [min(max(num - round(share * num), 0), num - 1) for share in (valid_share + test_share, test_share)]
    valid_from, test_from = (int(cut) for cut in np.partition(timestamps, ranks)[ranks])
    if valid_from == test_from:
        raise ValueError(
            f"data.valid_share={valid_share} and data.test_share={test_share} of {num:,} events both begin at "
            f"{utc(test_from)}; give larger shares, or data.valid_from and data.test_from"
        )
    return valid_from, test_from


def training_span(log: InteractionLog, split: Split) -> tuple[int, int]:
    """Returns the first and the last second of the training part; they differ by 1 at least.

    What validates and tests is not looked at.
    """
    before, after = _training_times(log, split)
    first, last = (int(before.min()), int(after.max())) if len(before) else (0, 1)
    return first, max(last, first + 1)


def gap_statistics(log: InteractionLog, split: Split) -> tuple[float, float]:
    """Returns mean and standard deviation of log1p(gap) over the positive gaps between a user's training events.

    What validates and tests is not looked at.

    Returns:
      (mean, std) in log-seconds; (0, 1) without a positive gap, and a std of 1 where all are the same.
    """
    before, after = _training_times(log, split)
    gaps = after - before
    logs = np.log1p(gaps[gaps > 0].astype(np.float64))
    if len(logs) == 0:
        return 0.0, 1.0
    std = float(logs.std())
    return float(logs.mean()), std if std > 1e-6 else 1.0  # Less is rounding.


def training_times(log: InteractionLog, split: Split) -> dict[str, Any]:
    """Returns gap_mean, gap_std, first_second and last_second of the training part, as `data_statistics` takes them."""
    mean, std = gap_statistics(log, split)
    first, last = training_span(log, split)
    return {"gap_mean": mean, "gap_std": std, "first_second": first, "last_second": last}


def _training_times(log: InteractionLog, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns the second of each training target's input, and of the target."""
    rows = log.offsets[split.train.users] + split.train.ends
    return log.timestamps[rows - 1], log.timestamps[rows]
