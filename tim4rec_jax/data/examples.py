"""Training examples as (user, end) pairs over the flat log, and the gather that turns them into windows."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Examples:
    """Which positions of the log are predicted.

    The target of example i is `items[offsets[users[i]] + ends[i]]`; its input is the items of that user before it.

    Attributes:
      users: int32 [n], row of the log's `offsets`.
      ends: int32 [n], position of the target within the user's history, at least 1.
    """

    users: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.users.nbytes + self.ends.nbytes


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
