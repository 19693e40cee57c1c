"""Content-addressed cache entries: named arrays, tables and one JSON record in a single file, never a pickle.

The file is an .npz, an uncompressed zip of NumPy arrays, so that a large array can be mapped where it lies.
"""

import io
import json
import mmap
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.files import replacing

# Arrays from this length on are mapped: the system reads their pages when they are needed and may drop them again.
# Shorter ones are copied, so that nothing that happens to the file can reach a log in use.
MAPPED_FROM = 2**22
_ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_PADDING_ID = 0xD935


class Entry(NamedTuple):
    """What one cache file holds; `arrays` from `MAPPED_FROM` elements on are read-only maps of the file."""

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
    with replacing(path) as partial, partial.open("wb") as file:
        _write_members(file, members)


def read_entry(path: pathlib.Path) -> Entry:
    """Reads a cache file; the checksums inside it are verified.

    Raises:
      FileNotFoundError: if there is none.
      CorruptEntryError: if it is truncated, damaged or of another layout.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            contents = {i.filename.removesuffix(".npy"): _read_member(file, archive, i) for i in archive.infolist()}
        record = json.loads(contents.pop("record").tobytes())
        tables = {
            name.removeprefix("table/"): pl.read_ipc(io.BytesIO(contents[name].tobytes()))
            for name in contents
            if name.startswith("table/")
        }
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    # Whatever the bytes make the readers of zip, NumPy, JSON and Polars raise.
    except (Exception, pl.exceptions.PanicException) as error:
        raise CorruptEntryError(f"{path} is damaged ({error})") from error
    arrays = {name.removeprefix("array/"): a for name, a in contents.items() if name.startswith("array/")}
    return Entry(arrays, tables, record)


def _write_members(file: BinaryIO, members: Mapping[str, np.ndarray]) -> None:
    """Writes what np.savez does, with every array at a multiple of 64 bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in members.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            # The header ends with the name, 20 bytes for sizes over 4 GiB, and the padding with its own 4 bytes.
            end = file.tell() + _LOCAL_HEADER.size + len(info.filename) + 20 + 4
            padding = -end % _ALIGNMENT
            info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _read_member(file: BinaryIO, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Reads an array and verifies its checksum; a long and aligned one is mapped."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, _, dtype = read_header(member)
        if dtype.hasobject or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is no plain array")
        start = member.tell()
        length = int(np.prod(shape))
        if length < MAPPED_FROM:
            return np.frombuffer(member.read(), dtype).reshape(shape).copy()
        while member.read(2**20):
            pass
    place = file.tell()
    file.seek(info.header_offset)
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    file.seek(place)
    start += info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(mapped, dtype, length, start).reshape(shape)
    return array if start % _ALIGNMENT == 0 else array.copy()
