"""Readers of interaction logs: RecBole atomic files, MovieLens, Amazon ratings, KuaiRand, CSV and Parquet.

Every reader ends in the same three columns, user (String), item (String) and timestamp (Int64 seconds), in file order.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from tim4rec_jax.checks import require, shown
from tim4rec_jax.data.delimited import (
    DELIMITERS,
    UNREADABLE,
    find_delimiter,
    header_fields,
    header_line,
    read_fields,
    read_text,
)
from tim4rec_jax.data.sources import Source, expanded, list_sources
from tim4rec_jax.data.typed_columns import Raw, RawLog, check_type, column_names, typed

_PARQUET_ROWS = 2**19  # read at once
_ROW_BYTES = 16  # of a row in numbers, see `coding.CodedLog`

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
_RATING_FIELDS = ("user", "item", "rating", "timestamp")
# How ids of Amazon look; product codes that are ISBNs are numbers like any other.
_AMAZON_USER, _AMAZON_ITEM = r"^A[0-9A-Z]{9,30}$", r"^B0[0-9A-Z]{8}$"
_HEAD_LINES = 1000
# Ratings stay below the one and seconds since 1973 above the other.
_MOST_RATING, _LEAST_EPOCH = 10, 1e8


class LogColumns(NamedTuple):
    """Names of the three columns, and of all fields in their order for files that do not name them.

    Attributes:
      user, item, time: names.
      order: names joined by commas, as in "item,user,rating,timestamp"; None where the file or its format tells.
    """

    user: str = "user"
    item: str = "item"
    time: str = "timestamp"
    order: str | None = None

    @property
    def names(self) -> tuple[str, str, str]:
        """User, item and time."""
        return self.user, self.item, self.time

    @property
    def fields(self) -> list[str]:
        """Names in the order of the fields; none where no order is given."""
        return [name.strip() for name in self.order.split(",")] if self.order else []


def find_log(
    path: str, log_format: str = "auto", columns: LogColumns | None = None, max_unpacked_gb: float | None = None
) -> tuple[list[Source], str]:
    """Finds the log file (KuaiRand: files) at `path` and settles its format.

    Args:
      path: file, folder or zip archive.
      log_format: a `LogFormat`; "auto" goes by file name and then by the first line.
      columns: column names that tell a CSV log.
      max_unpacked_gb: see `DataConfig`.

    Returns:
      The files in reading order, and the format.

    Raises:
      FileNotFoundError: if nothing, or no log, is there.
      ValueError: if several files could be the log, or the format cannot be told.
    """
    sources = list_sources(path, max_unpacked_gb)
    if sources == [Source(expanded(path))]:
        return sources, _format_of(sources[0], columns or LogColumns()) if log_format == "auto" else log_format
    for candidate in _PATTERNS if log_format == "auto" else (log_format,):
        found = [s for s in sources if any(fnmatch.fnmatch(s.name, pattern) for pattern in _PATTERNS[candidate])]
        if len(found) > 1 and candidate != "kuairand":
            raise ValueError(
                f"{path} holds {len(found)} {candidate} files ({column_names([s.name for s in found])}); "
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
    first = source.first_line()
    if columns.order:
        return "csv"
    if "::" in first:
        return "movielens"
    if any(field.endswith((":token", ":float")) for field in first.split("\t")):
        return "recbole"
    fields = [field.strip('"') for field in first.replace("\t", ",").split(",")]
    if set(_KUAIRAND_COLUMNS) <= set(fields):
        return "kuairand"
    if not set(columns.names) <= set(fields) and len(fields) == 4 and all(_is_number(field) for field in fields[2:]):
        return "amazon"
    if any(fnmatch.fnmatch(source.name, pattern) for pattern in _PATTERNS["csv"]):
        return "csv"
    raise ValueError(
        f"the format of {source} cannot be told from its name and first line {shown(first)}; "
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
        require(
            not columns.order or log_format not in ("recbole", "kuairand", "parquet"),
            f"{source}: {log_format} files name their columns; leave data.columns={shown(columns.order)[1:-1]} out",
        )
        rows = 0
        for part in _read_parquet(source, columns) if reader is None else (typed(reader(source, columns)),):
            rows += part.frame.height
            yield part
        if not rows:
            raise ValueError(f"{source} holds no rows below its header; a log needs at least one row")


def _read_recbole(source: Source, columns: LogColumns) -> Raw:
    data = read_text(source)
    header = header_line(data).split("\t")
    if not all(":" in field for field in header) or (len(header) == 1 and header[0].count(":") > 1):
        delimiter = find_delimiter(data)
        hint = f"; this one looks separated by {delimiter!r}" if len(header) == 1 and delimiter in header[0] else ""
        raise ValueError(
            f"{source}:1: wrong header {shown(header)}; a RecBole atomic file starts with tab-separated typed names "
            f"such as user_id:token, item_id:token, timestamp:float{hint}"
        )
    names = [field.split(":", 1)[0] for field in header]
    chosen = []
    for configured, default, known in zip(columns.names, LogColumns().names, _RECBOLE_COLUMNS, strict=True):
        wanted = known if configured == default else (configured,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise ValueError(_missing_column(source, " or ".join(wanted), names))
        chosen.append(_position(source, found, names))
    return Raw(read_fields(data, source, "\t", chosen, has_header=True), source, first_line=2)


def _read_movielens(source: Source, columns: LogColumns) -> Raw:
    if columns.order:
        return _read_unnamed(source, read_text(source), columns)
    data = read_text(source)
    first = header_line(data).strip()
    delimiter = "::" if "::" in first else "\t"
    if len(first.split(delimiter)) != 4:
        raise ValueError(
            f"{source}:1: wrong header {shown(first, 60)}; MovieLens ratings have no header and the four fields "
            f"{', '.join(_RATING_FIELDS)}, separated by '::' or tabs; set data.columns for other fields, or "
            "data.format=csv for a file with a header"
        )
    raw = _read_unnamed(source, data, LogColumns(order=",".join(_RATING_FIELDS)), known=True)
    frame = _users_first(raw.frame)
    return raw if frame is None else raw._replace(frame=frame)


def _read_amazon(source: Source, columns: LogColumns) -> Raw:
    data = read_text(source)
    if columns.order:
        return _read_unnamed(source, data, columns)
    first = header_line(data).strip()
    fields = header_fields(data, find_delimiter(data))
    if len(fields) != 4 or not _is_number(fields[3]):
        raise ValueError(
            f"{source}:1: wrong header {shown(first, 60)}; Amazon ratings have no header and four fields with the time "
            "last; set data.columns for other fields, or data.format=csv for a file with a header"
        )
    raw = _read_unnamed(source, data, LogColumns(order=",".join(_RATING_FIELDS)), known=True)
    frame = _users_first(raw.frame)
    if frame is None:
        raise ValueError(
            f"{source}: the looks of its ids do not tell users from items (first line {shown(first, 60)}); set "
            "data.columns=user,item,rating,timestamp, or item,user,rating,timestamp (Amazon's files of 2018)"
        )
    return raw._replace(frame=frame)


def _users_first(frame: pl.DataFrame) -> pl.DataFrame | None:
    """Exchanges users and items if their ids look like Amazon's the other way round; None where they tell nothing."""
    head = frame.select("user", "item").head(100_000)
    for pattern, first in ((_AMAZON_USER, "user"), (_AMAZON_ITEM, "item")):
        share = {name: head[name].str.contains(pattern).mean() or 0 for name in ("user", "item")}
        other = "item" if first == "user" else "user"
        if share[first] > 0.8 and share[other] < 0.2:
            return frame
        if share[other] > 0.8 and share[first] < 0.2:
            return frame.select(pl.col("item").alias("user"), pl.col("user").alias("item"), "timestamp")
    return None


