"""Content-addressed cache entries: named arrays, tables and one JSON record in a single file, never a pickle."""

import io
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl


class Entry(NamedTuple):
    """What one cache file holds."""

    arrays: dict[str, np.ndarray]
    tables: dict[str, pl.DataFrame]
    record: dict[str, Any]


class CorruptEntryError(ValueError):
    """A cache file that is truncated, damaged or of another layout."""


def write_entry(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    tables: Mapping[str, pl.DataFrame],
    record: Mapping[str, Any],
) -> None:
    """Writes a cache file in one step: readers see the old file, none, or the whole new one.

    Args:
      path: target; its folder is made.
      arrays: numeric arrays by name.
      tables: data frames by name.
      record: JSON-ready values.

    Raises:
      OSError: if the file cannot be written; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {f"array/{name}": array for name, array in arrays.items()}
    for name, table in tables.items():
        buffer = io.BytesIO()
        table.write_ipc(buffer)
        members[f"table/{name}"] = np.frombuffer(buffer.getvalue(), np.uint8)
    members["record"] = np.frombuffer(json.dumps(record).encode(), np.uint8)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **members)
        os.replace(partial, path)
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


def read_entry(path: pathlib.Path) -> Entry:
    """Reads a cache file; the checksums inside it are verified.

    Raises:
      FileNotFoundError: if there is none.
      CorruptEntryError: if it is truncated, damaged or of another layout.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            contents = {name: members[name] for name in members.files}
        record = json.loads(contents.pop("record").tobytes())
        tables = {
            name.removeprefix("table/"): pl.read_ipc(io.BytesIO(contents[name].tobytes()))
            for name in contents
            if name.startswith("table/")
        }
    except FileNotFoundError:
        raise
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, pl.exceptions.PolarsError) as error:
        raise CorruptEntryError(f"{path} is damaged ({error})") from error
    arrays = {name.removeprefix("array/"): a for name, a in contents.items() if name.startswith("array/")}
    return Entry(arrays, tables, record)
