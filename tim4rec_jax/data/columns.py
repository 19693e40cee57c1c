"""The columns of a log in numbers, whatever type they were stored in; nothing changes without being counted.

Columns are given one type a piece of the log at a time, and ids become numbers at once, so that no log is ever held as
text.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.checks import shown
from tim4rec_jax.data.sources import Source
from tim4rec_jax.data.times import TimeReader
from tim4rec_jax.data_config import Condition, TimeUnit

FILE_ORDER = "the file, without times"
_EXACT_FLOAT = 2**53  # up to here every whole number is a float64
_LONGEST_TEXT = 2000  # characters of a bad row that are kept
_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Binary, pl.Null)


class Rules(NamedTuple):
    """How the rows of a log are read, beside the names of its columns.

    Attributes:
      time_unit, time_format: see `DataConfig`.
      separator: of fields of text; None tells it by the header.
      file_order: no times are read, the order of the rows is that of the events.
      conditions: what rows must meet to be read.
      skip_bad: leave out rows that cannot be read, instead of refusing the log.
      presplit: the files say by their names which part they belong to.
    """

    time_unit: TimeUnit = "auto"
    time_format: str | None = None
    separator: str | None = None
    file_order: bool = False
    conditions: tuple[Condition, ...] = ()
    skip_bad: bool = False
    presplit: bool = False


class BadRow(NamedTuple):
    """A row that was left out: its file, its line (or row, from 1), why, and what stands there."""

    file: str
    line: int
    reason: str
    text: str


class Tally:
    """What reading a log has found so far: the form of its times, what was left out and why.

    Attributes:
      rules: see `Rules`.
      times: reads the time column; None where there is none.
      taken: what was told from the files themselves, by what it is about.
      dropped: rows left out, by reason.
      bad: the bad ones of them.
    """

    def __init__(self, rules: Rules | None = None, ticks_per_second: int = 0) -> None:
        self.rules = rules = rules or Rules()
        self.times = None if rules.file_order else TimeReader(rules.time_unit, rules.time_format, ticks_per_second)
        self.taken: dict[str, str] = {"order": FILE_ORDER} if rules.file_order else {}
        self.dropped: Counter[str] = Counter()
        self.bad: list[BadRow] = []

    def add_bad(self, rows: Sequence[BadRow]) -> None:
        """Counts rows that are left out."""
        self.bad += rows
        self.dropped.update(f"bad: {row.reason}" for row in rows)


class Table(NamedTuple):
    """The columns of a file or data frame that are read, and where its rows stand, for messages.

    Attributes:
      frame: user, item and, unless the order is the file's, timestamp; and the columns of conditions, by `extra_name`.
      source: the file, or what to call the data frame.
      first_line: line of row 0; 0 where rows are no lines (quoted text, Parquet).
      first_row: number of row 0, from 0, where rows are no lines.
      numbers: line of each row where they do not follow each other.
      text: the lines, to quote from.
      blank_lines: lines that are no rows of the frame.
    """

    frame: pl.DataFrame
    source: Source | str
    first_line: int
    first_row: int = 0
    numbers: pl.Series | None = None
    text: bytes | None = None
    blank_lines: int = 0

    def number(self, row: int) -> int:
        """Returns the line of a row, or its number, from 1."""
        if self.numbers is not None:
            return int(self.numbers[row])
        return self.first_line + row if self.first_line else self.first_row + row + 1

    def where(self, row: int) -> str:
        """Names a row of the file."""
        return f"{self.source}{':' if self.first_line else ', row '}{self.number(row)}"

    def bad_rows(self, rows: Sequence[int], reason: Callable[[int], str]) -> list[BadRow]:
        """Describes rows that are left out."""
        lines = self.text.split(b"\n") if self.text is not None and self.first_line else None
        found = []
        for row in rows:
            number = self.number(row)
            if lines is None:
                text = json.dumps(self.frame.row(row, named=True), default=str, ensure_ascii=False)
            else:
                text = lines[number - 1].rstrip(b"\r").decode("utf-8", "replace")
            found.append(BadRow(str(self.source), number, reason(row), text[:_LONGEST_TEXT]))
        return found


class TypedTable(NamedTuple):
    """A piece of a log: user and item (String) and timestamp (Int64 seconds), and what `FactorizedLog` counts.

    `fractions` is Float64, of a second, what was rounded down of each row; None for none. `rows_read` are those that
    were not blank, also where conditions have left them out; `part` is 0, 1, 2: trains, validates, tests.
    """

    frame: pl.DataFrame
    blank_lines: int
    rounded_timestamps: int
    fractions: pl.Series | None
    rows_read: int
    part: int = 0


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
      parts: int8 [rows], 0 trains, 1 validates, 2 tests, where the files say so; else None.
      dropped: further rows left out, by reason.
      taken: what reading told from the files themselves.
      bad_rows: the bad ones of the rows left out.
    """

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    fractions: np.ndarray | None
    user_ids: pl.Series
    item_ids: pl.Series
    blank_lines: int
    rounded_timestamps: int
    parts: np.ndarray | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    bad_rows: list[BadRow] = field(default_factory=list)


