"""Which files a log is made of, and in which format: by name, then by the first line."""

import fnmatch
import glob
import re
from collections.abc import Sequence
from typing import NamedTuple

from tim4rec_jax.checks import shown
from tim4rec_jax.data.columns import column_names
from tim4rec_jax.data.sources import Source, expanded, list_sources
from tim4rec_jax.data.text_fields import DELIMITERS

KUAIRAND_COLUMNS = ("user_id", "video_id", "time_ms")
_PATTERNS = {
    "recbole": ("*.inter", "*.inter.gz"),
    "movielens": ("ratings.dat", "u.data"),
    "kuairand": ("log_*.csv", "log_*.csv.gz"),
    "amazon": ("*.csv", "*.csv.gz"),
    "parquet": ("*.parquet", "*.pq"),
    "csv": ("*.csv", "*.csv.gz", "*.tsv", "*.tsv.gz"),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.ndjson", "*.ndjson.gz", "*.json", "*.json.gz"),
    "pairs": ("*.txt", "*.txt.gz"),
    "lines": ("*.txt", "*.txt.gz"),
}
# Of these a name says nothing, so that a file in a folder is only looked for where the format is given.
_NAMELESS = ("pairs", "lines")
_PARTS = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2, "testing": 2}


class LogColumns(NamedTuple):
    """Names of the columns, and of all fields in their order for files that do not name them.

    Attributes:
      user, item: names.
      time: name; None where the order is the file's.
      order: names joined by commas, as in "item,user,rating,timestamp", or the numbers of the fields of user, item and
        time, as in "2,1,4"; None where the file or its format tells.
    """

    user: str = "user"
    item: str = "item"
    time: str | None = "timestamp"
    order: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """User, item and, unless the order is the file's, time."""
        return (self.user, self.item) + (() if self.time is None else (self.time,))

    @property
    def fields(self) -> list[str]:
        """Names in the order of the fields; none where no order is given, or one by number."""
        return [name.strip() for name in self.order.split(",")] if self.order and not self.numbers else []

    @property
    def numbers(self) -> list[int]:
        """Numbers of the fields, from 1, of user, item and time; none where they are not given so."""
        given = (self.order or "").replace(" ", "").split(",")
        return list(map(int, given)) if all(number.isdecimal() for number in given) else []


def matches(source: Source, log_format: str) -> bool:
    """Tells whether a file is called as files of a format are."""
    return any(fnmatch.fnmatch(source.name, pattern) for pattern in _PATTERNS[log_format])


