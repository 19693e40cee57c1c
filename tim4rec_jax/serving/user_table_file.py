"""The file of a table of user states: NumPy arrays without pickle, of which nothing is believed unchecked."""

import errno
import hashlib
import io
import json
import math
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tim4rec_jax.checks import require
from tim4rec_jax.files import replacing

TABLE_FORMAT = 2
LAST_SECOND = np.iinfo(np.int32).max  # models subtract seconds in int32
_HEADER, _HASH = "header", "hash"
_MOST_MEMBERS = 10_000
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype>[<|][fiu][1248])', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[0-9, ]{0,100})\), \} *\n",
    re.DOTALL,
)
# What reading a file that is none, or a torn one, ends in.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
)


def write(path: pathlib.Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes header and arrays, whole or not at all.

    Raises:
      OSError: the file cannot be written; it is named.
    """
    contents = {_HEADER: text(json.dumps(dict(header)))} | dict(arrays)
    contents[_HASH] = text(_hash(contents))
    with replacing(pathlib.Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **contents)  # pyright: ignore[reportArgumentType]


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads header and arrays that `write` wrote; takes no more memory than the file has bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, has another format, or is something else.
    """
    path = pathlib.Path(path)
    require(path.is_file() or not path.exists(), f"{path} is no file; give the file of a table of user states")
    with path.open("rb") as stream:  # A pipe would be waited for without end.
        try:
            contents = _members(stream)
            header = json.loads(contents[_HEADER].tobytes())
            version = header["format"]
        except _DAMAGE as error:
            raise damaged(path, error) from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # A place before the file's beginning.
                raise
            raise damaged(path, error) from error
        if version != TABLE_FORMAT:
            raise ValueError(
                f"{path} has format {str(version)[:20]}, this program reads {TABLE_FORMAT}; replay the events into a "
                "new table"
            )
        try:
            require(contents.pop(_HASH).tobytes() == _hash(contents).encode(), "its content has changed")
            del contents[_HEADER]
        except _DAMAGE as error:
            raise damaged(path, error) from error
    return header, contents


def damaged(path: pathlib.Path, error: Exception) -> ValueError:
    """Returns the one error for whatever is wrong with a file."""
    return ValueError(f"{path} is no table of user states, or is damaged: {str(error)[:120]}")


def _hash(contents: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(contents.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _members(stream: io.BufferedReader) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        require(len(members) <= _MOST_MEMBERS, f"it has {len(members)} arrays")
        require(len({member.filename for member in members}) == len(members), "an array is there twice")
        for member in members:
            # As NumPy stores it: what is unpacked is not larger than the file.
            require(member.compress_type == zipfile.ZIP_STORED, f"{member.filename[:40]!r} is compressed")
            require(member.file_size == member.compress_size, f"{member.filename[:40]!r} has two sizes")
        total = sum(member.file_size for member in members)
        size = stream.seek(0, io.SEEK_END)
        require(total <= size, f"its arrays have {total} bytes, the file has {size}")
        return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}


def _array(content: bytes) -> np.ndarray:
    """Reads a .npy file as NumPy writes it; numbers alone, and as many as it says."""
    found = _NPY.match(content)
    if found is None:
        raise ValueError("an array is of another kind")
    dtype = np.dtype(found["dtype"].decode())
    shape = tuple(int(n) for n in found["shape"].replace(b" ", b"").split(b",") if n)
    left = len(content) - found.end()
    require(math.prod(shape) * dtype.itemsize == left, f"an array of shape {shape} and {dtype} has {left} bytes")
    return np.frombuffer(content, dtype, offset=found.end()).reshape(shape)


def check(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], states: Mapping[str, Any], items: int) -> None:
    """Refuses arrays that are not those of a table.

    Args:
      arrays: from `read`.
      header: from `read`.
      states: arrays of one row and more, by name, of the shape and dtype that the stored states must have.
      items: items of the catalogue.

    Raises:
      ValueError: which array is wrong, and how.
    """
    require(type(header.get("keeps_items")) is bool, "the header does not say whether items are kept")
    require(isinstance(header.get("notes"), dict), "the header has no notes")
    names = {"users", "last_times", "events", *states, *WAITING} | ({"items"} if header["keeps_items"] else set())
    require(set(arrays) == names, f"the arrays differ in {sorted(set(arrays) ^ names)}")
    n = len(users(arrays["users"]))
    _require_array(arrays, "last_times", (n,), "int64", 0, LAST_SECOND)
    # An event without items takes no room, but nobody has that many.
    _require_array(arrays, "events", (n,), "int64", 1, 2**40)
    for name, state in states.items():
        _require_array(arrays, name, (n, *state.shape[1:]), plain(state).dtype.name)
    if header["keeps_items"]:
        _require_array(arrays, "items", (int(arrays["events"].sum()),), "int32", 1, items)
    rows = arrays["waiting_rows"]
    _require_array(arrays, "waiting_rows", (rows.size,), "int32", 0, n - 1)
    require(len(np.unique(rows)) == rows.size, "waiting_rows has a row twice")
    _require_array(arrays, "waiting_lengths", rows.shape, "int64", 1, 2**40)
    lengths = arrays["waiting_lengths"]
    require(bool((lengths <= arrays["events"][rows]).all()), "waiting_lengths is more than the events")
    _require_array(arrays, "waiting_items", (int(lengths.sum()),), "int32", 1, items)
    _require_array(arrays, "waiting_seconds", (int(lengths.sum()),), "int32", 0, LAST_SECOND)
    seconds, ends = arrays["waiting_seconds"].astype(np.int64), np.cumsum(lengths)
    require(bool((seconds[ends - 1] == arrays["last_times"][rows]).all()), "waiting_seconds and last_times differ")
    inside = np.ones(seconds.size, bool)
    inside[ends - lengths] = False
    require(bool((np.diff(seconds, prepend=0)[inside] >= 0).all()), "waiting_seconds goes backwards")


WAITING = ("waiting_rows", "waiting_lengths", "waiting_items", "waiting_seconds")


def users(content: np.ndarray) -> list[str]:
    """Reads the raw ids of a table.

    Raises:
      ValueError: they are no text, or not all different.
    """
    try:
        ids = json.loads(content.tobytes().decode())
    except RecursionError as error:
        raise ValueError("the users are nested") from error
    require(isinstance(ids, list) and all(type(user) is str for user in ids), "the users are no list of ids")
    "".join(ids).encode()
    require(len(set(ids)) == len(ids), "a user is there twice")
    return ids


def _require_array(
    arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: str, *limits: int
) -> None:
    array = arrays[name]
    require(array.shape == shape, f"{name} has shape {array.shape}, expected {shape}")
    require(array.dtype.name == dtype, f"{name} is {array.dtype}, expected {dtype}")
    if limits and array.size:
        least, most = limits
        low, high = int(array.min()), int(array.max())
        require(least <= low and high <= most, f"{name} has {low} to {high}, expected {least} to {most}")


def text(content: str) -> np.ndarray:
    """Text as an array of its bytes."""
    return np.frombuffer(content.encode(), np.uint8)


def plain(values: np.ndarray) -> np.ndarray:
    """The same bits in a type that NumPy itself can store."""
    return values if values.dtype.kind in "fiu" else values.view(np.uint16)