def extra_name(column: str) -> str:
    """Returns what a `Table` calls a column that a condition reads."""
    return f"where {column}"


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


def id_text(ids: pl.Series) -> pl.Series:
    """Returns ids as text, whole floats as whole numbers ("1"); null for a float that is no whole number."""
    if not ids.dtype.is_float():
        return ids.cast(pl.String)
    numbers = ids.cast(pl.Float64)
    whole = (numbers == numbers.floor()) & (numbers.abs() <= _EXACT_FLOAT)
    return numbers.set(~whole.fill_null(False), None).cast(pl.Int64).cast(pl.String)


class _Selection:
    """The rows of a piece that are still in, and what became of the others."""

    def __init__(self, raw: Table, tally: Tally, rows: pl.Series) -> None:
        self._raw, self._tally, self._rows = raw, tally, rows
        self.alive = np.ones(len(rows), bool)

    def drop(self, mask: pl.Series, reason: str) -> None:
        """Leaves out rows that nothing is wrong with."""
        gone = self.alive & mask.to_numpy()
        self._tally.dropped[reason] += int(gone.sum())
        self.alive &= ~gone

    def refuse(self, mask: pl.Series, describe: Callable[[int], tuple[str, str]]) -> None:
        """Leaves out bad rows, or refuses the log for the first: `describe` gives the reason and a sentence."""
        bad = np.flatnonzero(self.alive & mask.to_numpy())
        if not len(bad):
            return
        if not self._tally.rules.skip_bad:
            raise ValueError(f"{self._raw.where(self._rows[int(bad[0])])}: {describe(int(bad[0]))[1]}")
        reasons = {self._rows[int(row)]: describe(int(row))[0] for row in bad}
        self._tally.add_bad(self._raw.bad_rows(list(reasons), reasons.__getitem__))
        self.alive[bad] = False


def typed(raw: Table, tally: Tally) -> TypedTable:
    """Gives the columns their types; rows that conditions leave out need not be good ones."""
    numbered = raw.frame.with_row_index("row")
    read = [name for name in ("user", "item", "timestamp") if name in raw.frame.columns]
    filled = numbered.filter(~pl.all_horizontal(pl.col(read).is_null()))
    selection = _Selection(raw, tally, filled["row"])
    conditions = tally.rules.conditions
    for condition in conditions:
        if extra_name(condition.column) in filled.columns:
            _apply(condition, filled[extra_name(condition.column)], selection)
    ids = {name: _ids(name, filled[name], raw, filled["row"], selection) for name in ("user", "item")}
    if tally.times is None:
        seconds, fractions = pl.repeat(0, filled.height, eager=True, dtype=pl.Int64), None
    else:
        seconds, fractions = _seconds(filled["timestamp"], raw, tally.times, selection)
        for condition in conditions:
            if extra_name(condition.column) not in filled.columns:
                selection.drop(~_times_meet(condition, seconds, fractions), f"where {condition}")
    frame = pl.DataFrame({**ids, "timestamp": seconds})
    if not selection.alive.all():
        frame = frame.filter(selection.alive)
        fractions = None if fractions is None else fractions.filter(pl.Series(selection.alive))
    rounded = 0 if fractions is None else int((fractions > 0).sum())
    return TypedTable(
        frame,
        blank_lines=raw.blank_lines + numbered.height - filled.height,
        rounded_timestamps=rounded if tally.times is not None and tally.times.counts_fractions else 0,
        fractions=fractions if rounded else None,
        rows_read=filled.height,
    )


