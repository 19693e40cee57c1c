"""The steps of cleaning a log on arrays: the k-core, numbers by first appearance, the order in time.

A step's temporary arrays are of the size of a block of rows, of the users or of the items; what is of the size of the
log is an int64 and a few bytes a row beside the columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tim4rec_jax.data.statistics import MIN_EVENTS
from tim4rec_jax.data_config import TimestampPrecision

SHORT_USERS = f"users with fewer than {MIN_EVENTS} events"
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
    users: np.ndarray, items: np.ndarray, num_users: int, num_items: int, k_core: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Finds the rows that stay when rare users and items, and users too short to split, go until none is left.

    Args:
      users, items: int32 [rows], every code below its number present.
      num_users, num_items: distinct codes.
      k_core: least rows of a user and of an item.

    Returns:
      bool [rows], and the rows dropped by reason.

    Raises:
      ValueError: if nothing stays.
    """
    core = f"{k_core}-core"
    dropped = {core: 0} if k_core > 1 else {}
    keep, left = np.ones(len(users), bool), len(users)
    user_rows, item_rows = count_rows(users, num_users), count_rows(items, num_items)
    while True:
        reason = core
        leaving = keep & ((user_rows < k_core)[users] | (item_rows < k_core)[items])
        if not leaving.any():
            reason = SHORT_USERS
            leaving = keep & (user_rows < MIN_EVENTS)[users]
        gone = np.flatnonzero(leaving)
        if not gone.size:
            return keep, dropped
        dropped[reason] = dropped.get(reason, 0) + gone.size
        keep[gone] = False
        left -= gone.size
        if not left:
            counts = ", ".join(f"{rows:,} by {name}" for name, rows in dropped.items() if rows)
            raise ValueError(
                f"{_meaning(reason, k_core)} left none of the log's {len(users):,} rows ({num_users:,} users, "
                f"{num_items:,} items; dropped {counts}); "
                + (
                    "lower data.k_core"
                    if reason == core
                    else "every user needs one event each to train, validate, test"
                )
            )
        user_rows -= count_rows(users[gone], num_users)
        item_rows -= count_rows(items[gone], num_items)


def _meaning(reason: str, k_core: int) -> str:
    if reason == SHORT_USERS:
        return f"leaving out {SHORT_USERS}"
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
      timestamps: int64 [rows].
      offsets: int64 [users + 1].
      repeated: rows whose (user, item) occurs before.
      tied: rows with the same time as the row before of the same user, at the precision.
    """

    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    repeated: int
    tied: int


def sort_by_time(
    users: np.ndarray, items: np.ndarray, timestamps: np.ndarray, num_users: int, precision: TimestampPrecision
) -> SortedRows:
    """Sorts rows by user and time, stably.

    Rows are first dealt to buckets of neighbouring users, which takes linear time, and then sorted bucket by bucket.

    Args:
      users: int32 [rows], every number below `num_users` present.
      items: int32 [rows].
      timestamps: int64 [rows].
      num_users: users.
      precision: times are compared as this type.
    """
    offsets = np.concatenate([[0], np.cumsum(count_rows(users, num_users))])
    # NumPy sorts 16-bit numbers stably in linear time.
    users_each = max(-(-num_users * _BUCKET_ROWS // len(users)), -(-num_users // 2**16))
    order = np.argsort((users // np.int32(users_each)).astype(np.uint16), kind="stable")
    bounds = np.append(offsets[:-1:users_each], len(users))
    sorted_items, sorted_times = np.empty_like(items), np.empty_like(timestamps)
    repeated = tied = 0
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        rows = order[first:last]
        rows = rows[np.lexsort((timestamps[rows].astype(precision), users[rows]))]
        user, item, seconds = users[rows], items[rows], timestamps[rows]
        sorted_items[first:last], sorted_times[first:last] = item, seconds
        pairs = np.sort(user.astype(np.int64) << 32 | item)
        repeated += int((pairs[1:] == pairs[:-1]).sum())
        times = seconds.astype(precision)
        tied += int(((user[1:] == user[:-1]) & (times[1:] == times[:-1])).sum())
    return SortedRows(sorted_items, sorted_times, offsets, repeated, tied)
