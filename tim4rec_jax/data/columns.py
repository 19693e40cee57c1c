"""The columns of a log in numbers, whatever type they were stored in; nothing changes without being counted.

Columns are given one type a piece of the log at a time, and ids become numbers at once, so that no log is ever held as
text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.checks import shown
from tim4rec_jax.data.sources import Source

_LATEST_TIMESTAMP = 253_402_300_799  # the last second of the year 9999
_TICKS = {"ms": 10**3, "us": 10**6, "ns": 10**9}
_SECONDS_PER_DAY = 86_400
_EXACT_FLOAT = 2**53  # up to here every whole number is a float64
_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Binary, pl.Null)


class Table(NamedTuple):
    """Three columns of a file or data frame, user, item and timestamp, and where its rows stand, for messages.

    Attributes:
      source: the file, or what to call the data frame.
      first_line: line of row 0; 0 where rows are no lines (quoted text, Parquet).
      first_row: number of row 0, from 0, where rows are no lines.
    """

    frame: pl.DataFrame
    source: Source | str
    first_line: int
    ticks_per_second: int = 1
    first_row: int = 0

    def where(self, row: int) -> str:
        """Names a row of the file."""
        if self.first_line:
            return f"{self.source}:{self.first_line + row}"
        return f"{self.source}, row {self.first_row + row + 1}"


class TypedTable(NamedTuple):
    """A piece of a log: user and item (String) and timestamp (Int64 seconds), and what `FactorizedLog` counts.

    `fractions` is Float64, of a second, what was rounded down of each row; None for none.
    """

    frame: pl.DataFrame
    blank_lines: int
    rounded_timestamps: int
    fractions: pl.Series | None


@dataclass(eq=False)
class FactorizedLog:
    """A log as read, before cleaning, in numbers.

    Attributes:
      users, items: int32 [rows], indices into `user_ids` and `item_ids`.
      timestamps: int64 [rows], epoch seconds.
      fractions: float64 [rows], of a second beyond `timestamps`; orders events within a second. None where all times
        are whole.
      user_ids, item_ids: distinct raw ids (String), by first appearance.
      blank_lines: rows without any field, left out.
      rounded_timestamps: timestamps with a fraction of a second, rounded down.
    """

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    fractions: np.ndarray | None
    user_ids: pl.Series
    item_ids: pl.Series
    blank_lines: int
    rounded_timestamps: int


def check_type(source: Source | str, name: str, dtype: pl.DataType, *, is_time: bool) -> None:
    """Refuses a column whose values are neither ids nor times."""
    if dtype.is_nested():
        raise ValueError(
            f"{source}: column {shown(name)[1:-1]} holds lists or structs ({shown(str(dtype))[1:-1]}), not one value "
            "per row; write one row per event"
        )
    times = dtype.is_temporal() and dtype.base_type() in (pl.Date, pl.Datetime)
    whole = dtype.is_integer() or dtype.is_float() or (isinstance(dtype, pl.Decimal) and (is_time or dtype.scale == 0))
    if not (dtype.base_type() in _TEXT or whole or (is_time and times)):
        kind, wanted = ("times", "epoch seconds or a Datetime") if is_time else ("ids", "text or whole numbers")
        raise ValueError(f"{source}: column {shown(name)[1:-1]} is {dtype}, which are no {kind}; write {wanted}")


def id_text(ids: pl.Series) -> tuple[pl.Series, int | None]:
    """Returns ids as text, whole floats as whole numbers ("1"), and the first row whose float is no whole number."""
    if ids.dtype.is_float():
        numbers = ids.cast(pl.Float64)
        bad = ~((numbers == numbers.floor()) & (numbers.abs() <= _EXACT_FLOAT))
        rows = bad.fill_null(False).arg_true()
        return numbers.cast(pl.Int64, strict=False).cast(pl.String), rows[0] if len(rows) else None
    return ids.cast(pl.String), None


def typed(raw: Table) -> TypedTable:
    """Gives the three columns their types."""
    numbered = raw.frame.with_row_index("row")
    filled = numbered.filter(~pl.all_horizontal(pl.col("user", "item", "timestamp").is_null()))
    ids = {}
    for name in ("user", "item"):
        try:
            ids[name], bad = id_text(filled[name])
        except pl.exceptions.PolarsError as error:
            where = raw.where(filled["row"][0])
            raise ValueError(f"{where} ff.: a {name} id is no UTF-8 text; write ids as text") from error
        if bad is not None:
            raise ValueError(
                f"{raw.where(filled['row'][bad])}: {name} id {filled[name][bad]} is a float that is no whole number; "
                "write ids as text or whole numbers"
            )
        missing = (ids[name].is_null() | (ids[name] == "")).arg_true()
        if len(missing):
            raise ValueError(
                f"{raw.where(filled['row'][missing[0]])}: no {name} id ({len(missing)} such rows); "
                "every interaction needs a user and an item"
            )
    seconds, fractions = _seconds(filled["timestamp"], filled["row"], raw)
    rounded = 0 if fractions is None else int((fractions > 0).sum())
    return TypedTable(
        frame=pl.DataFrame({**ids, "timestamp": seconds}),
        blank_lines=numbered.height - filled.height,
        # Finer ticks are floored by definition; only a fraction of a second in seconds counts as rounded.
        rounded_timestamps=rounded if raw.ticks_per_second == 1 else 0,
        fractions=fractions if rounded else None,
    )


def _seconds(times: pl.Series, rows: pl.Series, raw: Table) -> tuple[pl.Series, pl.Series | None]:
    """Returns whole seconds (Int64), rounded down, and what was left of each (Float64) where there are finer times."""
    ticks, rest = _ticks(times)
    limit = _LATEST_TIMESTAMP * raw.ticks_per_second
    bad = (~((ticks >= 0) & (ticks <= limit)).fill_null(False)).arg_true()
    if len(bad):
        first = bad[0]
        raise ValueError(f"{raw.where(rows[first])}: {_complaint(times[first], ticks[first], raw.ticks_per_second)}")
    ticks = ticks.cast(pl.Int64)
    if raw.ticks_per_second == 1:
        return ticks, rest
    below = (ticks % raw.ticks_per_second).cast(pl.Float64)
    return ticks // raw.ticks_per_second, (below if rest is None else below + rest) / raw.ticks_per_second


def _ticks(times: pl.Series) -> tuple[pl.Series, pl.Series | None]:
    """Returns times rounded down to whole numbers, null where they are none, and what is left (Float64) or None."""
    dtype = times.dtype
    if dtype == pl.Date:
        return times.to_physical().cast(pl.Int64) * _SECONDS_PER_DAY, None
    if isinstance(dtype, pl.Datetime):
        physical, per_second = times.to_physical(), _TICKS[dtype.time_unit]
        return physical // per_second, (physical % per_second).cast(pl.Float64) / per_second
    if dtype.is_decimal():
        return times.floor().cast(pl.Float64), (times - times.floor()).cast(pl.Float64)
    if dtype.is_float():
        # In polars NaN is the largest number, so it would pass for a late time.
        return _floored(times.cast(pl.Float64).fill_nan(None))
    times = times if dtype.is_integer() or dtype == pl.Null else times.cast(pl.String, strict=False)
    integers = times.cast(pl.Int64, strict=False)
    if integers.null_count() == times.null_count():
        return integers, None
    text = times.cast(pl.String, strict=False).str.strip_chars()
    floored, rest = _floored(text.cast(pl.Float64, strict=False).fill_nan(None))
    # A float has about 16 digits: a longer decimal is split where its point stands.
    whole = text.str.extract(r"^\+?(\d+)\.\d*$").cast(pl.Float64, strict=False)
    behind = text.str.extract(r"^\+?\d+(\.\d*)$")
    split = whole.is_not_null()
    fraction = ("0" + behind.str.replace(r"\.$", "")).cast(pl.Float64, strict=False)
    return whole.zip_with(split, floored), fraction.zip_with(split, rest)


def _floored(numbers: pl.Series) -> tuple[pl.Series, pl.Series]:
    floored = numbers.floor()
    return floored, numbers - floored


def _complaint(given: object, value: float | None, ticks_per_second: int) -> str:
    unit = "epoch seconds" if ticks_per_second == 1 else "epoch milliseconds"
    if given is None:
        return f"no timestamp; every interaction needs its time in {unit}"
    if value is None:
        return f"timestamp {shown(given)} is not a number; write {unit}"
    if value < 0:
        return f"timestamp {shown(given)} is negative; write {unit}, 0 or later"
    hint = "; are these milliseconds?" if ticks_per_second == 1 else ";"
    return f"timestamp {shown(given)} lies past the year 9999{hint} Write {unit}"


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
        """Returns the number of each id of a further piece, String without nulls, int32 [rows]."""
        coded = ids.cast(self._type)
        if self._anchor is None and len(coded):
            self._anchor = coded.head(1)
        return coded.to_physical().cast(pl.Int32).to_numpy()


def factorize(pieces: Iterable[TypedTable]) -> FactorizedLog:
    users, items = IdCoder(), IdCoder()
    columns: tuple[list[np.ndarray], ...] = ([], [], [])
    fractions: list[np.ndarray] = []
    rows = blank_lines = rounded_timestamps = 0
    for piece in pieces:
        height = piece.frame.height
        columns[0].append(users.codes(piece.frame["user"]))
        columns[1].append(items.codes(piece.frame["item"]))
        columns[2].append(piece.frame["timestamp"].to_numpy())
        if piece.fractions is not None or fractions:
            # Before the first piece with fractions, nothing is kept of the others.
            fractions += [] if fractions else [np.zeros(rows, np.float64)]
            fractions.append(np.zeros(height, np.float64) if piece.fractions is None else piece.fractions.to_numpy())
        rows += height
        blank_lines += piece.blank_lines
        rounded_timestamps += piece.rounded_timestamps
    return FactorizedLog(
        *(_joined(parts, dtype) for parts, dtype in zip(columns, (np.int32, np.int32, np.int64), strict=True)),
        fractions=_joined(fractions, np.float64) if fractions else None,
        user_ids=users.ids,
        item_ids=items.ids,
        blank_lines=blank_lines,
        rounded_timestamps=rounded_timestamps,
    )


def _joined(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    """Joins pieces and empties the list, so that at most one column is held twice."""
    whole = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    pieces.clear()
    return whole


def column_names(names: Sequence[str]) -> str:
    """Returns names as messages list them: the first six, each cut, and how many there are."""
    listed = ", ".join(shown(name, 32)[1:-1] for name in names[:6]) or "none"
    return listed if len(names) <= 6 else f"{listed}, .. ({len(names):,} in all)"