def _ids(name: str, given: pl.Series, raw: Table, rows: pl.Series, selection: _Selection) -> pl.Series:
    try:
        ids = id_text(given)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{raw.where(rows[0])} ff.: a {name} id is no UTF-8 text; write ids as text") from error
    if given.dtype.is_float():
        selection.refuse(
            ids.is_null() & given.is_not_null(),
            lambda row: (
                f"{name} id is no whole number",
                f"{name} id {given[row]} is a float that is no whole number; write ids as text or whole numbers",
            ),
        )
    missing = ids.is_null() | (ids == "")
    selection.refuse(
        missing,
        lambda _: (
            f"no {name} id",
            f"no {name} id ({missing.sum()} such rows); every interaction needs a user and an item",
        ),
    )
    return ids


def _seconds(
    times: pl.Series, raw: Table, reader: TimeReader, selection: _Selection
) -> tuple[pl.Series, pl.Series | None]:
    # What conditions have left out has no say in what the times are.
    if not selection.alive.all():
        times = times.set(pl.Series(~selection.alive), None)
    seconds = reader.read(times, str(raw.source))
    strange = reader.of_another_unit(seconds)
    selection.refuse(seconds.whole.is_null() | strange, lambda row: reader.complaint(times[row], seconds.read[row]))
    return seconds.whole, seconds.fractions


def _apply(condition: Condition, values: pl.Series, selection: _Selection) -> None:
    """Applies a condition on a column other than the time; a row without a value there does not meet it."""
    text = values.cast(pl.String, strict=False)
    filled = (text != "").fill_null(False)
    numbers = values if values.dtype.is_numeric() else text.str.strip_chars()
    numbers = numbers.cast(pl.Float64, strict=False).fill_nan(None)
    if condition.number is None:
        # A value equals another by its letters or, where both are numbers, as a number: 4 and 4.0.
        equal = (text.is_in(list(condition.values)) | numbers.is_in(list(condition.numbers)).fill_null(False)) & filled
        selection.drop((equal | ~filled) if condition.negated else ~equal, f"where {condition}")
        return
    selection.refuse(
        numbers.is_null() & filled,
        lambda row: (
            f"{condition.column} is no number",
            f"{condition.column} {shown(values[row])} is no number, and data.where compares it to "
            f"{condition.number:g}; write numbers, or compare with = or in",
        ),
    )
    selection.drop(~(condition.compare(numbers).fill_null(False) & filled), f"where {condition}")


def _times_meet(condition: Condition, seconds: pl.Series, fractions: pl.Series | None) -> pl.Series:
    """Compares exact times with a moment: seconds from it, in which no digit of a fraction is lost."""
    assert condition.number is not None
    whole = math.floor(condition.number)
    after = (seconds - whole).cast(pl.Float64)
    after = after if fractions is None else after + fractions
    return condition.compare(after, condition.number - whole).fill_null(False)


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


def factorize(pieces: Iterable[TypedTable], tally: Tally) -> FactorizedLog:
    """Numbers the ids of all pieces of a log."""
    users, items = IdCoder(), IdCoder()
    columns: tuple[list[np.ndarray], ...] = ([], [], [])
    fractions: list[np.ndarray] = []
    parts: list[np.ndarray] = []
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
        if tally.rules.presplit:
            parts.append(np.full(height, piece.part, np.int8))
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
        parts=_joined(parts, np.int8) if tally.rules.presplit else None,
        dropped=dict(tally.dropped),
        taken=tally.taken | ({"times": tally.times.taken} if tally.times is not None and tally.times.taken else {}),
        bad_rows=tally.bad,
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
