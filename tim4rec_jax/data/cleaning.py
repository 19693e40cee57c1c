"""Cleaning by arrays: rows that repeat, rare users and items, numbers by first appearance, order by time.

A step's temporary arrays are of the size of a block of rows, of the users or of the items; what is of the size of the
log is an int64 and a few bytes per row beside the columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tim4rec_jax.data.columns import FactorizedLog
from tim4rec_jax.data_config import Duplicates, TimestampPrecision

_BLOCK = 2**18
# Rows sorted at once: small enough for a processor's caches, so that a row costs the same in a log of any size.
_BUCKET_ROWS = 2**16


def blocks(num_rows: int) -> Iterator[slice]:
    """Cuts rows into blocks."""
    return (slice(first, min(first + _BLOCK, num_rows)) for first in range(0, num_rows, _BLOCK))


def repeated_rows(log: FactorizedLog, which: Duplicates) -> np.ndarray:
    """Finds the rows that stay when each user keeps one event of an item, bool [rows].

    It is the first or last in time; of those at the same time the first or last in the file.
    """
    keep = np.ones(len(log.users), bool)
    if which == "keep" or not len(keep):
        return keep
    pairs = log.users.astype(np.int64) << 32 | log.items
    finer = () if log.fractions is None else (log.fractions,)
    order = np.lexsort((*finer, log.timestamps, pairs))
    same = pairs[order[1:]] == pairs[order[:-1]]
    keep[order[1:][same] if which == "first" else order[:-1][same]] = False
    return keep


def _count_rows(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Counts the rows of each code, int64 [num_codes]."""
    # np.bincount makes an int64 copy of what it counts.
    counts = np.zeros(num_codes, np.int64)
    for block in blocks(len(codes)):
        counts += np.bincount(codes[block], minlength=num_codes)
    return counts


def filter_core(
    users: np.ndarray,
    items: np.ndarray,
    num_users: int,
    num_items: int,
    k_core: int,
    min_events: int,
    keep: np.ndarray,
) -> tuple[np.ndarray, dict[str, int]]:
    """Finds the rows that stay when rare users and items, and users too short to split, go until none is left.

    Returns which rows of `keep` stay, bool [rows], and the rows dropped by reason.
    """
    core, short = f"{k_core}-core", f"users with fewer than {min_events} events"
    dropped = {core: 0} if k_core > 1 else {}
    left = int(keep.sum())
    user_rows, item_rows = _count_rows(users, num_users), _count_rows(items, num_items)
    if left < len(users):
        user_rows -= _count_rows(users[~keep], num_users)
        item_rows -= _count_rows(items[~keep], num_items)
    while True:
        reason = core
        leaving = keep & ((user_rows < k_core)[users] | (item_rows < k_core)[items])
        if not leaving.any():
            reason = short
            leaving = keep & (user_rows < min_events)[users]
        gone = np.flatnonzero(leaving)
        if not gone.size:
            return keep, dropped
        dropped[reason] = dropped.get(reason, 0) + gone.size
        keep[gone] = False
        left -= gone.size
        if not left:
            counts = ", ".join(f"{rows:,} by {name}" for name, rows in dropped.items() if rows)
            raise ValueError(
                f"{_meaning(reason, core, k_core)} left none of the log's {len(users):,} rows ({num_users:,} users, "
                f"{num_items:,} items; dropped {counts}); "
                + (
                    "lower data.k_core"
                    if reason == core
                    else "to leave one out a user needs one event each to train, validate, test; --data.split=temporal "
                    "keeps shorter users"
                )
            )
        user_rows -= _count_rows(users[gone], num_users)
        item_rows -= _count_rows(items[gone], num_items)


def _meaning(reason: str, core: str, k_core: int) -> str:
    if reason != core:
        return f"leaving out {reason}"
    return f"the {reason} filter (users and items with fewer than {k_core} interactions, removed repeatedly)"


