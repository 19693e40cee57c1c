"""Readers of interaction logs: RecBole, MovieLens, Amazon, KuaiRand, CSV, JSON lines, Parquet, text, data frames.

Every reader ends in the columns user, item and time, in the order of the rows, with every line accounted for.
"""

import json
from collections.abc import Iterator, Sequence

import polars as pl

from tim4rec_jax.checks import require, shown
from tim4rec_jax.data.columns import (
    BadRow,
    FactorizedLog,
    Rules,
    Table,
    Tally,
    TypedTable,
    check_type,
    column_names,
    extra_name,
    factorize,
    typed,
)
from tim4rec_jax.data.log_files import KUAIRAND_COLUMNS, LogColumns, is_number, part_of
from tim4rec_jax.data.sources import Source
from tim4rec_jax.data.text_fields import (
    DELIMITERS,
    UNREADABLE,
    find_delimiter,
    header_fields,
    header_line,
    read_fields,
    read_text,
    separated,
)

_PIECE_ROWS = 2**19  # of a Parquet file or data frame, typed at once
_ROW_BYTES = 16  # of a row in numbers, see `FactorizedLog`

_RECBOLE_COLUMNS = (("user_id",), ("item_id", "product_id"), ("timestamp",))
_RATING_FIELDS = ("user", "item", "rating", "timestamp")
# How ids of Amazon look; product codes that are ISBNs are numbers like any other.
_AMAZON_USER, _AMAZON_ITEM = r"^A[0-9A-Z]{9,30}$", r"^B0[0-9A-Z]{8}$"
_HEAD_LINES = 1000
_OF_WHERE = "data.where names it"
# Ratings stay below the one and seconds since 1973 above the other.
_MOST_RATING, _LEAST_EPOCH = 10, 1e8


def read_log(
    sources: Sequence[Source], log_format: str, columns: LogColumns | None = None, rules: Rules | None = None
) -> FactorizedLog:
    """Reads log files of a known format, one after the other.

    KuaiRand: every row counts as an interaction, whatever its `is_click`; the published statistics (23,951 users, 7,111
    items, 1,134,420 rows after 5-core) are those of `log_standard_4_08_to_4_21_pure.csv` taken so. `time_ms` is floored
    to seconds. A fraction of a second in other times is rounded down, counted, and orders events within a second.

    Args:
      sources: files, as `find_log` gives them.
      log_format: a `LogFormat` other than "auto".
      columns: column names in CSV, JSON and Parquet files; names that differ from the defaults count in RecBole files
        too.
      rules: see `Rules`.

    Raises:
      ValueError: for a missing column or wrong header, an empty file, a missing id, or a time that is missing, none,
        negative or past the year 9999; the message names file and line.
    """
    columns, rules = columns or LogColumns(), rules or Rules()
    if rules.file_order:
        columns = columns._replace(time=None)
    tally = Tally(rules, ticks_per_second=1000 if log_format == "kuairand" else 0)
    if len(sources) > 1:
        _require_one_schema(sources, log_format)
        tally.taken["files"] = f"{len(sources)}, by name"
    return factorize(_pieces(sources, log_format, columns, tally), tally)


def read_frame(
    frame: pl.DataFrame, columns: LogColumns | None = None, name: str = "data frame", rules: Rules | None = None
) -> FactorizedLog:
    """Reads a log from the columns of a data frame, as `read_log` does from those of a Parquet file.

    Args:
      frame: a column of users, one of items and one of times, of any types that a Parquet file may have there.
      columns: their names; None takes user or user_id, item, item_id or product_id, and timestamp.
      name: of the frame, for messages.
      rules: see `Rules`.

    Raises:
      ValueError: for a missing column, no rows, a missing id, or a bad time; the message names the row, from 1.
    """
    tally = Tally(rules)
    if columns is None:
        choices = zip(LogColumns().names, _RECBOLE_COLUMNS, strict=True)
        found = ([c for c in (usual, *known) if c in frame.columns][:1] or [usual] for usual, known in choices)
        columns = LogColumns(*(name for (name,) in found))
    if tally.rules.file_order:
        columns = columns._replace(time=None)
    require(frame.height > 0, f"{name}: the log has no rows")
    return factorize(_typed_slices(frame.lazy(), name, columns, tally), tally)


