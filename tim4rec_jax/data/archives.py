"""Unpacks downloaded archives without letting an entry out of the folder it belongs in."""

import os
import pathlib
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib

# What the reader of a zip archive raises where bytes of it have changed.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, struct.error)


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
            f"{archive}: entry {name!r} would leave the folder it is unpacked into; nothing was unpacked, "
            "get the archive from its publisher again"
        )


def open_zip(archive: pathlib.Path) -> zipfile.ZipFile:
    """Opens a zip archive after checking every entry's name and kind.

    Raises:
      ValueError: if the file is no complete zip, or an entry climbs out or is a link.
    """
    try:
        opened = zipfile.ZipFile(archive)
    except FileNotFoundError:
        raise
    # A damaged directory of entries may also send the reader to places that are not there.
    except (*DAMAGED_ZIP, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} is not a complete zip archive ({error}); get the file again") from error
    try:
        for entry in opened.infolist():
            check_entry(entry.filename, archive)
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(f"{archive}: entry {entry.filename!r} is a link; links are not unpacked")
    except ValueError:
        opened.close()
        raise
    return opened


def _extract_zip(archive: pathlib.Path, folder: pathlib.Path) -> None:
    with open_zip(archive) as opened:
        try:
            opened.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{archive} is damaged ({error}); delete it and get it again") from error


def _extract_tar(archive: pathlib.Path, folder: pathlib.Path) -> None:
    try:
        with tarfile.open(archive) as opened:
            entries = opened.getmembers()
            for entry in entries:
                check_entry(entry.name, archive)
                if not (entry.isfile() or entry.isdir()):
                    raise ValueError(f"{archive}: entry {entry.name!r} is no plain file; links are not unpacked")
            for entry in (e for e in entries if e.isfile()):
                target = folder / entry.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.extractfile(entry) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive} is not a complete tar archive ({error}); delete it and get it again") from error


def unpack(archive: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Unpacks a zip or tar archive into `folder`, which appears only when it is complete.

    Args:
      archive: `.zip`, `.tar` or `.tar.gz` file.
      folder: target; must not exist yet.

    Returns:
      `folder`.

    Raises:
      ValueError: if an entry would leave the folder, is a link, or the archive is damaged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (_extract_zip if archive.suffix == ".zip" else _extract_tar)(archive, partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
