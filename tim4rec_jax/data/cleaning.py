"""The steps of cleaning a log on arrays: the k-core, numbers by first appearance, the order in time.

A step's temporary arrays are of the size of a block of rows, of the users or of the items; what is of the size of the
log is an int64 and a few bytes a row beside the columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tim4rec_jax.data_config import TimestampPrecision

_BLOCK = 2**18
# Rows sorted at once: small enough for a processor's caches, so that a row costs the same in a log of any size.
_BUCKET_ROWS = 2**16


def _blocks(num_rows: int) -> Iterator[slice]:
    return (slice(first, min(first + _BLOCK, num_rows)) for first in range(0, num_rows, _BLOCK))


def count_rows(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Counts the rows of each code, int64 [num_codes]."""
    # np.bincount makes an int64 copy of what it counts.
    counts = np.zeros(num_codes, np.int64)
    for block in _blocks(len(codes)):
        counts += np.bincount(codes[block], minlength=num_codes)
    return counts


def filter_core(
    users: np.ndarray, items: np.ndarray, num_users: int, num_items: int, k_core: int, min_events: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Finds the rows that stay when rare users and items, and users too short to split, go until none is left.

    Args:
      users, items: int32 [rows], every code below its number present.
      num_users, num_items: distinct codes.
      k_core: least rows of a user and of an item.
      min_events: least rows of a user, for the split.

    Returns:
      bool [rows], and the rows dropped by reason.

    Raises:
      ValueError: if nothing stays.
    """
    core, short = f"{k_core}-core", f"users with fewer than {min_events} events"
    dropped = {core: 0} if k_core > 1 else {}
    keep, left = np.ones(len(users), bool), len(users)
    user_rows, item_rows = count_rows(users, num_users), count_rows(items, num_items)
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
        user_rows -= count_rows(users[gone], num_users)
        item_rows -= count_rows(items[gone], num_items)


def _meaning(reason: str, core: str, k_core: int) -> str:
    if reason != core:
        return f"leaving out {reason}"
    return f"the {reason} filter (users and items with fewer than {k_core} interactions, removed repeatedly)"


def number_by_first_appearance(codes: np.ndarray, keep: np.ndarray, num_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the codes of the kept rows 0, 1, ... by their first such row.

    Args:
      codes: int32 [rows].
      keep: bool [rows].
      num_codes: distinct codes.

    Returns:
      The numbers of the kept rows, int32 [kept], and the codes in the order of their numbers.
    """
    first = np.full(num_codes, -1)
    for block in reversed(list(_blocks(len(codes)))):
        # Of repeated indices the last assignment stays: walking backwards leaves the first row.
        rows = np.flatnonzero(keep[block])[::-1] + block.start
        first[codes[rows]] = rows
    present = np.flatnonzero(first >= 0)
    order = present[np.argsort(first[present])]
    number = np.zeros(num_codes, np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return np.concatenate([number[codes[block][keep[block]]] for block in _blocks(len(codes))]), order


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
      changed_last_but_one, changed_last: users whose item in that place would be another then.
    """

    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    repeated: int
    tied: int
    reordered: int
    changed_last_but_one: int
    changed_last: int


def sort_by_time(
    users: np.ndarray, items: np.ndarray, timestamps: np.ndarray, num_users: int, precision: TimestampPrecision,
    fractions: np.ndarray | None = None,
) -> SortedRows:  # fmt: skip
    """Sorts rows by user and time; rows of equal time stay in file order.

    Rows are first dealt to buckets of neighbouring users, which takes linear time, and then sorted bucket by bucket.

    Args:
      users: int32 [rows], every number below `num_users` present.
      items: int32 [rows].
      timestamps: int64 [rows].
      num_users: users.
      precision: "int64" compares exact times; "float32" rounds seconds first, and what that changes is counted.
      fractions: float64 [rows], of a second beyond `timestamps`; None where times are whole seconds.
    """
    offsets = np.concatenate([[0], np.cumsum(count_rows(users, num_users))])
    # NumPy sorts 16-bit numbers stably in linear time.
    users_each = max(-(-num_users * _BUCKET_ROWS // len(users)), -(-num_users // 2**16))
    order = np.argsort((users // np.int32(users_each)).astype(np.uint16), kind="stable")
    bounds = np.append(offsets[:-1:users_each], len(users))
    sorted_items, sorted_times = np.empty_like(items), np.empty_like(timestamps)
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
        pairs = np.sort(user.astype(np.int64) << 32 | item)
        repeated += int((pairs[1:] == pairs[:-1]).sum())
        times = seconds.astype(precision)
        tied += int(((user[1:] == user[:-1]) & (times[1:] == times[:-1])).sum())
    return SortedRows(sorted_items, sorted_times, offsets, repeated, tied, *map(int, changes))


def _changes(users: np.ndarray, items: np.ndarray, exact: np.ndarray) -> tuple[int, int, int]:
    """Counts the users whose order, whose last item but one and whose last item exact seconds would change.

    Args:
      users, items: [rows], sorted by user.
      exact: int [rows], which of these rows exact seconds put in each place.
    """
    last = np.flatnonzero(np.append(users[1:] != users[:-1], True))
    before = last[(last > 0) & (users[last] == users[last - 1])] - 1
    other = items[exact] != items
    reordered = np.unique(users[exact != np.arange(len(exact))])
    return len(reordered), int(other[before].sum()), int(other[last].sum())
