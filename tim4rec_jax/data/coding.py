"""Raw ids as small numbers, a piece of a log at a time, so that no log is ever held as text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from tim4rec_jax.data.typed_columns import RawLog


class IdCoder:
    """Numbers distinct ids 0, 1, ... in the order in which they first appear; int32 holds the numbers.

    Polars keeps the numbers of a categorical type in one hash table that grows, so that a piece costs the same however
    many ids are known already.
    """

    def __init__(self) -> None:
        self._type = pl.Categorical(pl.Categories.random())
        # The table lives as long as a column of its type.
        self._anchor: pl.Series | None = None

    @property
    def ids(self) -> pl.Series:
        """The ids seen so far (String), number i at position i."""
        ids = self._type.categories.to_series() if self._anchor is not None else pl.Series(dtype=pl.String)
        return ids.alias("id")

    def codes(self, ids: pl.Series) -> np.ndarray:
        """Returns the number of each id of a further piece, int32 [rows].

        Args:
          ids: String [rows], none of them null.
        """
        coded = ids.cast(self._type)
        if self._anchor is None and len(coded):
            self._anchor = coded.head(1)
        return coded.to_physical().cast(pl.Int32).to_numpy()


@dataclass(eq=False)
class CodedLog:
    """A log as read, in numbers.

    Attributes:
      users, items: int32 [rows], places in `user_ids` and `item_ids`.
      timestamps: int64 [rows], epoch seconds.
      fractions: float64 [rows], of a second beyond `timestamps`; None where all times are whole.
      user_ids, item_ids: distinct raw ids (String).
      blank_lines, rounded_timestamps: see `typed_columns.RawLog`.
    """

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    fractions: np.ndarray | None
    user_ids: pl.Series
    item_ids: pl.Series
    blank_lines: int
    rounded_timestamps: int


def encode(parts: Iterable[RawLog]) -> CodedLog:
    """Numbers the ids of a log that comes in pieces; only one piece is held as text at a time.

    Args:
      parts: the log in file order, as `readers.read_parts` yields it.
    """
    users, items = IdCoder(), IdCoder()
    columns: tuple[list[np.ndarray], ...] = ([], [], [])
    fractions: list[np.ndarray] = []
    rows = 0
    blank_lines = rounded_timestamps = 0
    for part in parts:
        columns[0].append(users.codes(part.frame["user"]))
        columns[1].append(items.codes(part.frame["item"]))
        columns[2].append(part.frame["timestamp"].to_numpy())
        if part.fractions is not None:
            # Before the first piece with fractions, nothing is kept of the others.
            fractions += [] if fractions else [np.zeros(rows, np.float64)]
            fractions.append(part.fractions.to_numpy())
        elif fractions:
            fractions.append(np.zeros(part.frame.height, np.float64))
        rows += part.frame.height
        blank_lines += part.blank_lines
        rounded_timestamps += part.rounded_timestamps
    return CodedLog(
        *(_joined(pieces, dtype) for pieces, dtype in zip(columns, (np.int32, np.int32, np.int64), strict=True)),
        _joined(fractions, np.float64) if fractions else None,
        user_ids=users.ids, item_ids=items.ids, blank_lines=blank_lines, rounded_timestamps=rounded_timestamps,
    )  # fmt: skip


def _joined(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    """Joins pieces and empties the list, so that at most one column is held twice."""
    whole = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    pieces.clear()
    return whole
