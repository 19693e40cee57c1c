"""Readers of interaction logs: RecBole atomic files, MovieLens, Amazon ratings, KuaiRand, CSV and Parquet.

Every reader ends in the same three columns, user (String), item (String) and timestamp (Int64 seconds), in file order.
"""

import fnmatch
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from tim4rec_jax.data.sources import Source, list_sources

LATEST_TIMESTAMP = 253_402_300_799  # the last second of the year 9999
_PARQUET_ROWS = 2**19  # read at once
# Polars panics over some damaged Parquet files, and its panics are no exceptions.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException)

_PATTERNS = {
    "recbole": ("*.inter", "*.inter.gz"),
    "movielens": ("ratings.dat", "u.data"),
    "kuairand": ("log_*.csv", "log_*.csv.gz"),
    "amazon": ("*.csv", "*.csv.gz"),
    "parquet": ("*.parquet", "*.pq"),
    "csv": ("*.csv", "*.csv.gz", "*.tsv", "*.tsv.gz"),
}
_RECBOLE_COLUMNS = (("user_id",), ("item_id", "product_id"), ("timestamp",))
_KUAIRAND_COLUMNS = ("user_id", "video_id", "time_ms")
_MOVIELENS_FIELDS = "user, item, rating, timestamp"


class LogColumns(NamedTuple):
    """Names of the three columns in files that name them."""

    user: str = "user"
    item: str = "item"
    time: str = "timestamp"


@dataclass(frozen=True)
class RawLog:
    """A log as read, before cleaning.

    Attributes:
      frame: user (String), item (String), timestamp (Int64, epoch seconds), in file order.
      blank_lines: lines without any field, left out.
      rounded_timestamps: timestamps with a fraction of a second, rounded down.
      fractions: Float32, of a second, what was rounded down of each row; orders events within a second. None for none.
    """

    frame: pl.DataFrame
    blank_lines: int
    rounded_timestamps: int
    fractions: pl.Series | None = None


class _Raw(NamedTuple):
    """Three untyped columns of one file and where its rows stand, for messages."""

    frame: pl.DataFrame
    source: Source
    first_line: int  # line of row 0; 0 where rows are no lines (quoted text, Parquet)
    ticks_per_second: int = 1
    first_row: int = 0

    def where(self, row: int) -> str:
        if self.first_line:
            return f"{self.source}:{self.first_line + row}"
        return f"{self.source}, row {self.first_row + row + 1}"


def find_log(path: str, log_format: str = "auto", columns: LogColumns | None = None) -> tuple[list[Source], str]:
    """Finds the log file (KuaiRand: files) at `path` and settles its format.

    Args:
      path: file, folder or zip archive.
      log_format: a `LogFormat`; "auto" goes by file name and then by the first line.
      columns: column names that tell a CSV log.

    Returns:
      The files in reading order, and the format.

    Raises:
      FileNotFoundError: if nothing, or no log, is there.
      ValueError: if several files could be the log, or the format cannot be told.
    """
    sources = list_sources(path)
    if sources == [Source(pathlib.Path(path).expanduser())]:
        return sources, _format_of(sources[0], columns or LogColumns()) if log_format == "auto" else log_format
    for candidate in _PATTERNS if log_format == "auto" else (log_format,):
        found = [s for s in sources if any(fnmatch.fnmatch(s.name, pattern) for pattern in _PATTERNS[candidate])]
        if len(found) > 1 and candidate != "kuairand":
            raise ValueError(
                f"{path} holds {len(found)} {candidate} files ({', '.join(s.name for s in found[:5])}); "
                "name one of them in data.path"
            )
        if found and log_format == "auto" and candidate in ("amazon", "csv"):
            return found, _format_of(found[0], columns or LogColumns())
        if found:
            return found, candidate
    wanted = {pattern for f in (_PATTERNS if log_format == "auto" else (log_format,)) for pattern in _PATTERNS[f]}
    raise FileNotFoundError(f"{path} holds no interaction log; looked for {', '.join(sorted(wanted))}")