def _require_one_schema(sources: Sequence[Source], log_format: str) -> None:
    """Refuses files whose columns are not those of the first."""
    if log_format in ("jsonl", "lines"):  # Their rows may differ as they please.
        return
    first: list[str] = []
    for source in sources:
        if log_format == "parquet":
            try:
                schema = pl.scan_parquet(source.seekable(), glob=False).collect_schema()
            except UNREADABLE as error:
                raise _no_parquet(source, error) from error
            found = [f"{name} ({dtype})" for name, dtype in schema.items()]
        else:
            line = source.first_line().encode()
            found = header_fields(line, find_delimiter(line))
            if not log_format.startswith(("recbole", "csv", "kuairand")) or all(map(is_number, found[-1:])):
                found = [f"field {number}" for number in range(1, len(found) + 1)]
        first = first or found
        if found != first:
            odd = next((name for name in found if name not in first), None) or "other columns"
            raise ValueError(
                f"{source}: its columns ({column_names(found)}) are not those of {sources[0].name} "
                f"({column_names(first)}): {shown(odd, 40)}; name the files of the log in data.path, as in part-*.csv"
            )


def _pieces(sources: Sequence[Source], log_format: str, columns: LogColumns, tally: Tally) -> Iterator[TypedTable]:
    """Yields a file at a time, or of Parquet half a million rows."""
    reader = {
        "recbole": _read_recbole,
        "movielens": _read_movielens,
        "amazon": _read_amazon,
        "kuairand": _read_kuairand,
        "csv": _read_csv,
        "jsonl": _read_json_lines,
        "pairs": _read_pairs,
        "lines": _read_user_lines,
    }.get(log_format)
    for source in sources:
        require(
            not columns.order or log_format in ("movielens", "amazon", "csv"),
            f"{source}: {log_format} files name their columns; leave data.columns={shown(columns.order)[1:-1]} out",
        )
        require(
            tally.rules.separator is None or log_format in ("recbole", "csv", "pairs", "lines", "movielens", "amazon"),
            f"{source}: {log_format} files have no fields to separate; leave data.separator out",
        )
        part = (part_of(source) or 0) if tally.rules.presplit else 0
        rows = -len(tally.bad)
        if reader is None:
            pieces = _read_parquet(source, columns, tally)
        else:
            pieces = iter((typed(reader(source, columns, tally), tally),))
        for piece in pieces:
            rows += piece.rows_read
            yield piece._replace(part=part)
        rows += len(tally.bad)
        require(rows > 0, f"{source} holds no rows below its header; a log needs at least one row")


def _extras(tally: Tally) -> list[str]:
    """Names of the columns that conditions read beside user, item and time."""
    return list(dict.fromkeys(c.column for c in tally.rules.conditions if not c.of_time))


def _wanted(columns: LogColumns, tally: Tally) -> tuple[list[str], list[str]]:
    """Returns the names of the columns to read in the file, and what a `Table` calls them."""
    extras = _extras(tally)
    own = ["user", "item"] + ([] if columns.time is None else ["timestamp"])
    return [*columns.names, *extras], [*own, *map(extra_name, extras)]