def _read_unnamed(source: Source, data: bytes, columns: LogColumns, *, known: bool = False) -> Raw:
    """Reads a file without a header by the order of its fields; `known` if that is the format's and not the user's."""
    names = columns.fields
    first = header_line(data)
    # Polars splits on one byte: "::" gives an empty field between two fields.
    step = 2 if len(first.split("::")) == len(names) else 1
    split = {delimiter: header_fields(data, delimiter) for delimiter in (*DELIMITERS, " ")}
    delimiter = ":" if step == 2 else next((d for d, fields in split.items() if len(fields) == len(names)), None)
    if delimiter is None:
        raise ValueError(
            f"{source}:1: the first line {shown(first)} has not the {len(names)} fields of data.columns="
            f"{shown(columns.order)[1:-1]}; name every field, in the order of the file"
        )
    fields = first.split("::") if step == 2 else split[delimiter]
    positions = [names.index(name) for name in columns.names]
    if not _is_number(fields[positions[2]]) and set(names) & set(fields) or not any(map(_is_number, fields)):
        raise ValueError(
            f"{source}:1: {shown(first)} looks like a header; take that line out, or, without data.columns, set "
            "data.format=csv, data.user_column, data.item_column and data.time_column"
        )
    if known:
        _require_times(source, data, "::" if step == 2 else delimiter)
    frame = read_fields(data, source, delimiter, [step * at for at in positions], has_header=False)
    quoted = delimiter != "\t" and b'"' in data
    return Raw(frame, source, first_line=0 if quoted else 1)


