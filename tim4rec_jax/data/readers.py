"""Readers of interaction logs: RecBole atomic files, MovieLens, Amazon ratings, KuaiRand, CSV, Parquet, data frames.

Every reader ends in three columns, user, item and time, in the order of the rows, with every line accounted for.
"""

import csv
import fnmatch
import io
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.checks import require, shown
from tim4rec_jax.data.columns import FactorizedLog, Table, TypedTable, check_type, column_names, factorize, typed
from tim4rec_jax.data.sources import Source, expanded, list_sources

# Polars panics over some damaged files, and its panics are no exceptions.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
DELIMITERS = (",", "\t", ";", "|")
_QUOTE = ord('"')
_QUOTES_BLOCK = 2**26
_CARRIAGE_RETURN = (
    "a carriage return inside the line; end lines with a line feed, and take carriage returns out of the fields"
)
_PIECE_ROWS = 2**19  # of a Parquet file or data frame, typed at once
_ROW_BYTES = 16  # of a row in numbers, see `FactorizedLog`

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


def _matches(source: Source, log_format: str) -> bool:
    return any(fnmatch.fnmatch(source.name, pattern) for pattern in _PATTERNS[log_format])


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
        found = [source for source in sources if _matches(source, candidate)]
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
        if _matches(source, name):
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
    if _matches(source, "csv"):
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


def read_log(sources: Sequence[Source], log_format: str, columns: LogColumns | None = None) -> FactorizedLog:
    """Reads log files of a known format, one after the other.

    KuaiRand: every row counts as an interaction, whatever its `is_click`; the published statistics (23,951 users, 7,111
    items, 1,134,420 rows after 5-core) are those of `log_standard_4_08_to_4_21_pure.csv` taken so. `time_ms` is floored
    to seconds. Other timestamps may be written as decimals; a fraction of a second is rounded down and counted.

    Args:
      sources: files, as `find_log` gives them.
      log_format: a `LogFormat` other than "auto".
      columns: column names in CSV and Parquet files; names that differ from the defaults count in RecBole files too.

    Raises:
      ValueError: for a missing column or wrong header, an empty file, a missing id, or a timestamp that is missing, not
        a number, negative or past the year 9999; the message names file and line.
    """
    return factorize(_pieces(sources, log_format, columns or LogColumns()))


def read_frame(frame: pl.DataFrame, columns: LogColumns | None = None, name: str = "data frame") -> FactorizedLog:
    """Reads a log from the columns of a data frame, as `read_log` does from those of a Parquet file.

    Args:
      frame: a column of users, one of items and one of times, of any types that a Parquet file may have there.
      columns: their names; None takes user or user_id, item, item_id or product_id, and timestamp.
      name: of the frame, for messages.

    Raises:
      ValueError: for a missing column, no rows, a missing id, or a bad time; the message names the row, from 1.
    """
    if columns is None:
        choices = zip(LogColumns().names, _RECBOLE_COLUMNS, strict=True)
        found = ([c for c in (usual, *known) if c in frame.columns][:1] or [usual] for usual, known in choices)
        columns = LogColumns(*(name for (name,) in found))
    require(frame.height > 0, f"{name}: the log has no rows")
    return factorize(_typed_slices(frame.lazy(), name, columns))


def _pieces(sources: Sequence[Source], log_format: str, columns: LogColumns) -> Iterator[TypedTable]:
    """Yields a file at a time, or of Parquet half a million rows."""
    reader = {
        "recbole": _read_recbole,
        "movielens": _read_movielens,
        "amazon": _read_amazon,
        "kuairand": _read_kuairand,
        "csv": _read_csv,
    }.get(log_format)
    for source in sources:
        require(
            not columns.order or log_format not in ("recbole", "kuairand", "parquet"),
            f"{source}: {log_format} files name their columns; leave data.columns={shown(columns.order)[1:-1]} out",
        )
        rows = 0
        for piece in _read_parquet(source, columns) if reader is None else (typed(reader(source, columns)),):
            rows += piece.frame.height
            yield piece
        require(rows > 0, f"{source} holds no rows below its header; a log needs at least one row")


def _read_recbole(source: Source, columns: LogColumns) -> Table:
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
    return Table(read_fields(data, source, "\t", chosen, has_header=True), source, first_line=2)


def _read_movielens(source: Source, columns: LogColumns) -> Table:
    return _read_ratings(source, columns, amazon=False)


def _read_amazon(source: Source, columns: LogColumns) -> Table:
    return _read_ratings(source, columns, amazon=True)