def _read_recbole(source: Source, columns: LogColumns, tally: Tally) -> Table:
    data, given = separated(read_text(source), source, tally.rules.separator)
    delimiter = given or "\t"
    header = header_line(data).split(delimiter)
    if not all(":" in field for field in header) or (len(header) == 1 and header[0].count(":") > 1):
        other = find_delimiter(data)
        hint = f"; this one looks separated by {other!r}: set data.separator" if other in header[0] else ""
        raise ValueError(
            f"{source}:1: wrong header {shown(header)}; a RecBole atomic file starts with tab-separated typed names "
            f"such as user_id:token, item_id:token, timestamp:float{hint if len(header) == 1 else ''}"
        )
    names = [field.split(":", 1)[0] for field in header]
    chosen = []
    for configured, default, known in zip(columns.names, LogColumns().names, _RECBOLE_COLUMNS, strict=False):
        wanted = known if configured == default else (configured,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise ValueError(_missing_column(source, " or ".join(wanted), names))
        chosen.append(_position(source, found, names))
    chosen += [_position(source, name, names, _OF_WHERE) for name in _extras(tally)]
    return _fields_table(data, source, delimiter, chosen, _wanted(columns, tally)[1], tally, has_header=True)


def _fields_table(
    data: bytes,
    source: Source,
    delimiter: str,
    positions: Sequence[int],
    names: Sequence[str],
    tally: Tally,
    *,
    has_header: bool,
) -> Table:
    fields = read_fields(data, source, delimiter, positions, names, tally, has_header=has_header)
    # A quoted field may hold a line break, so rows are not counted as lines there.
    first_line = 0 if fields.quoted or (delimiter != "\t" and b'"' in data) else 1 + has_header
    return Table(fields.frame, source, first_line, numbers=fields.numbers, text=data if tally.rules.skip_bad else None)


def _read_movielens(source: Source, columns: LogColumns, tally: Tally) -> Table:
    return _read_ratings(source, columns, tally, amazon=False)


def _read_amazon(source: Source, columns: LogColumns, tally: Tally) -> Table:
    return _read_ratings(source, columns, tally, amazon=True)


def _read_ratings(source: Source, columns: LogColumns, tally: Tally, *, amazon: bool) -> Table:
    data, given = separated(read_text(source), source, tally.rules.separator)
    if columns.order:
        return _read_unnamed(source, data, columns, tally, given)
    first = header_line(data).strip()
    if amazon:
        fields = header_fields(data, find_delimiter(data))
        fits = len(fields) == 4 and is_number(fields[3])
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
    usual = LogColumns(time=None if columns.time is None else "timestamp", order=",".join(_RATING_FIELDS))
    raw = _read_unnamed(source, data, usual, tally, given, known=True)
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
            return frame.rename({"item": "user", "user": "item"}).select(frame.columns)
    return None


def _read_unnamed(
    source: Source, data: bytes, columns: LogColumns, tally: Tally, separator: str | None, *, known: bool = False
) -> Table:
    """Reads a file without a header by the order of its fields; `known` if that is the format's and not the user's."""
    first = header_line(data)
    names = columns.fields
    split = {delimiter: header_fields(data, delimiter) for delimiter in (*DELIMITERS, " ")}
    if separator is not None:
        split = {separator: header_fields(data, separator)}
    if columns.numbers:
        count = max(max(columns.numbers), len(first.split("::")) if "::" in first else max(map(len, split.values())))
        names = [str(number) for number in range(1, count + 1)]
        columns = LogColumns(*(str(number) for number in columns.numbers), *[None] * (3 - len(columns.numbers)))
    # Polars splits on one byte: "::" gives an empty field between two fields.
    step = 2 if separator is None and len(first.split("::")) == len(names) > 1 else 1
    delimiter = ":" if step == 2 else next((d for d, fields in split.items() if len(fields) == len(names)), None)
    if delimiter is None:
        raise ValueError(
            f"{source}:1: the first line {shown(first)} has not the {len(names)} fields of data.columns="
            f"{shown(columns.order or ','.join(columns.names))[1:-1]}; name every field, in the order of the file"
        )
    fields = first.split("::") if step == 2 else split[delimiter]
    positions = [_position(source, name, names) for name in columns.names]
    positions += [_position(source, name, names, _OF_WHERE) for name in _extras(tally)]
    dated = columns.time is None or is_number(fields[positions[2]])
    if not dated and set(names) & set(fields) or (columns.order and not known_times(fields)):
        raise ValueError(
            f"{source}:1: {shown(first)} looks like a header; take that line out, or, without data.columns, set "
            "data.format=csv, data.user_column, data.item_column and data.time_column"
        )
    if known:
        _require_times(source, data, "::" if step == 2 else delimiter)
    tally.taken.setdefault("separator", tally.rules.separator or repr("::" if step == 2 else delimiter))
    aliases = _wanted(columns, tally)[1]
    return _fields_table(data, source, delimiter, [step * p for p in positions], aliases, tally, has_header=False)


def known_times(fields: Sequence[str]) -> bool:
    """Tells whether a line has a field with a digit first, as rows without a header have."""
    return any(is_number(field) or field[:1].isdecimal() for field in fields)


def _require_times(source: Source, data: bytes, delimiter: str) -> None:
    """Refuses ratings where the time should be, as told by the first lines: files with the two exchanged exist."""
    lines = data[: 2**16].decode("utf-8", "replace").split("\n")[:_HEAD_LINES]
    rows = [line.split(delimiter) for line in lines if line.count(delimiter) == 3]
    columns = [[float(field) for field in column if is_number(field)] for column in zip(*rows, strict=True)]
    if not columns or not columns[3] or max(columns[3]) > _MOST_RATING:
        return
    for number, column in enumerate(columns[:3], start=1):
        if len(column) == len(rows) and min(column) > _LEAST_EPOCH:
            raise ValueError(
                f"{source}: field 4, the time, holds {min(columns[3]):g} to {max(columns[3]):g}, and field {number} "
                f"{column[0]:.0f} and the like; name the fields, as in data.columns=user,item,timestamp,rating"
            )


def _read_kuairand(source: Source, columns: LogColumns, tally: Tally) -> Table:
    user, item, time = KUAIRAND_COLUMNS
    return _read_csv(source, LogColumns(user, item, None if columns.time is None else time), tally)


def _read_csv(source: Source, columns: LogColumns, tally: Tally) -> Table:
    data, given = separated(read_text(source), source, tally.rules.separator)
    if columns.order:
        return _read_unnamed(source, data, columns, tally, given)
    names, aliases = _wanted(columns, tally)
    delimiter = given or find_delimiter(data, names)
    header = header_fields(data, delimiter)
    if given is None and not set(names) <= set(header) and set(names) <= set(header_line(data).split()):
        raise ValueError(f"{source}:1: blanks separate the names of the header; set data.separator=space")
    tally.taken.setdefault("separator", tally.rules.separator or repr(delimiter))
    positions = [_position(source, name, header, _hint(name, columns)) for name in names]
    return _fields_table(data, source, delimiter, positions, aliases, tally, has_header=True)


def _read_json_lines(source: Source, columns: LogColumns, tally: Tally) -> Table:
    data = source.read()
    names, aliases = _wanted(columns, tally)
    lines = data.removesuffix(b"\n").split(b"\n")
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    blank_lines = len(lines) - len(numbers)
    schema: dict[str, type[pl.DataType]] = dict.fromkeys(names, pl.String)
    try:
        frame = pl.read_ndjson(data, schema=schema)
        require(frame.height == len(numbers), "rows are not lines")
    except (*UNREADABLE, ValueError):
        bad = [(n, reason) for n in numbers if (reason := _no_object(lines[n - 1])) is not None]
        if not bad or not tally.rules.skip_bad:
            number, reason = bad[0] if bad else (numbers[0], "no JSON objects of one line each")
            shorter = shown(lines[number - 1].decode("utf-8", "replace"), 60)
            hint = "; a JSON array is not read" if lines[number - 1].lstrip().startswith(b"[") else ""
            raise ValueError(f"{source}:{number}: {reason}: {shorter}{hint}; write one object a line") from None
        tally.add_bad([_bad_line(source, lines, n, reason) for n, reason in bad])
        numbers = sorted(set(numbers) - {n for n, _ in bad})
        kept = b"\n".join(lines[number - 1] for number in numbers)
        frame = pl.read_ndjson(kept, schema=schema) if numbers else pl.DataFrame(schema=schema)
    for name in names:
        if frame.height and frame[name].null_count() == frame.height:
            keys = list(json.loads(lines[numbers[0] - 1]))
            if name not in keys:
                raise ValueError(_missing_column(source, name, keys, _hint(name, columns)))
    nested = pl.repeat(False, frame.height, eager=True, dtype=pl.Boolean)
    for name in names[:2]:
        found = frame[name].str.contains(r"^\s*[\[{]").fill_null(False)
        nested |= found
        if found.any() and not tally.rules.skip_bad:
            row = found.arg_true()[0]
            raise ValueError(
                f"{source}:{numbers[row]}: {name} is {shown(frame[name][row], 40)} and not one value; "
                "write one event a line"
            )
    bad = [numbers[row] for row in nested.arg_true()]
    tally.add_bad([_bad_line(source, lines, n, "an id is no single value") for n in bad])
    frame, numbers = frame.filter(~nested), [n for n in numbers if n not in set(bad)]
    frame.columns = aliases
    text = data if tally.rules.skip_bad else None
    return Table(frame, source, 1, numbers=pl.Series(numbers), text=text, blank_lines=blank_lines)


def _bad_line(source: Source, lines: Sequence[bytes], number: int, reason: str) -> BadRow:
    return BadRow(str(source), number, reason, lines[number - 1][:2000].decode("utf-8", "replace"))


def _no_object(line: bytes) -> str | None:
    try:
        return None if isinstance(json.loads(line), dict) else "no JSON object"
    except (ValueError, RecursionError):
        return "no JSON"


def _words(source: Source, tally: Tally) -> tuple[bytes, list[list[str]]]:
    """Returns a file without a header, and the fields of each line: by the separator, else by blanks or commas."""
    require(not _extras(tally), f"{source}: its fields have no names for data.where; leave it out")
    data = read_text(source)
    given = {"space": None, "tab": "\t"}.get(tally.rules.separator or "", tally.rules.separator)
    try:
        lines = data.removesuffix(b"\n").decode().split("\n")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}:{number}: an id is no UTF-8 text; save the file as UTF-8") from None
    if tally.rules.separator is None and " " not in lines[0].strip() and "\t" not in lines[0]:
        given = next((delimiter for delimiter in DELIMITERS if delimiter in lines[0]), None)
    tally.taken.setdefault("separator", "blanks" if given is None else repr(given))
    return data, [[field.strip() for field in line.split(given)] if line.strip() else [] for line in lines]