def _format_of(source: Source, columns: LogColumns) -> str:
    for name in ("recbole", "movielens", "parquet"):
        if any(fnmatch.fnmatch(source.name, pattern) for pattern in _PATTERNS[name]):
            return name
    first = source.read().split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    if "::" in first:
        return "movielens"
    if any(field.endswith((":token", ":float")) for field in first.split("\t")):
        return "recbole"
    fields = first.replace("\t", ",").split(",")
    if set(_KUAIRAND_COLUMNS) <= set(fields):
        return "kuairand"
    if not set(columns) <= set(fields) and len(fields) == 4 and all(_is_number(field) for field in fields[2:]):
        return "amazon"
    if any(fnmatch.fnmatch(source.name, pattern) for pattern in _PATTERNS["csv"]):
        return "csv"
    raise ValueError(
        f"the format of {source} cannot be told from its name and first line {first[:120]!r}; "
        f"set data.format to one of {', '.join(_PATTERNS)}"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_log(sources: Sequence[Source], log_format: str, columns: LogColumns | None = None) -> RawLog:
    """Reads log files of a known format, one after the other.

    KuaiRand: every row counts as an interaction, whatever its `is_click`; the published statistics (23,951 users, 7,111
    items, 1,134,420 rows after 5-core) are those of `log_standard_4_08_to_4_21_pure.csv` taken so. `time_ms` is floored
    to seconds. Other timestamps may be written as decimals; a fraction of a second is rounded down and counted.

    Args:
      sources: files, as `find_log` gives them.
      log_format: a `LogFormat` other than "auto".
      columns: column names in CSV and Parquet files; names that differ from the defaults count in RecBole files too.

    Returns:
      The log.

    Raises:
      ValueError: for a missing column or wrong header, an empty file, a missing id, or a timestamp that is missing, not
        a number, negative or past the year 9999; the message names file and line.
    """
    logs = list(read_parts(sources, log_format, columns))
    return RawLog(
        frame=pl.concat([log.frame for log in logs]),
        blank_lines=sum(log.blank_lines for log in logs),
        rounded_timestamps=sum(log.rounded_timestamps for log in logs),
    )


def read_parts(sources: Sequence[Source], log_format: str, columns: LogColumns | None = None) -> Iterator[RawLog]:
    """Reads the log of `read_log` in pieces: a file, or of Parquet half a million rows at a time.

    Raises:
      ValueError: as `read_log`, at the latest when the file's last piece has been taken.
    """
    reader = {
        "recbole": _read_recbole,
        "movielens": _read_movielens,
        "amazon": _read_amazon,
        "kuairand": _read_kuairand,
        "csv": _read_csv,
    }.get(log_format)
    columns = columns or LogColumns()
    for source in sources:
        rows = 0
        for part in _read_parquet(source, columns) if reader is None else (_typed(reader(source, columns)),):
            rows += part.frame.height
            yield part
        if not rows:
            raise ValueError(f"{source} holds no rows below its header; a log needs at least one row")


def _read_recbole(source: Source, columns: LogColumns) -> _Raw:
    data = source.read()
    header = data.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r").split("\t")
    if not all(":" in field for field in header):
        raise ValueError(
            f"{source}:1: wrong header {header[:6]}; a RecBole atomic file starts with tab-separated typed names such "
            "as user_id:token, item_id:token, timestamp:float"
        )
    typed_names = {field.split(":", 1)[0]: field for field in header}
    chosen = []
    for configured, default, known in zip(columns, LogColumns(), _RECBOLE_COLUMNS, strict=True):
        names = known if configured == default else (configured,)
        found = next((name for name in names if name in typed_names), None)
        if found is None:
            raise ValueError(_missing_column(source, " or ".join(names), list(typed_names)))
        chosen.append(header.index(typed_names[found]))
    return _Raw(_delimited(data, source, "\t", chosen, has_header=True), source, first_line=2)


def _read_movielens(source: Source, columns: LogColumns) -> _Raw:
    data = source.read()
    first = data.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    delimiter = "::" if "::" in first else "\t"
    if len(first.split(delimiter)) != 4:
        raise ValueError(
            f"{source}:1: wrong header {first[:120]!r}; MovieLens ratings have no header and the four fields "
            f"{_MOVIELENS_FIELDS}, separated by '::' (ratings.dat) or tabs (u.data)"
        )
    # Polars splits on one byte: "::" gives an empty field between two fields.
    positions = (0, 2, 6) if delimiter == "::" else (0, 1, 3)
    return _Raw(_delimited(data, source, delimiter[0], positions, has_header=False), source, first_line=1)


def _read_amazon(source: Source, columns: LogColumns) -> _Raw:
    data = source.read()
    first = data.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    fields = first.split(",")
    if len(fields) != 4 or not _is_number(fields[3]):
        raise ValueError(
            f"{source}:1: wrong header {first[:120]!r}; Amazon ratings have no header and the four fields "
            "user,item,rating,timestamp (for a CSV with named columns set data.format=csv)"
        )
    return _Raw(_delimited(data, source, ",", (0, 1, 3), has_header=False), source, first_line=1)


def _read_kuairand(source: Source, columns: LogColumns) -> _Raw:
    return _read_csv(source, LogColumns(*_KUAIRAND_COLUMNS))._replace(ticks_per_second=1000)


def _read_csv(source: Source, columns: LogColumns) -> _Raw:
    data = source.read()
    first = data.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    delimiter = "\t" if "\t" in first and "," not in first else ","
    header = [field.strip('"') for field in first.split(delimiter)]
    for name in columns:
        if name not in header:
            raise ValueError(_missing_column(source, name, header))
    positions = [header.index(name) for name in columns]
    # A quoted field may hold a line break, so rows are not counted as lines there.
    return _Raw(_delimited(data, source, delimiter, positions, has_header=True), source, 0 if b'"' in data else 2)


def _read_parquet(source: Source, columns: LogColumns) -> Iterator[RawLog]:
    data = source.seekable()
    try:
        scan = pl.scan_parquet(data)
        header = scan.collect_schema().names()
        for name in columns:
            if name not in header:
                raise ValueError(_missing_column(source, name, header))
        scan = scan.select(
            pl.col(columns.user).cast(pl.String).alias("user"),
            pl.col(columns.item).cast(pl.String).alias("item"),
            pl.col(columns.time).alias("timestamp"),
        )
        for first in range(0, scan.select(pl.len()).collect().item(), _PARQUET_ROWS):
            rows = scan.slice(first, _PARQUET_ROWS).collect()
            try:
                part = _typed(_Raw(rows, source, first_line=0, first_row=first))
            except ValueError:
                # Only the whole column tells how many rows lack an id.
                _typed(_Raw(scan.collect(), source, first_line=0))
                raise
            yield part
    except UNREADABLE as error:
        raise ValueError(f"{source} is not a readable Parquet file ({error}); write it again") from error


def _missing_column(source: Source, name: str, header: Sequence[str]) -> str:
    return (
        f"{source}: no column {name}; its columns are {', '.join(header)} "
        "(set data.user_column, data.item_column and data.time_column)"
    )


def _delimited(data: bytes, source: Source, delimiter: str, positions: Sequence[int], has_header: bool) -> pl.DataFrame:
    quoted = delimiter == "," and b'"' in data
    wanted = sorted(positions)
    try:
        frame = pl.read_csv(
            data,
            separator=delimiter,
            has_header=has_header,
            infer_schema=False,
            quote_char='"' if quoted else None,
            # With quotes fields cannot be counted by separators: polars must see every column to miss none.
            columns=None if quoted else wanted,
        )
    except UNREADABLE as error:
        raise ValueError(f"{source} cannot be read as a table separated by {delimiter!r} ({error})") from error
    if not quoted:
        _require_no_extra_fields(data, source, delimiter, frame.height + has_header)
    columns = positions if quoted else [wanted.index(position) for position in positions]
    return pl.DataFrame(
        [frame.to_series(i).alias(n) for i, n in zip(columns, ("user", "item", "timestamp"), strict=True)]
    )


def _require_no_extra_fields(data: bytes, source: Source, delimiter: str, lines: int) -> None:
    mark = delimiter.encode()
    per_line = data.split(b"\n", 1)[0].count(mark)
    if data.count(mark) == lines * per_line:
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.count(mark) > per_line:
            raise ValueError(
                f"{source}:{number}: {line.count(mark) + 1} fields, the first line has {per_line + 1}; "
                f"remove the extra {delimiter!r}"
            )


def _typed(raw: _Raw) -> RawLog:
    numbered = raw.frame.with_row_index("row")
    filled = numbered.filter(~pl.all_horizontal(pl.col("user", "item", "timestamp").is_null()))
    for name in ("user", "item"):
        missing = filled.filter(pl.col(name).is_null() | (pl.col(name) == ""))
        if missing.height:
            raise ValueError(
                f"{raw.where(missing['row'][0])}: no {name} id ({missing.height} such rows); "
                "every interaction needs a user and an item"
            )
    seconds, fractions = _seconds(filled["timestamp"], filled["row"], raw)
    rounded = 0 if fractions is None else int((fractions > 0).sum())
    return RawLog(
        frame=filled.select("user", "item", timestamp=seconds),
        blank_lines=numbered.height - filled.height,
        # Finer ticks are floored by definition; only a fraction of a second in seconds counts as rounded.
        rounded_timestamps=rounded if raw.ticks_per_second == 1 else 0,
        fractions=fractions if rounded else None,
    )


def _seconds(times: pl.Series, rows: pl.Series, raw: _Raw) -> tuple[pl.Series, pl.Series | None]:
    """Returns whole seconds (Int64), rounded down, and what was left of each (Float32) where there are finer times."""
    values = _numbers(times)
    limit = LATEST_TIMESTAMP * raw.ticks_per_second
    bad = (~((values >= 0) & (values <= limit)).fill_null(False)).arg_true()
    if len(bad):
        first = bad[0]
        raise ValueError(f"{raw.where(rows[first])}: {_complaint(times[first], values[first], raw.ticks_per_second)}")
    if values.dtype == pl.Int64 and raw.ticks_per_second == 1:
        return values, None
    seconds = (values // raw.ticks_per_second).cast(pl.Int64)
    return seconds, (values % raw.ticks_per_second / raw.ticks_per_second).cast(pl.Float32)


def _numbers(times: pl.Series) -> pl.Series:
    if times.dtype in (pl.Date, pl.Datetime):
        return times.cast(pl.Datetime("us")).dt.epoch("us") / 1_000_000
    if times.dtype.is_float():
        # In polars NaN is the largest number, so it would pass for a late time.
        return times.cast(pl.Float64).fill_nan(None)
    integers = times.cast(pl.Int64, strict=False)
    if integers.null_count() == times.null_count():
        return integers
    text = times.cast(pl.String).str.strip_chars()
    return text.cast(pl.Float64, strict=False).fill_nan(None)


def _complaint(given: object, value: float | None, ticks_per_second: int) -> str:
    unit = "epoch seconds" if ticks_per_second == 1 else "epoch milliseconds"
    if given is None:
        return f"no timestamp; every interaction needs its time in {unit}"
    if value is None:
        return f"timestamp {given!r} is not a number; write {unit}"
    if value < 0:
        return f"timestamp {given!r} is negative; write {unit}, 0 or later"
    hint = "; are these milliseconds?" if ticks_per_second == 1 else ";"
    return f"timestamp {given!r} lies past the year 9999{hint} Write {unit}"