def _read_ratings(source: Source, columns: LogColumns, *, amazon: bool) -> Table:
    data = read_text(source)
    if columns.order:
        return _read_unnamed(source, data, columns)
    first = header_line(data).strip()
    if amazon:
        fields = header_fields(data, find_delimiter(data))
        fits = len(fields) == 4 and _is_number(fields[3])
        wanted = "Amazon ratings have no header and four fields with the time last"
    else:
        fits = len(first.split("::" if "::" in first else "\t")) == 4
        names = ", ".join(_RATING_FIELDS)
        wanted = f"MovieLens ratings have no header and the four fields {names}, separated by '::' or tabs"
    require(
        fits,
        f"{source}:1: wrong header {shown(first, 60)}; {wanted}; set data.columns for other fields, or data.format=csv "
        "for a file with a header",
    )
    raw = _read_unnamed(source, data, LogColumns(order=",".join(_RATING_FIELDS)), known=True)
    frame = _users_first(raw.frame)
    require(
        frame is not None or not amazon,
        f"{source}: the looks of its ids do not tell users from items (first line {shown(first, 60)}); set "
        "data.columns=user,item,rating,timestamp, or item,user,rating,timestamp (Amazon's files of 2018)",
    )
    return raw if frame is None else raw._replace(frame=frame)


def _users_first(frame: pl.DataFrame) -> pl.DataFrame | None:
    """Exchanges users and items if their ids look like Amazon's the other way round; None where they tell nothing."""
    for pattern, first in ((_AMAZON_USER, "user"), (_AMAZON_ITEM, "item")):
        found = frame.select("user", "item").head(100_000).select(pl.all().str.contains(pattern).mean().fill_null(0))
        share = found.row(0, named=True)
        other = "item" if first == "user" else "user"
        if share[first] > 0.8 and share[other] < 0.2:
            return frame
        if share[other] > 0.8 and share[first] < 0.2:
            return frame.select(pl.col("item").alias("user"), pl.col("user").alias("item"), "timestamp")
    return None


def _read_unnamed(source: Source, data: bytes, columns: LogColumns, *, known: bool = False) -> Table:
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
    return Table(frame, source, first_line=0 if quoted else 1)


def _require_times(source: Source, data: bytes, delimiter: str) -> None:
    """Refuses ratings where the time should be, as told by the first lines: files with the two exchanged exist."""
    lines = data[: 2**16].decode("utf-8", "replace").split("\n")[:_HEAD_LINES]
    rows = [line.split(delimiter) for line in lines if line.count(delimiter) == 3]
    columns = [[float(field) for field in column if _is_number(field)] for column in zip(*rows, strict=True)]
    if not columns or not columns[3] or max(columns[3]) > _MOST_RATING:
        return
    for number, column in enumerate(columns[:3], start=1):
        if len(column) == len(rows) and min(column) > _LEAST_EPOCH:
            raise ValueError(
                f"{source}: field 4, the time, holds {min(columns[3]):g} to {max(columns[3]):g}, and field {number} "
                f"{column[0]:.0f} and the like; name the fields, as in data.columns=user,item,timestamp,rating"
            )


def _read_kuairand(source: Source, _: LogColumns) -> Table:
    return _read_csv(source, LogColumns(*_KUAIRAND_COLUMNS))._replace(ticks_per_second=1000)


def _read_csv(source: Source, columns: LogColumns) -> Table:
    data = read_text(source)
    if columns.order:
        return _read_unnamed(source, data, columns)
    delimiter = find_delimiter(data, columns.names)
    header = header_fields(data, delimiter)
    positions = [_position(source, name, header) for name in columns.names]
    frame = read_fields(data, source, delimiter, positions, has_header=True)
    # A quoted field may hold a line break, so rows are not counted as lines there.
    return Table(frame, source, 0 if delimiter != "\t" and b'"' in data else 2)


def _read_parquet(source: Source, columns: LogColumns) -> Iterator[TypedTable]:
    data = source.seekable()
    try:
        scan = pl.scan_parquet(data, glob=False)
        # A few bytes can stand for a billion equal rows.
        source.budget().spend(scan.select(pl.len()).collect().item() * _ROW_BYTES)
        yield from _typed_slices(scan, source, columns)
    except UNREADABLE as error:
        reason = shown(str(error).partition("\n")[0])[1:-1]
        raise ValueError(f"{source} is not a readable Parquet file ({reason}); write it again") from error


def _typed_slices(scan: pl.LazyFrame, source: Source | str, columns: LogColumns) -> Iterator[TypedTable]:
    schema = scan.collect_schema()
    for name in columns.names:
        _position(source, name, schema.names())
        check_type(source, name, schema[name], is_time=name == columns.time)
    named = zip(columns.names, ("user", "item", "timestamp"), strict=True)
    scan = scan.select(pl.col(name).alias(alias) for name, alias in named)
    for first in range(0, scan.select(pl.len()).collect().item(), _PIECE_ROWS):
        piece = scan.slice(first, _PIECE_ROWS).collect()
        try:
            checked = typed(Table(piece, source, first_line=0, first_row=first))
        except ValueError:
            # Only the whole column tells how many rows lack an id.
            typed(Table(scan.collect(), source, first_line=0))
            raise
        yield checked


def _position(source: Source | str, name: str, header: Sequence[str]) -> int:
    if name not in header:
        raise ValueError(_missing_column(source, name, header))
    if header.count(name) > 1:
        raise ValueError(f"{source}: {header.count(name)} columns are called {shown(name)[1:-1]}; rename all but one")
    return header.index(name)


def _missing_column(source: Source | str, name: str, header: Sequence[str]) -> str:
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


