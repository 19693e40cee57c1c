"""Unpacks downloaded archives without letting an entry out of the folder it belongs in, or more out than a log is."""

import gzip
import lzma
import pathlib
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from tim4rec_jax.checks import require, shown
from tim4rec_jax.files import replacing_folder

CHUNK = 2**20
# Far above the 3 to 30 that logs are packed by, far below the 1,000 of a file made to fill the memory.
_FOLD, _FREE = 200, 2**28
_MAX_UNPACKED_GB = 8.0
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, struct.error)
# What the reader of a zip archive raises where bytes of it have changed, an entry is encrypted or of an unknown method.
DAMAGED_ZIP = (*_DAMAGED, OSError)
_DAMAGED_TAR = (tarfile.TarError, gzip.BadGzipFile)


class Budget:
    """Bytes that may yet come out of a packed file; `spend` refuses more.

    Args:
      name: of the file, for the message.
      packed_bytes: its size.
      max_unpacked_gb: limit in GB (1e9 bytes); None allows 8, but not more than 200 times the packed size.
    """

    def __init__(self, name: str, packed_bytes: int, max_unpacked_gb: float | None = None) -> None:
        self.name, self.packed_bytes = name, packed_bytes
        most = min(_MAX_UNPACKED_GB * 1e9, max(_FREE, _FOLD * packed_bytes))
        self._limit = self._left = int(most if max_unpacked_gb is None else max_unpacked_gb * 1e9)

    def spend(self, size: int) -> None:
        """Takes bytes off the budget.

        Raises:
          ValueError: if there are not as many left.
        """
        self._left -= size
        require(
            self._left >= 0,
            f"{self.name}: {self.packed_bytes:,} packed bytes unpack to more than {self._limit / 1e9:.3g} GB; if that "
            "is right, set data.max_unpacked_gb",
        )


def check_entry(name: str, archive: pathlib.Path) -> None:
    """Refuses an archive entry whose name would leave the folder it is unpacked into.

    Args:
      name: entry name as the archive has it.
      archive: file the entry is in, for the message.

    Raises:
      ValueError: for absolute names, drive letters and names that climb with "..".
    """
    path = pathlib.PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(
            f"{archive}: entry {shown(name)} would leave the folder it is unpacked into; nothing was unpacked, "
            "get the archive from its publisher again"
        )


def open_zip(archive: pathlib.Path) -> zipfile.ZipFile:
    """Opens a zip archive after checking every entry's name and kind.

    Raises:
      ValueError: if the file is no complete zip, an entry climbs out or is a link, or a name is there twice.
    """
    try:
        opened = zipfile.ZipFile(archive)
    except (FileNotFoundError, PermissionError):
        raise
    # A damaged directory of entries may also send the reader to places that are not there.
    except (*DAMAGED_ZIP, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{archive} is not a complete zip archive ({shown(str(error))[1:-1]}); get the file again"
        ) from error
    try:
        names = set()
        for entry in opened.infolist():
            check_entry(entry.filename, archive)
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(f"{archive}: entry {shown(entry.filename)} is a link; links are not unpacked")
            if entry.filename in names:
                raise ValueError(f"{archive} holds entry {shown(entry.filename)} twice; pack it again with one of them")
            names.add(entry.filename)
    except ValueError:
        opened.close()
        raise
    return opened


def _write(source: BinaryIO, target: pathlib.Path, budget: Budget | None = None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as sink:
        while chunk := source.read(CHUNK):
            if budget is not None:
                budget.spend(len(chunk))
            sink.write(chunk)


def _extract_zip(archive: pathlib.Path, folder: pathlib.Path, budget: Budget) -> None:
    with open_zip(archive) as opened:
        for entry in opened.infolist():
            if not entry.is_dir():
                with opened.open(entry) as source:
                    _write(source, folder / entry.filename, budget)


def _checked(entries: tarfile.TarFile, archive: pathlib.Path, budget: Budget) -> Iterator[tarfile.TarInfo]:
    for entry in entries:
        check_entry(entry.name, archive)
        if not (entry.isfile() or entry.isdir()):
            raise ValueError(f"{archive}: entry {shown(entry.name)} is no plain file; links are not unpacked")
        budget.spend(max(0, entry.size))
        yield entry


def _extract_tar(archive: pathlib.Path, folder: pathlib.Path, budget: Budget) -> None:
    with tarfile.open(archive) as opened:
        # All of them are checked before any is written.
        for entry in [e for e in _checked(opened, archive, budget) if e.isfile()]:
            with opened.extractfile(entry) as source:
                _write(source, folder / entry.name)
        # What follows the last entry holds the checksum of a packed archive.
        while chunk := opened.fileobj.read(CHUNK):
            budget.spend(len(chunk))


def unpack(archive: pathlib.Path, folder: pathlib.Path, max_unpacked_gb: float | None = None) -> pathlib.Path:
    """Unpacks a zip or tar archive into `folder`, which appears only when it is complete.

    Args:
      archive: `.zip`, `.tar` or `.tar.gz` file.
      folder: target.
      max_unpacked_gb: see `DataConfig`.

    Returns:
      `folder`; what another process has unpacked there in the meantime stays.

    Raises:
      ValueError: if an entry would leave the folder, is a link, the archive is damaged, or unpacks to too much.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    kind, extract = ("zip", _extract_zip) if archive.suffix == ".zip" else ("tar", _extract_tar)
    budget = Budget(str(archive), archive.stat().st_size, max_unpacked_gb)
    try:
        with replacing_folder(folder) as partial:
            try:
                extract(archive, partial, budget)
            except (*_DAMAGED, *_DAMAGED_TAR, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                reason = shown(getattr(error, "strerror", None) or str(error))[1:-1]
                raise ValueError(
                    f"{archive} is not a complete {kind} archive ({reason}); delete it and get it again"
                ) from error
    except OSError:
        if not folder.is_dir():
            raise
    return folder
