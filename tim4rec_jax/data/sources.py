"""Where the bytes of a log lie: a file, a gzipped file, a file in a folder, or an entry of a zip archive."""

import contextlib
import gzip
import hashlib
import io
import pathlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from tim4rec_jax.checks import shown
from tim4rec_jax.data.archives import CHUNK, DAMAGED_ZIP, Budget, open_zip

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """Returns a path with `~` replaced by the home folder; as it stands where no home folder is known."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:  # Neither HOME nor an entry of the user in the system's list, as in some containers.
        return pathlib.Path(path)


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

    def budget(self, packed_bytes: int | None = None) -> Budget:
        """Returns what may come out of this file (by default) or of so many bytes of it."""
        packed = self.path.stat().st_size if packed_bytes is None else packed_bytes
        return Budget(str(self), packed, self.max_unpacked_gb)

    @contextlib.contextmanager
    def _stored(self) -> Iterator[BinaryIO]:
        """Opens the bytes as stored: an entry of an archive is unpacked, a `.gz` is not."""
        if self.entry is None:
            with self.path.open("rb") as file:
                yield file
            return
        with open_zip(self.path) as archive:
            try:
                with archive.open(self.entry) as file:
                    yield file
            except (*DAMAGED_ZIP, KeyError) as error:
                raise ValueError(
                    f"{self} is damaged ({shown(str(error))[1:-1]}); get {self.path.name} again"
                ) from error

    def _chunks(self) -> Iterator[bytes]:
        """Yields the bytes as stored, as many as the budget allows."""
        budget = self.budget()
        with self._stored() as file:
            while chunk := file.read(CHUNK):
                if self.entry is not None:
                    budget.spend(len(chunk))
                yield chunk

    def raw_bytes(self) -> bytes:
        """Returns the bytes as stored (a `.gz` stays compressed).

        Raises:
          ValueError: if the zip entry fails its checksum, or unpacks to more than `max_unpacked_gb` allows.
        """
        whole = io.BytesIO()
        for chunk in self._chunks():
            whole.write(chunk)
        return whole.getvalue()

    def read(self) -> bytes:
        """Returns the content, decompressed, without a byte-order mark.

        Raises:
          ValueError: if the file is empty or UTF-16, a gzip is truncated or damaged, or unpacks to more than
            `max_unpacked_gb` allows.
        """
        data = self.raw_bytes()
        if data and self.name.endswith(".gz"):
            data = self._gunzipped(data)
        if not data[:CHUNK].strip() and not data.strip():
            raise ValueError(f"{self} is empty; a log needs at least one row")
        if data.startswith(_UTF_16):
            raise ValueError(f"{self} is UTF-16 text; save it as UTF-8")
        return data.removeprefix(b"\xef\xbb\xbf")

    def _gunzipped(self, data: bytes) -> bytes:
        whole, budget = io.BytesIO(), self.budget(len(data))
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                while chunk := file.read(CHUNK):
                    budget.spend(len(chunk))
                    whole.write(chunk)
        except EOFError as error:
            raise ValueError(f"{self} is a truncated gzip file ({error}); get it again") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self} is not an intact gzip file ({error}); get it again") from error
        return whole.getvalue()

    def first_line(self) -> str:
        """Returns the first line, at most a million bytes of it, without spaces around it and byte-order mark.

        Raises:
          ValueError: as `read`, as far as the first line shows it.
        """
        if self.name.endswith(".gz") or self.entry is not None:
            return first_line(self.read())
        with self.path.open("rb") as file:
            start = file.read(CHUNK)
        return first_line(start.removeprefix(b"\xef\xbb\xbf")) if start.strip() else first_line(self.read())

    def seekable(self) -> pathlib.Path | io.BytesIO:
        """Returns the content for readers that pick what they need: the file itself, or its bytes where it is packed.

        Raises:
          ValueError: as `read`.
        """
        if self.entry is None and not self.name.endswith(".gz") and self.path.stat().st_size:
            return self.path
        return io.BytesIO(self.read())

    def sha256(self) -> str:
        """Returns the hex digest of the bytes as stored."""
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()


def first_line(data: bytes) -> str:
    """Returns the first line of a text, at most a million bytes of it, without spaces around it."""
    return data[:CHUNK].split(b"\n", 1)[0].decode("utf-8", "replace").strip()


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