def read_text(source: Source) -> bytes:
    """Returns the content of a file of text.

    Raises:
      ValueError: as `Source.read`, and where the first line is blank or carriage returns alone end the lines.
    """
    data = source.read()
    first = header_line(data)
    if not first.strip():
        raise ValueError(f"{source}:1: the first line is blank; take it out")
    if "\r" in first:
        raise ValueError(f"{source}:1: {_CARRIAGE_RETURN}")
    return data


def header_line(data: bytes) -> str:
    """Returns the first line without its end."""
    end = data.find(b"\n")
    return (data if end < 0 else data[:end]).decode("utf-8", "replace").rstrip("\r")


def header_fields(data: bytes, delimiter: str) -> list[str]:
    """Splits the first line into fields; quotes around them are taken off."""
    line = header_line(data)
    if delimiter == "\t" or '"' not in line:
        return [field.strip('"') for field in line.split(delimiter)]
    try:
        return next(csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8", "replace", newline=""), delimiter=delimiter))
    except csv.Error:  # A field longer than a header has.
        return line.split(delimiter)


def find_delimiter(data: bytes, names: Sequence[str] = ()) -> str:
    """Returns the delimiter of the header that has all the names, else the one that gives the most fields."""
    line = header_line(data)
    named = (
        d for d in DELIMITERS if names and all(n in line for n in names) and set(names) <= set(header_fields(data, d))
    )
    return next(named, None) or max(DELIMITERS, key=line.count)


def read_fields(
    data: bytes, source: Source, delimiter: str, positions: Sequence[int], *, has_header: bool
) -> pl.DataFrame:
    """Reads three fields of every line.

    Args:
      data: the text; with tabs a quote is a character, with other delimiters a field may stand in quotes.
      source: its file, for messages.
      delimiter: one character.
      positions: of the user, the item and the time.
      has_header: the first line is left out.

    Returns:
      user, item and timestamp, all String; null where a line has no such field or an empty one.

    Raises:
      ValueError: for more fields than the first line has, a stray quote or carriage return; the message names the line.
    """
    quoted = _is_quoted(data, source, delimiter)
    _require_line_feeds(data, source, quoted)
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
        reason = shown(str(error).partition("\n")[0])[1:-1]
        raise ValueError(f"{source} cannot be read as a table separated by {delimiter!r} ({reason})") from error
    if not quoted:
        _require_no_extra_fields(data, source, delimiter, frame.height + has_header)
    columns = positions if quoted else [wanted.index(position) for position in positions]
    return pl.DataFrame(
        [frame.to_series(i).alias(n) for i, n in zip(columns, ("user", "item", "timestamp"), strict=True)]
    )


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _is_quoted(data: bytes, source: Source, delimiter: str) -> bool:
    """Whether fields stand in quotes; where none begins with a quote, quotes are characters."""
    mark = delimiter.encode()
    if delimiter == "\t" or not (data.startswith(b'"') or mark + b'"' in data or b'\n"' in data):
        return False
    # Every second quote opens: after a delimiter, a line end, or the quote that it doubles. The others close.
    text, opens = np.frombuffer(data, np.uint8), 0
    before, after = (_QUOTE, mark[0], ord("\n")), (_QUOTE, mark[0], ord("\n"), ord("\r"))
    last = -1
    for start in range(0, len(data), _QUOTES_BLOCK):
        quotes = np.flatnonzero(text[start : start + _QUOTES_BLOCK] == _QUOTE) + start
        opening, closing = quotes[opens::2], quotes[1 - opens :: 2]
        opens = (opens + len(quotes)) % 2
        last = quotes[-1] if len(quotes) else last
        bad = np.concatenate(
            [
                opening[(opening > 0) & ~np.isin(text[opening - 1], before)],
                closing[(closing < len(data) - 1) & ~np.isin(text[np.minimum(closing + 1, len(data) - 1)], after)],
            ]
        )
        if len(bad):
            raise ValueError(
                f"{source}:{_line(data, int(bad.min()))}: a quote inside a field; write it twice and the whole field "
                "in quotes, or separate the fields by tabs"
            )
    if opens:
        raise ValueError(f"{source}:{_line(data, int(last))}: a quote opens a field and none closes it; take it out")
    return True


def _require_line_feeds(data: bytes, source: Source, quoted: bool) -> None:
    """Refuses carriage returns that end no line: Polars would take them off the ids."""
    if data.count(b"\r") == data.count(b"\r\n") + data.endswith(b"\r"):
        return
    last = quotes = 0
    for found in re.finditer(rb"\r(?![\n]|\Z)", data):
        quotes += data.count(b'"', last, found.start()) if quoted else 0
        last = found.start()
        if quotes % 2 == 0:
            raise ValueError(f"{source}:{_line(data, last)}: {_CARRIAGE_RETURN}")


def _require_no_extra_fields(data: bytes, source: Source, delimiter: str, lines: int) -> None:
    mark = delimiter.encode()
    per_line = header_line(data).count(delimiter)
    if data.count(mark) == lines * per_line:
        return
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.count(mark) > per_line:
            raise ValueError(
                f"{source}:{number}: {line.count(mark) + 1} fields, the first line has {per_line + 1}; "
                f"remove the extra {delimiter!r}"
            )