def _require_times(source: Source, data: bytes, delimiter: str) -> None:
    """Refuses ratings where the time should be, as told by the first lines: files with the two exchanged exist."""
    lines = data[: 2**16].decode("utf-8", "replace").split("\n")[:_HEAD_LINES]
    rows = [line.split(delimiter) for line in lines if line.count(delimiter) == 3]
    columns = [[float(field) for field in column if _is_number(field)] for column in zip(*rows, strict=True)]
    if not columns or not columns[3] or max(columns[3]) > _MOST_RATING:
        return
    for place, column in enumerate(columns[:3], start=1):
        if len(column) == len(rows) and min(column) > _LEAST_EPOCH:
            raise ValueError(
                f"{source}: field 4, the time, holds {min(columns[3]):g} to {max(columns[3]):g}, and field {place} "
                f"{column[0]:.0f} and the like; name the fields, as in data.columns=user,item,timestamp,rating"
            )


def _read_kuairand(source: Source, columns: LogColumns) -> Raw:
    return _read_csv(source, LogColumns(*_KUAIRAND_COLUMNS))._replace(ticks_per_second=1000)


def _read_csv(source: Source, columns: LogColumns) -> Raw:
    data = read_text(source)
    if columns.order:
        return _read_unnamed(source, data, columns)
    delimiter = find_delimiter(data, columns.names)
    header = header_fields(data, delimiter)
    positions = [_position(source, name, header) for name in columns.names]
    frame = read_fields(data, source, delimiter, positions, has_header=True)
    # A quoted field may hold a line break, so rows are not counted as lines there.
    return Raw(frame, source, 0 if delimiter != "\t" and b'"' in data else 2)


def _read_parquet(source: Source, columns: LogColumns) -> Iterator[RawLog]:
    data = source.seekable()
    try:
        scan = pl.scan_parquet(data, glob=False)
        schema = scan.collect_schema()
        for name in columns.names:
            _position(source, name, schema.names())
            check_type(source, name, schema[name], is_time=name == columns.time)
        scan = scan.select(
            pl.col(columns.user).alias("user"),
            pl.col(columns.item).alias("item"),
            pl.col(columns.time).alias("timestamp"),
        )
        rows = scan.select(pl.len()).collect().item()
        # A few bytes can stand for a billion equal rows.
        source.budget().spend(rows * _ROW_BYTES)
        for first in range(0, rows, _PARQUET_ROWS):
            part = scan.slice(first, _PARQUET_ROWS).collect()
            try:
                part = typed(Raw(part, source, first_line=0, first_row=first))
            except ValueError:
                # Only the whole column tells how many rows lack an id.
                typed(Raw(scan.collect(), source, first_line=0))
                raise
            yield part
    except UNREADABLE as error:
        reason = shown(str(error).partition("\n")[0])[1:-1]
        raise ValueError(f"{source} is not a readable Parquet file ({reason}); write it again") from error


def _position(source: Source, name: str, header: Sequence[str]) -> int:
    if name not in header:
        raise ValueError(_missing_column(source, name, header))
    if header.count(name) > 1:
        raise ValueError(f"{source}: {header.count(name)} columns are called {shown(name)[1:-1]}; rename all but one")
    return header.index(name)


def _missing_column(source: Source, name: str, header: Sequence[str]) -> str:
    name = shown(name)[1:-1]
    if len(header) == 1:
        return (
            f"{source}: no column {name}; its header is the one field {shown(header[0])}: the fields must be separated "
            "by commas or tabs (RecBole: tabs)"
        )
    hint = "set data.user_column, data.item_column and data.time_column"
    if name in [column.strip() for column in header]:
        hint = "the name has spaces around it: take them out of the header"
    elif any(map(_is_number, header)):
        hint = "for a file without a header name its fields, as in data.columns=user,item,rating,timestamp"
    return f"{source}: no column {name}; its columns are {column_names(header)} ({hint})"
