"""Ids and times of a log in one type, whatever type they were stored in; nothing changes without being counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from tim4rec_jax.checks import shown
from tim4rec_jax.data.sources import Source

LATEST_TIMESTAMP = 253_402_300_799  # the last second of the year 9999
_TICKS = {"ms": 10**3, "us": 10**6, "ns": 10**9}
_SECONDS_PER_DAY = 86_400
_EXACT_FLOAT = 2**53  # up to here every whole number is a float64
_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Binary, pl.Null)


@dataclass(frozen=True)
class RawLog:
    """A log as read, before cleaning.

    Attributes:
      frame: user (String), item (String), timestamp (Int64, epoch seconds), in file order.
      blank_lines: lines without any field, left out.
      rounded_timestamps: timestamps with a fraction of a second, rounded down.
      fractions: Float64, of a second, what was rounded down of each row; orders events within a second. None for none.
    """

    frame: pl.DataFrame
    blank_lines: int
    rounded_timestamps: int
    fractions: pl.Series | None = None


class Raw(NamedTuple):
    """Three columns of one file, user, item and timestamp, and where its rows stand, for messages.

    Attributes:
      frame: the columns, of any type that `check_type` lets pass.
      source: the file.
      first_line: line of row 0; 0 where rows are no lines (quoted text, Parquet).
      ticks_per_second: unit of the times.
      first_row: number of row 0, from 0, where rows are no lines.
    """

    frame: pl.DataFrame
    source: Source
    first_line: int
    ticks_per_second: int = 1
    first_row: int = 0

    def where(self, row: int) -> str:
        """Names a row of the file."""
        if self.first_line:
            return f"{self.source}:{self.first_line + row}"
        return f"{self.source}, row {self.first_row + row + 1}"


def check_type(source: Source, name: str, dtype: pl.DataType, *, is_time: bool) -> None:
    """Refuses a column whose values are neither ids nor times.

    Args:
      source: file, for the message.
      name: of the column.
      dtype: of the column.
      is_time: the column holds times, else ids.

    Raises:
      ValueError: for nested, Boolean and other such types.
    """
    if dtype.is_nested():
        raise ValueError(
            f"{source}: column {shown(name)[1:-1]} holds lists or structs ({shown(str(dtype))[1:-1]}), not one value "
            "per row; write one row per event"
        )
    times = dtype.is_temporal() and dtype.base_type() in (pl.Date, pl.Datetime)
    whole = dtype.is_integer() or dtype.is_float() or (dtype.is_decimal() and (is_time or dtype.scale == 0))
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


def typed(raw: Raw) -> RawLog:
    """Gives the three columns their types.

    Raises:
      ValueError: for a missing id, a float id that is no whole number, or a timestamp that is missing, not a number,
        negative or past the year 9999; the message names file and line.
    """
    numbered = raw.frame.with_row_index("row")
    filled = numbered.filter(~pl.all_horizontal(pl.col("user", "item", "timestamp").is_null()))
    ids = {}
    for name in ("user", "item"):
        ids[name], bad = _ids(filled[name], filled["row"], raw, name)
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
    return RawLog(
        frame=pl.DataFrame({**ids, "timestamp": seconds}),
        blank_lines=numbered.height - filled.height,
        # Finer ticks are floored by definition; only a fraction of a second in seconds counts as rounded.
        rounded_timestamps=rounded if raw.ticks_per_second == 1 else 0,
        fractions=fractions if rounded else None,
    )


def _ids(ids: pl.Series, rows: pl.Series, raw: Raw, name: str) -> tuple[pl.Series, int | None]:
    try:
        return id_text(ids)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{raw.where(rows[0])} ff.: a {name} id is no UTF-8 text; write ids as text") from error


def _seconds(times: pl.Series, rows: pl.Series, raw: Raw) -> tuple[pl.Series, pl.Series | None]:
    """Returns whole seconds (Int64), rounded down, and what was left of each (Float64) where there are finer times."""
    ticks, rest = _ticks(times)
    limit = LATEST_TIMESTAMP * raw.ticks_per_second
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
    if dtype == pl.Datetime:
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


def column_names(names: Sequence[str]) -> str:
    """Returns names as messages list them: the first six, each cut, and how many there are."""
    listed = ", ".join(shown(name, 32)[1:-1] for name in names[:6]) or "none"
    return listed if len(names) <= 6 else f"{listed}, .. ({len(names):,} in all)"
