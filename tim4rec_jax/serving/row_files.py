"""Files of rows by their endings: CSV, Parquet and JSON lines in, piece by piece, and out, whole or not at all."""

import contextlib
import csv
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import polars as pl

from tim4rec_jax.checks import shortened
from tim4rec_jax.files import replacing, temporary_beside
from tim4rec_jax.serving.json_lines import read_json

TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
ROWS_AT_ONCE = 4096
# Bytes of the longest line of an input file.
LONGEST_LINE = 2**26
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException)


def require_ending(option: str, path: pathlib.Path) -> str:
    """Returns a file's ending, which says what it holds.

    Raises:
      ValueError: for another one than `TABLES`.
    """
    ending = path.suffix.lower()
    if ending not in TABLES:
        raise ValueError(
            f"{option}={shortened(str(path), 80)}: the ending says what the file holds: {', '.join(TABLES)}"
        )
    return ending


def read_table(path: pathlib.Path) -> pl.DataFrame:
    """Reads a whole table.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or has another ending.
    """
    ending = require_ending("table", path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if ending == ".parquet":
            return pl.read_parquet(path)
        if ending == ".jsonl":
            return pl.read_ndjson(path, infer_schema_length=None)
        return pl.read_csv(path, separator="\t" if ending == ".tsv" else ",", infer_schema_length=None)
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as {ending[1:]}: {shortened(str(error), 120)}") from None


# A row's number and its values by column, or why it cannot be read.
Row = tuple[int, dict[str, Any] | ValueError]


def read_rows(path: pathlib.Path, columns: Iterable[str], plain_column: str | None = None) -> Iterator[Row]:
    """Yields the rows of a file, numbered as its lines are (Parquet: its rows, from 1); blank lines are passed over.

    Args:
      path: of an ending in `TABLES`; of another one JSON lines are read.
      columns: those that a CSV or Parquet file may have; missing values are left out of a row.
      plain_column: files of another ending are values of this column, one per line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read at all, or has other columns.
    """
    columns = tuple(columns)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    readers: dict[str, Callable[..., Iterator[Row]]] = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is not None:
        return reader(path, columns)
    return _json_lines(path, None if path.suffix.lower() == ".jsonl" else plain_column)


def _require_columns(path: pathlib.Path, found: Iterable[str], known: tuple[str, ...]) -> None:
    found = list(found)
    if unknown := [name for name in found if name not in known]:
        raise ValueError(
            f"{path}: unknown column {shortened(repr(unknown[0]), 60)}; the columns may be {', '.join(known)}"
        )
    if len(set(found)) != len(found):
        raise ValueError(f"{path}: a column stands there twice")


def _json_lines(path: pathlib.Path, plain_column: str | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, content in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if not content.strip():
                continue
            # One without an end, as of a device, would fill the memory.
            if len(content) > LONGEST_LINE:
                raise ValueError(f"{path}: line {number} has over {LONGEST_LINE:,} bytes; nothing was written")
            try:
                if plain_column is not None:
                    yield number, {plain_column: content.decode("utf-8-sig").strip()}
                    continue
                values = read_json(content)
                if not isinstance(values, dict):
                    raise ValueError("must be an object, one per line")
                yield number, values
            except ValueError as error:
                yield number, error


def _csv(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            _require_columns(path, header, columns)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    yield rows.line_num, ValueError(f"has {len(row)} fields, the header {len(header)}")
                else:
                    yield rows.line_num, {name: value for name, value in zip(header, row, strict=True) if value != ""}
        except csv.Error as error:
            raise ValueError(f"{path}: line {rows.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8 ({error.reason} after line {rows.line_num})") from None


def _parquet(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[Row]:
    try:
        _require_columns(path, pl.read_parquet_schema(path), columns)
        for first in itertools.count(0, ROWS_AT_ONCE):
            piece = pl.scan_parquet(path).slice(first, ROWS_AT_ONCE).collect()
            for number, row in enumerate(piece.iter_rows(named=True), start=first + 1):
                yield number, {name: value for name, value in row.items() if value is not None}
            if len(piece) < ROWS_AT_ONCE:
                return
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as Parquet: {shortened(str(error), 120)}") from None


@contextlib.contextmanager
def writing_rows(output: pathlib.Path) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Yields what takes tables of the same columns one after the other; the file has them all at the end, or none.

    Args:
      output: of an ending in `TABLES`; takes the place of a file that is there.

    Raises:
      FileNotFoundError: its folder is missing.
      ValueError: for another ending.
    """
    ending = require_ending("--output", output)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.absolute().parent} to write {output} to")
    with replacing(output) as temporary:
        if ending == ".parquet":
            with _parquet_parts(output, temporary) as write:
                yield write
            return
        with temporary.open("wb") as file:
            yield functools.partial(_append, file, ending)


def _append(file: BinaryIO, ending: str, table: pl.DataFrame) -> None:
    if ending == ".jsonl":
        table.write_ndjson(file)
    else:
        table.write_csv(file, include_header=file.tell() == 0, separator="\t" if ending == ".tsv" else ",")


@contextlib.contextmanager
def _parquet_parts(output: pathlib.Path, temporary: pathlib.Path) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Writes each table into a file of its own and joins them at the end, piece by piece."""
    with temporary_beside(output.with_name(f"{output.name}.parts"), folder=True) as folder:
        parts: list[pathlib.Path] = []

        def write(table: pl.DataFrame) -> None:
            parts.append(folder / f"{len(parts):08d}.parquet")
            table.write_parquet(parts[-1])

        yield write
        pl.scan_parquet(parts).sink_parquet(temporary)
