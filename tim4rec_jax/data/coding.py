"""Raw ids as small numbers, a piece of a log at a time, so that no log is ever held as text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from tim4rec_jax.data.readers import RawLog


class IdCoder:
    """Numbers distinct ids 0, 1, ... in the order in which they first appear; int32 holds the numbers."""

    def __init__(self) -> None:
        self._known = pl.DataFrame({"id": [], "code": []}, schema={"id": pl.String, "code": pl.Int32})

    @property
    def ids(self) -> pl.Series:
        """The ids seen so far (String), number i at position i."""
        return self._known["id"]

    def codes(self, ids: pl.Series) -> np.ndarray:
        """Returns the number of each id of a further piece, int32 [rows].

        Args:
          ids: String [rows], none of them null.
        """
        table = ids.to_frame("id")
        joined = table.join(self._known, on="id", how="left", maintain_order="left")["code"]
        if not joined.null_count():
            return joined.to_numpy()
        unknown = joined.is_null()
        rest = table.filter(unknown)
        # Only what is new goes through a second table, so that a piece costs one look into the large one.
        new = rest.unique(maintain_order=True).with_columns(
            code=pl.int_range(self._known.height, self._known.height + pl.len(), dtype=pl.Int32)
        )
        self._known = pl.concat([self._known, new], rechunk=True)
        codes = joined.fill_null(0).to_numpy(writable=True)
        codes[unknown.to_numpy()] = rest.join(new, on="id", how="left", maintain_order="left")["code"].to_numpy()
        return codes


@dataclass(eq=False)
class CodedLog:
    """A log as read, in numbers.

    Attributes:
      users, items: int32 [rows], places in `user_ids` and `item_ids`.
      timestamps: int64 [rows], epoch seconds.
      user_ids, item_ids: distinct raw ids (String).
      blank_lines, rounded_timestamps: see `readers.RawLog`.
    """

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
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
    blank_lines = rounded_timestamps = 0
    for part in parts:
        columns[0].append(users.codes(part.frame["user"]))
        columns[1].append(items.codes(part.frame["item"]))
        columns[2].append(part.frame["timestamp"].to_numpy())
        blank_lines += part.blank_lines
        rounded_timestamps += part.rounded_timestamps
    return CodedLog(
        *(_joined(pieces, dtype) for pieces, dtype in zip(columns, (np.int32, np.int32, np.int64), strict=True)),
        user_ids=users.ids, item_ids=items.ids, blank_lines=blank_lines, rounded_timestamps=rounded_timestamps,
    )  # fmt: skip


def _joined(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    """Joins pieces and empties the list, so that at most one column is held twice."""
    whole = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    pieces.clear()
    return whole
