"""Where the bytes of a log lie: a file, a gzipped file, a file in a folder, or an entry of a zip archive."""

import gzip
import hashlib
import io
import pathlib
import zlib
from dataclasses import dataclass

from tim4rec_jax.data.archives import DAMAGED_ZIP, open_zip


@dataclass(frozen=True)
class Source:
    """One readable file.

    Attributes:
      path: file on disk.
      entry: name inside the zip archive at `path`; None for a plain file.
    """

    path: pathlib.Path
    entry: str | None = None

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
        return str(self.path) if self.entry is None else f"{self.path}/{self.entry}"

    def raw_bytes(self) -> bytes:
        """Returns the bytes as stored (a `.gz` stays compressed).

        Raises:
          ValueError: if the zip entry fails its checksum.
        """
        if self.entry is None:
            return self.path.read_bytes()
        with open_zip(self.path) as archive:
            try:
                return archive.read(self.entry)
            except (*DAMAGED_ZIP, KeyError) as error:
                raise ValueError(f"{self} is damaged ({error}); get {self.path.name} again") from error

    def read(self) -> bytes:
        """Returns the content, decompressed, without a byte-order mark.

        Raises:
          ValueError: if the file is empty, or a gzip is truncated or damaged.
        """
        data = self.raw_bytes()
        if data and self.name.endswith(".gz"):
            try:
                data = gzip.decompress(data)
            except EOFError as error:
                raise ValueError(f"{self} is a truncated gzip file ({error}); get it again") from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{self} is not an intact gzip file ({error}); get it again") from error
        if not data.strip():
            raise ValueError(f"{self} is empty; a log needs at least one row")
        return data.removeprefix(b"\xef\xbb\xbf")

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
        if self.entry is not None:
            return hashlib.sha256(self.raw_bytes()).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def list_sources(path: str | pathlib.Path) -> list[Source]:
    """Lists the files at `path`: itself, or everything in the folder or zip archive, in order of name.

    Raises:
      FileNotFoundError: if nothing is there.
      ValueError: for a zip archive with an entry that climbs out.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return [Source(file) for file in sorted(path.rglob("*")) if file.is_file()]
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder at {path}; check data.path")
    if path.suffix == ".zip":
        with open_zip(path) as archive:
            return [Source(path, name) for name in sorted(archive.namelist()) if not name.endswith("/")]
    return [Source(path)]