def _read_pairs(source: Source, _: LogColumns, tally: Tally) -> Table:
    data, lines = _words(source, tally)
    users, items, numbers = [], [], []
    for number, fields in enumerate(lines, start=1):
        if len(fields) == 2 or not fields:
            users.append(fields[0] if fields else None)
            items.append(fields[1] if fields else None)
            numbers.append(number)
            continue
        text = " ".join(fields)
        if not tally.rules.skip_bad:
            raise ValueError(
                f"{source}:{number}: {shown(text, 60)} has {len(fields)} fields; a line of pairs is a user and an item "
                "(data.format=lines: a user and all its items)"
            )
        tally.add_bad([BadRow(str(source), number, "not two fields", text[:2000])])
    frame = pl.DataFrame({"user": users, "item": items}, schema={"user": pl.String, "item": pl.String})
    return Table(frame, source, 1, numbers=pl.Series(numbers, dtype=pl.Int64), text=data)


def _read_user_lines(source: Source, _: LogColumns, tally: Tally) -> Table:
    data, lines = _words(source, tally)
    seen: dict[str, int] = {}
    users, items, numbers = [], [], []
    for number, fields in enumerate(lines, start=1):
        reason = None
        if len(fields) == 1:
            reason = f"user {shown(fields[0], 40)} has no items"
        elif fields and fields[0] in seen:
            reason = f"user {shown(fields[0], 40)} stands in line {seen[fields[0]]} already"
        if reason is not None:
            if not tally.rules.skip_bad:
                raise ValueError(f"{source}:{number}: {reason}; a line is a user and all its items, oldest first")
            short = "user without items" if len(fields) == 1 else "user there already"
            tally.add_bad([BadRow(str(source), number, short, " ".join(fields)[:2000])])
            continue
        if fields:
            seen[fields[0]] = number
        users += fields[:1] * (len(fields) - 1) or [None]
        items += fields[1:] or [None]
        numbers += [number] * max(len(fields) - 1, 1)
    frame = pl.DataFrame({"user": users, "item": items}, schema={"user": pl.String, "item": pl.String})
    return Table(frame, source, 1, numbers=pl.Series(numbers, dtype=pl.Int64), text=data)


