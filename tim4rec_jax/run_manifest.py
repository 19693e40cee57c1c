"""The seal of a run folder: which run it is, and the SHA-256 of every file that decides its answers.

    manifest.json  {"format_version", "run_id", "data_fingerprint", "files": {name: [SHA-256, ..]}, "sha256" of these}

A file has two hashes only while it is being replaced, so that a kill between the two writes leaves a folder that is
still taken for what it is. Run folders from before there was a manifest have none.
"""

import hashlib
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from tim4rec_jax.json_files import read_sealed, sealed, write_object

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_ADVICE = "put back the folder as training left it, from a copy, or train anew"


class Manifest(NamedTuple):
    """What manifest.json says.

    Attributes:
      run_id: 32 hexadecimal digits, drawn when the run was made.
      data_fingerprint: of the cleaned log.
      files: the hashes each file may have, by its name.
    """

    run_id: str
    data_fingerprint: str
    files: dict[str, list[str]]


def new_manifest(data_fingerprint: str, files: Mapping[str, str]) -> Manifest:
    """Returns the manifest of a new run, with the hash of each file."""
    return Manifest(secrets.token_hex(16), data_fingerprint, {name: [digest] for name, digest in files.items()})


def write_manifest(run: pathlib.Path, manifest: Manifest) -> None:
    """Writes manifest.json."""
    write_object(run / MANIFEST, sealed({"format_version": FORMAT_VERSION} | manifest._asdict()))


def read_manifest(run: pathlib.Path) -> Manifest | None:
    """Returns the manifest, or None for a folder that has none.

    Raises:
      ValueError: it is not as it was written, or of another format.
    """
    file = pathlib.Path(run) / MANIFEST
    if not os.path.lexists(file):
        return None
    try:
        values = read_sealed(file)
    except ValueError as error:
        raise ValueError(f"{error}; {_ADVICE}") from error
    if (version := values.pop("format_version", None)) != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format {str(version)[:20]}, this program reads format {FORMAT_VERSION}; use the version of "
            "the program that wrote it"
        )
    run_id, fingerprint, files = map(values.get, Manifest._fields)
    hashes = isinstance(files, dict) and all(isinstance(of_file, list) for of_file in files.values())
    if not (isinstance(run_id, str) and isinstance(fingerprint, str) and isinstance(files, dict) and hashes):
        raise ValueError(f"{file} is no manifest of a run; {_ADVICE}")
    return Manifest(run_id, fingerprint, files)


def identity(run: pathlib.Path) -> dict[str, Any] | None:
    """Returns what binds checkpoints to their run, its id and the hash of its items; None without a manifest."""
    manifest = read_manifest(run)
    return manifest and {"id": manifest.run_id, "items": manifest.files.get("item_ids.parquet")}


def file_digest(file: pathlib.Path) -> str:
    """Returns the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bytes_digest(content: bytes) -> str:
    """Returns the SHA-256 of what a file is to hold."""
    return hashlib.sha256(content).hexdigest()


def require_as_written(run: pathlib.Path, name: str) -> None:
    """Refuses a file that is not the one the manifest speaks of; without a manifest nothing is known.

    Raises:
      ValueError: naming the file.
    """
    manifest = read_manifest(run)
    if not (run / name).is_file():  # A pipe or a device would be read for ever.
        raise ValueError(f"{run} is not a run folder: {name} is missing, or not a file; {_ADVICE}")
    if manifest is not None and file_digest(run / name) not in manifest.files.get(name, ()):
        raise ValueError(
            f"{run / name} is not as it was written: it was changed, damaged, or is another run's; {_ADVICE}"
        )