def part_of(source: Source, *, with_folder: bool = True) -> int | None:
    """Tells by the name of a file, or of its folder, whether it trains (0), validates (1) or tests (2)."""
    for name in (source.name, re.split(r"[/\\]", source.folder)[-1] if with_folder else ""):
        found = {_PARTS[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in _PARTS}
        if len(found) == 1:
            return found.pop()
    return None


def find_log(
    path: str,
    log_format: str = "auto",
    columns: LogColumns | None = None,
    max_unpacked_gb: float | None = None,
    *,
    presplit: bool = False,
) -> tuple[list[Source], str]:
    """Finds the files of the log at `path` and settles their format.

    Args:
      path: file, folder, zip archive, or a pattern with * as in logs/part-*.csv.
      log_format: a `LogFormat`; "auto" goes by file name and then by the first line.
      columns: column names that tell a CSV log.
      max_unpacked_gb: see `DataConfig`.
      presplit: files called train, valid and test are the parts of a log.

    Returns:
      The files in reading order, which is that of their names, and the format.

    Raises:
      FileNotFoundError: if nothing, or no log, is there.
      ValueError: if the format cannot be told, or the parts of a log are not those asked for.
    """
    columns = columns or LogColumns()
    whole = str(expanded(path))
    if glob.has_magic(whole) and not expanded(path).exists():
        found = [name for name in sorted(glob.glob(whole, recursive=True)) if expanded(name).is_file()]
        if not found:
            raise FileNotFoundError(f"no file is called as in {shown(whole, 200)[1:-1]}; check data.path")
        sources = [Source(expanded(name), None, max_unpacked_gb) for name in found]
    else:
        sources = list_sources(path, max_unpacked_gb)
        if sources != [Source(expanded(path))]:
            sources, log_format = _of_one_format(path, _visible(sources), log_format)
    if log_format == "auto":
        log_format = _format_of(sources[0], columns)
    return (_in_parts(path, sources) if presplit else _whole(path, sources)), log_format


def _visible(sources: Sequence[Source]) -> list[Source]:
    """Leaves out what programs write beside the parts of a table: _SUCCESS, .part-0.crc."""
    return [source for source in sources if not source.name.startswith((".", "_"))]


def _of_one_format(path: str, sources: list[Source], log_format: str) -> tuple[list[Source], str]:
    """Returns the files of the first format that a folder has files of."""
    candidates = [name for name in _PATTERNS if name not in _NAMELESS] if log_format == "auto" else [log_format]
    for candidate in candidates:
        found = [source for source in sources if matches(source, candidate)]
        if found:
            by_first_line = log_format == "auto" and candidate in ("amazon", "csv")
            return found, "auto" if by_first_line else candidate
    wanted = {pattern for candidate in candidates for pattern in _PATTERNS[candidate]}
    raise FileNotFoundError(f"{path} holds no interaction log; looked for {', '.join(sorted(wanted))}")


def _whole(path: str, sources: list[Source]) -> list[Source]:
    labels = {part_of(source, with_folder=False) for source in sources}
    if len(sources) > 1 and None not in labels and len(labels) > 1:
        raise ValueError(
            f"{path} holds a log split into {column_names([source.name for source in sources])}; set data.split=given "
            "to keep that split, or name one file in data.path"
        )
    return sources


def _in_parts(path: str, sources: list[Source]) -> list[Source]:
    parts = [part_of(source) for source in sources]
    if None in parts:
        raise ValueError(
            f"data.split=given: {sources[parts.index(None)]} says neither in its name nor in its folder's whether it "
            "is train, valid or test; rename it, or leave it out by a pattern in data.path"
        )
    missing = [name for number, name in enumerate(("train", "valid", "test")) if number not in parts]
    if missing:
        raise ValueError(
            f"data.split=given: {path} has no {' and no '.join(missing)} file; it needs train, valid and test"
        )
    return sorted(sources, key=lambda source: part_of(source) or 0)


def _format_of(source: Source, columns: LogColumns) -> str:
    for name in ("recbole", "movielens", "parquet"):
        if matches(source, name):
            return name
    first = source.first_line()
    if columns.order:
        return "csv"
    if first.startswith("{"):
        return "jsonl"
    if "::" in first:
        return "movielens"
    if any(field.endswith((":token", ":float")) for field in first.split("\t")):
        return "recbole"
    fields = [field.strip('"') for field in first.replace("\t", ",").split(",")]
    if set(KUAIRAND_COLUMNS) <= set(fields):
        return "kuairand"
    if not set(columns.names) <= set(fields) and len(fields) == 4 and all(is_number(field) for field in fields[2:]):
        return "amazon"
    if matches(source, "csv"):
        return "csv"
    if any(set(columns.names) <= {field.strip('"') for field in first.split(mark)} for mark in DELIMITERS):
        return "csv"
    if first.startswith("["):
        raise ValueError(f"{source} is a JSON array ({shown(first, 40)}), which is not read; write one object a line")
    raise ValueError(
        f"the format of {source} cannot be told from its name and first line {shown(first, 40)}; "
        f"set data.format to one of {', '.join(_PATTERNS)} (pairs: a user and an item a line; lines: a user and "
        "all items)"
    )


def is_number(text: str) -> bool:
    """Tells whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