def _no_parquet(source: Source, error: BaseException) -> ValueError:
    reason = shown(str(error).partition("\n")[0])[1:-1]
    return ValueError(f"{source} is not a readable Parquet file ({reason}); write it again")


def _read_parquet(source: Source, columns: LogColumns, tally: Tally) -> Iterator[TypedTable]:
    data = source.seekable()
    try:
        scan = pl.scan_parquet(data, glob=False)
        # A few bytes can stand for a billion equal rows.
        source.budget().spend(scan.select(pl.len()).collect().item() * _ROW_BYTES)
        yield from _typed_slices(scan, source, columns, tally)
    except UNREADABLE as error:
        raise _no_parquet(source, error) from error


def _typed_slices(scan: pl.LazyFrame, source: Source | str, columns: LogColumns, tally: Tally) -> Iterator[TypedTable]:
    schema = scan.collect_schema()
    names, aliases = _wanted(columns, tally)
    listed = [name for name in columns.names[1:] if isinstance(schema.get(name), pl.List)]
    nested = listed if columns.item in listed else []
    for name in names:
        _position(source, name, schema.names(), _hint(name, columns))
        dtype = schema[name]
        if name in nested:
            dtype = dtype.inner  # type: ignore[attr-defined]
        if name in columns.names:
            check_type(source, name, dtype, is_time=name == columns.time)
    require(
        not nested or len(nested) == len(columns.names) - 1,
        f"{source}: column {columns.item} holds lists, and column {columns.time} does not; write one time for each "
        "item, or read the order of the lists with data.order=file",
    )
    if nested:
        tally.taken["rows"] = "one per user, with lists"
    scan = scan.select(pl.col(name).alias(alias) for name, alias in zip(names, aliases, strict=True))
    for first in range(0, scan.select(pl.len()).collect().item(), _PIECE_ROWS):
        piece = scan.slice(first, _PIECE_ROWS).collect()
        if nested:
            yield typed(_exploded(piece, source, first, aliases[1 : 1 + len(nested)]), tally)
            continue
        try:
            checked = typed(Table(piece, source, first_line=0, first_row=first), tally)
        except ValueError:
            # Only the whole column tells how many rows lack an id.
            typed(Table(scan.collect(), source, first_line=0), tally)
            raise
        yield checked


