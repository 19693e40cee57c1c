"""Files of text as fields: headers, separators, quotes, line ends; every line accounted for."""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.checks import shown
from tim4rec_jax.data.columns import BadRow, Tally
from tim4rec_jax.data.sources import Source

# Polars panics over some damaged files, and its panics are no exceptions.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
DELIMITERS = (",", "\t", ";", "|")
_QUOTE = ord('"')
_QUOTES_BLOCK = 2**26
_CARRIAGE_RETURN = (
    "a carriage return inside the line; end lines with a line feed, and take carriage returns out of the fields"
)


class Fields(NamedTuple):
    """Fields of every line.

    Attributes:
      frame: String columns; null where a line has no such field or an empty one.
      quoted: fields may stand in quotes, so that rows are no lines.
      numbers: line of each row; None where they follow each other.
    """

    frame: pl.DataFrame
    quoted: bool
    numbers: pl.Series | None


def separated(data: bytes, source: Source, separator: str | None) -> tuple[bytes, str | None]:
    """Returns text whose fields one character separates, and that character; None where nothing was asked for."""
    if separator == "tab":
        return data, "\t"
    if separator == "space":
        return re.sub(rb"(?m)^[ \t]+|[ \t]+(?=\r?$)", b"", re.sub(rb"[ \t]+", b"\t", data)), "\t"
    if separator == "::":
        if b"\t" in data:
            raise ValueError(
                f"{source}:{_line(data, data.index(9))}: a tab inside the line; data.separator=:: needs none"
            )
        return data.replace(b"::", b"\t"), "\t"
    return data, separator


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
    data: bytes,
    source: Source,
    delimiter: str,
    positions: Sequence[int],
    names: Sequence[str],
    tally: Tally,
    *,
    has_header: bool,
) -> Fields:
    """Reads some fields of every line.

    Args:
      data: the text; with tabs a quote is a character, with other delimiters a field may stand in quotes.
      source: its file, for messages.
      delimiter: one character.
      positions: of the fields.
      names: what their columns are called.
      tally: takes the lines that are left out, where bad rows are.
      has_header: the first line is left out.

    Raises:
      ValueError: for more fields than the first line has, a stray quote or carriage return; the message names the line.
    """
    quoted = _is_quoted(data, source, delimiter)
    numbers = None
    if tally.rules.skip_bad and not quoted:
        data, numbers = _without_bad_lines(data, source, delimiter, tally, has_header)
    _require_line_feeds(data, source, quoted)
    wanted = sorted(set(positions))
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
    chosen = pl.DataFrame([frame.to_series(i).alias(n) for i, n in zip(columns, names, strict=True)])
    return Fields(chosen, quoted, numbers)


def _without_bad_lines(
    data: bytes, source: Source, delimiter: str, tally: Tally, has_header: bool
) -> tuple[bytes, pl.Series | None]:
    """Takes lines out that cannot be split into fields; returns the rest and, if any went, the number of each left."""
    mark = delimiter.encode()
    lines = data.removesuffix(b"\n").split(b"\n")
    most = lines[0].count(mark)
    good, bad = [], []
    for number, line in enumerate(lines, start=1):
        reason = None
        if line.count(mark) > most:
            reason = "too many fields"
        elif b"\r" in line.removesuffix(b"\r"):
            reason = "carriage return inside the line"
        else:
            try:
                line.decode()
            except UnicodeDecodeError:
                reason = "no UTF-8 text"
        if reason is None:
            good.append(number)
        else:
            bad.append(BadRow(str(source), number, reason, line[:2000].decode("utf-8", "replace")))
    if not bad or bad[0].line == 1:
        return data, None
    tally.add_bad(bad)
    return b"\n".join(lines[number - 1] for number in good) + b"\n", pl.Series(good[has_header:])


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
