"""JSON files of one object each: read whatever lies there, written whole, and sealed where a change must be noticed."""

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tim4rec_jax.files import write_atomically

_SEAL = "sha256"


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """Returns the object that a file holds.

    Raises:
      OSError: the file cannot be read.
      ValueError: it holds no JSON, anything but an object, or one nested too deeply; the file is named.
    """
    if not file.is_file():  # A pipe or a device would be read for ever.
        number = errno.EINVAL if os.path.lexists(file) else errno.ENOENT
        raise OSError(number, "is not a file" if number == errno.EINVAL else os.strerror(number), str(file))
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is not readable as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} is not readable as JSON: {str(error)[:120]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} where an object is expected")
    return values


def as_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns what `write_object` writes; raises ValueError for what has no strict JSON form."""
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_object(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes an object, whole or not at all; raises ValueError for what has no strict JSON form."""
    write_atomically(file, as_bytes(values))


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the object with a hash of itself."""
    return dict(values) | {_SEAL: _digest(values)}


def read_sealed(file: pathlib.Path) -> dict[str, Any]:
    """Returns what was given to `sealed`.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such object, or one that was changed.
    """
    values = read_object(file)
    seal = values.pop(_SEAL, None)
    try:
        intact = seal == _digest(values)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{file} is not as it was written")
    return values