def number_by_first_appearance(codes: np.ndarray, keep: np.ndarray, num_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the codes of the kept rows 0, 1, ... by their first such row.

    Returns the numbers of the kept rows, int32 [kept], and the codes in the order of their numbers.
    """
    first = np.full(num_codes, -1)
    for block in reversed(list(blocks(len(codes)))):
        # Of repeated indices the last assignment stays: walking backwards leaves the first row.
        rows = np.flatnonzero(keep[block])[::-1] + block.start
        first[codes[rows]] = rows
    present = np.flatnonzero(first >= 0)
    order = present[np.argsort(first[present])]
    number = np.zeros(num_codes, np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return np.concatenate([number[codes[block][keep[block]]] for block in blocks(len(codes))]), order


class SortedRows(NamedTuple):
    """Rows by user and, within a user, by time.

    Attributes:
      items: int32 [rows].
      timestamps: int64 [rows], never backwards within a user: rows that tie at the precision have their times in order,
        whichever of them each belongs to.
      offsets: int64 [users + 1].
      repeated: rows whose (user, item) occurs before.
      tied: rows with the same time as the row before of the same user, at the precision.
      reordered: users whose rows exact seconds would order otherwise.
      changed_last_but_one, changed_last: users whose item there would be another then.
      parts: of the rows, where the log has any; see `FactorizedLog`.
    """

    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    repeated: int
    tied: int
    reordered: int
    changed_last_but_one: int
    changed_last: int
    parts: np.ndarray | None = None


def sort_by_time(log: FactorizedLog, num_users: int, precision: TimestampPrecision) -> SortedRows:
    """Sorts rows by user and time; rows of equal time stay in file order.

    "int64" compares exact times; "float32" rounds seconds first, and what that changes is counted. Rows are first dealt
    to buckets of neighbouring users, which takes linear time, and then sorted bucket by bucket.
    """
    users, items, timestamps, fractions = log.users, log.items, log.timestamps, log.fractions
    offsets = np.concatenate([[0], np.cumsum(_count_rows(users, num_users))])
    # NumPy sorts 16-bit numbers stably in linear time.
    users_per_bucket = max(-(-num_users * _BUCKET_ROWS // len(users)), -(-num_users // 2**16))
    order = np.argsort((users // np.int32(users_per_bucket)).astype(np.uint16), kind="stable")
    bounds = np.append(offsets[:-1:users_per_bucket], len(users))
    sorted_items, sorted_times = np.empty_like(items), np.empty_like(timestamps)
    parts = None if log.parts is None else np.empty_like(log.parts)
    repeated = tied = 0
    changes = np.zeros(3, np.int64)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        rows = order[first:last]
        finer = () if fractions is None else (fractions,)
        if precision == "float32":
            rows = rows[np.lexsort((timestamps[rows].astype(precision), users[rows]))]
        else:
            rows = rows[np.lexsort(tuple(key[rows] for key in (*finer, timestamps, users)))]
        user, item, seconds = users[rows], items[rows], timestamps[rows]
        if precision == "float32":
            # Rounding never swaps two times, so a stable sort of these rows is the order of exact times.
            exact = np.lexsort((*(key[rows] for key in finer), seconds, user))
            changes += _changes(user, item, exact)
            seconds = seconds[exact]
        sorted_items[first:last], sorted_times[first:last] = item, seconds
        if parts is not None and log.parts is not None:
            parts[first:last] = log.parts[rows]
        pairs = np.sort(user.astype(np.int64) << 32 | item)
        repeated += int((pairs[1:] == pairs[:-1]).sum())
        times = seconds.astype(precision)
        tied += int(((user[1:] == user[:-1]) & (times[1:] == times[:-1])).sum())
    return SortedRows(sorted_items, sorted_times, offsets, repeated, tied, *map(int, changes), parts=parts)


def _changes(users: np.ndarray, items: np.ndarray, exact: np.ndarray) -> tuple[int, int, int]:
    """Counts the users whose order, whose last item but one and whose last item exact seconds would change.

    Args:
      users, items: [rows], sorted by user.
      exact: int [rows], which of these rows exact seconds put where each stands.
    """
    last = np.flatnonzero(np.append(users[1:] != users[:-1], True))
    before = last[(last > 0) & (users[last] == users[last - 1])] - 1
    other = items[exact] != items
    reordered = np.unique(users[exact != np.arange(len(exact))])
    return len(reordered), int(other[before].sum()), int(other[last].sum())