def _exploded(piece: pl.DataFrame, source: Source | str, first: int, lists: list[str]) -> Table:
    """Makes a row per event of rows per user."""
    piece = piece.with_row_index("number", offset=first + 1)
    lengths = piece.select(pl.col(lists).list.len().fill_null(0))
    odd = (lengths[lists[0]] != lengths[lists[-1]]).arg_true()
    if len(odd):
        items, times = (lengths[name][odd[0]] for name in (lists[0], lists[-1]))
        raise ValueError(
            f"{source}, row {piece['number'][odd[0]]}: {items} items and {times} times; write one time for each item"
        )
    events = piece.filter(lengths[lists[0]] > 0).explode(lists)
    return Table(events.drop("number"), source, first_line=0, numbers=events["number"])


def _hint(name: str, columns: LogColumns) -> str | None:
    return None if name in columns.names else _OF_WHERE


def _position(source: Source | str, name: str, header: Sequence[str], hint: str | None = None) -> int:
    if name not in header:
        raise ValueError(_missing_column(source, name, header, hint))
    if header.count(name) > 1:
        raise ValueError(f"{source}: {header.count(name)} columns are called {shown(name)[1:-1]}; rename all but one")
    return header.index(name)


def _missing_column(source: Source | str, name: str, header: Sequence[str], given: str | None = None) -> str:
    name = shown(name)[1:-1]
    if len(header) == 1:
        return (
            f"{source}: no column {name}; its header is the one field {shown(header[0])}: the fields must be separated "
            "by commas or tabs (RecBole: tabs)"
        )
    hint = "set data.user_column, data.item_column and data.time_column, or data.order=file for a log without times"
    if given is not None:
        hint = given
    elif name in [column.strip() for column in header]:
        hint = "the name has spaces around it: take them out of the header"
    elif any(map(is_number, header)):
        hint = "for a file without a header name its fields, as in data.columns=user,item,rating,timestamp"
    return f"{source}: no column {name}; its columns are {column_names(header)} ({hint})"
