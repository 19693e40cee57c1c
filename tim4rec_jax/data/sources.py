"""Where the bytes of a log lie: a file, a gzipped file, a file in a folder, or an entry of a zip archive.

No entry of an archive leaves the folder it belongs in, and no more comes out of a packed file than a log is.
"""

import contextlib
import gzip
import hashlib
import io
import lzma
import pathlib
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from tim4rec_jax.checks import require, shown
from tim4rec_jax.files import replacing_folder

_CHUNK = 2**20
# Far above the 3 to 30 that logs are packed by, far below the 1,000 of a file made to fill the memory.
_FOLD, _FREE = 200, 2**28
_MAX_UNPACKED_GB = 8.0
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# What readers of packed files raise where bytes have changed, an entry is encrypted or of an unknown method.
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    struct.error,
)


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """Returns a path with `~` replaced by the home folder; as it stands where no home folder is known."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:  # Neither HOME nor an entry of the user in the system's list, as in some containers.
        return pathlib.Path(path)


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


@dataclass(frozen=True)
class Source:
    """One readable file.

    Attributes:
      path: file on disk.
      entry: name inside the zip archive at `path`; None for a plain file.
      max_unpacked_gb: see `DataConfig`.
    """

    path: pathlib.Path
    entry: str | None = None
    max_unpacked_gb: float | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """File name without its folder."""
        return (self.entry or self.path.name).rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """File name without `.gz` and without the extension."""
        return self.name.removesuffix(".gz").rsplit(".", 1)[0]

    @property
    def folder(self) -> str:
        """Folder on disk or inside the archive, to find what lies beside this file."""
        return str(self.path.parent) if self.entry is None else self.entry.rpartition("/")[0]

    def __str__(self) -> str:
        text = str(self.path)
        if self.entry is not None:
            text += "/" + (self.entry if len(self.entry) <= 100 else shown(self.entry, 100)[1:-1])
        return text if text.isprintable() else repr(text)[1:-1]

    def budget(self) -> Budget:
        """Returns what may come out of this file."""
        return Budget(str(self), self.path.stat().st_size, self.max_unpacked_gb)

    def _chunks(self, *, unpacked: bool = True) -> Iterator[bytes]:
        """Yields the content as far as the budget allows; not `unpacked` leaves a `.gz` as it is stored."""
        unzip, gunzip = self.entry is not None, unpacked and self.name.endswith(".gz")
        budget = self.budget()
        with contextlib.ExitStack() as stack:
            opened = self.path.open("rb") if self.entry is None else open_zip(self.path)
            stack.enter_context(opened)
            try:
                stream = opened
                if isinstance(stream, zipfile.ZipFile):
                    stream = stack.enter_context(stream.open(str(self.entry)))
                if gunzip:
                    stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
                while chunk := stream.read(_CHUNK):
                    if unzip or gunzip:
                        budget.spend(len(chunk))
                    yield chunk
            except (*_DAMAGED, KeyError, OSError) as error:
                if not (unzip or gunzip):
                    raise
                raise ValueError(
                    f"{self} is damaged ({shown(str(error))[1:-1]}); get {self.path.name} again"
                ) from error

    def read(self) -> bytes:
        """Returns the content, decompressed, without a byte-order mark.

        Raises:
          ValueError: if the file is empty or UTF-16, a packed one is damaged, or unpacks to more than `max_unpacked_gb`
            allows.
        """
        whole = io.BytesIO()
        whole.writelines(self._chunks())
        data = whole.getvalue()
        if not data[:_CHUNK].strip() and not data.strip():
            raise ValueError(f"{self} is empty; a log needs at least one row")
        if data.startswith(_UTF_16):
            raise ValueError(f"{self} is UTF-16 text; save it as UTF-8")
        return data.removeprefix(b"\xef\xbb\xbf")

    def first_line(self) -> str:
        """Returns the first line, at most a million bytes of it, without spaces around it and byte-order mark.

        Raises:
          ValueError: as `read`, as far as the first line shows it.
        """
        start = next(self._chunks(), b"")
        if not start.strip():
            start = self.read()
        line = start.removeprefix(b"\xef\xbb\xbf")[:_CHUNK].split(b"\n", 1)[0]
        return line.decode("utf-8", "replace").strip()

    def seekable(self) -> pathlib.Path | io.BytesIO:
        """Returns the content for readers that pick what they need: the file itself, or its bytes where it is packed.

        Raises:
          ValueError: as `read`.
        """
        if self.entry is None and not self.name.endswith(".gz") and self.path.stat().st_size:
            return self.path
        return io.BytesIO(self.read())

    def sha256(self) -> str:
        """Returns the hex digest of the bytes as stored: an entry of an archive is unpacked, a `.gz` is not."""
        digest = hashlib.sha256()
        for chunk in self._chunks(unpacked=False):
            digest.update(chunk)
        return digest.hexdigest()


def list_sources(path: str | pathlib.Path, max_unpacked_gb: float | None = None) -> list[Source]:
    """Lists the files at `path`: itself, or everything in the folder or zip archive, in order of name.

    Args:
      path: file, folder or zip archive.
      max_unpacked_gb: see `DataConfig`.

    Raises:
      FileNotFoundError: if nothing is there.
      ValueError: for a zip archive with an entry that climbs out, and for what is no regular file.
    """
    path = expanded(path)
    if len(path.name.encode(errors="replace")) > 255:
        raise FileNotFoundError(f"no file has so long a name as {shown(path.name)}; check data.path")
    if path.is_dir():
        return [Source(f, None, max_unpacked_gb) for f in sorted(path.rglob("*")) if f.is_file()]
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is a pipe or a device; write what comes out of it to a file first")
        raise FileNotFoundError(f"no file or folder at {shown(str(path), 200)[1:-1]}; check data.path")
    if path.suffix == ".zip":
        with open_zip(path) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        return [Source(path, name, max_unpacked_gb) for name in names]
    return [Source(path, None, max_unpacked_gb)]


def _check_entry(name: str, archive: pathlib.Path, *, is_plain: bool) -> None:
    """Refuses links and devices, and a name that is absolute, has a drive letter or climbs with ".."."""
    path = pathlib.PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(
            f"{archive}: entry {shown(name)} would leave the folder it is unpacked into; nothing was unpacked, "
            "get the archive from its publisher again"
        )
    require(is_plain, f"{archive}: entry {shown(name)} is no plain file; links are not unpacked")


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
    except (*_DAMAGED, OSError, ValueError) as error:
        raise ValueError(
            f"{archive} is not a complete zip archive ({shown(str(error))[1:-1]}); get the file again"
        ) from error
    try:
        names = set()
        for entry in opened.infolist():
            _check_entry(entry.filename, archive, is_plain=not stat.S_ISLNK(entry.external_attr >> 16))
            name = posixpath.normpath(entry.filename)
            if name in names:
                raise ValueError(f"{archive} holds entry {shown(entry.filename)} twice; pack it again with one of them")
            names.add(name)
    except ValueError:
        opened.close()
        raise
    return opened


def _zip_entries(archive: pathlib.Path) -> Iterator[tuple[str, IO[bytes]]]:
    with open_zip(archive) as opened:
        for entry in opened.infolist():
            if not entry.is_dir():
                with opened.open(entry) as stream:
                    yield entry.filename, stream


def _tar_entries(archive: pathlib.Path, budget: Budget) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as opened:
        for entry in opened:
            _check_entry(entry.name, archive, is_plain=entry.isfile() or entry.isdir())
            if entry.isfile() and (stream := opened.extractfile(entry)) is not None:
                with stream:
                    yield entry.name, stream
        # What follows the last entry holds the checksum of a packed archive.
        while chunk := opened.fileobj.read(_CHUNK):
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
    budget = Budget(str(archive), archive.stat().st_size, max_unpacked_gb)
    is_zip = archive.suffix == ".zip"
    damaged = (*_DAMAGED, gzip.BadGzipFile, FileExistsError, NotADirectoryError, IsADirectoryError)
    try:
        with replacing_folder(folder) as partial:
            try:
                for name, stream in _zip_entries(archive) if is_zip else _tar_entries(archive, budget):
                    target = partial / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("xb") as file:
                        while chunk := stream.read(_CHUNK):
                            budget.spend(len(chunk))
                            file.write(chunk)
            except damaged as error:
                reason = shown(getattr(error, "strerror", None) or str(error))[1:-1]
                raise ValueError(
                    f"{archive} is not a complete {'zip' if is_zip else 'tar'} archive ({reason}); delete it and get "
                    "it again"
                ) from error
    except OSError:
        if not folder.is_dir():
            raise
    return folder
