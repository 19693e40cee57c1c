"""Lines in and answers out that a kill at any moment neither loses nor doubles."""

import contextlib
import hashlib
import json
import os
import pathlib
import select
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tim4rec_jax.files import named_in_errors, write_atomically

READ_BYTES = 2**16
JOURNAL_BUFFER_BYTES = 2**20
_LONGEST_HEADER = 4096
_NONE = -1  # No descriptor.
# What every answer begins with; other lines in a file of answers are somebody else's.
_ANSWER = b'{"line": '


class Line(NamedTuple):
    """One line without its line break.

    Attributes:
      content: the bytes, or None for a line over the limit, which is not kept.
      length: bytes of the line.
      hash: SHA-256 of the line.
    """

    content: bytes | None
    length: int
    hash: bytes


@dataclass
class Chain:
    """How far a file of lines goes.

    Attributes:
      lines: lines so far.
      bytes: their bytes with line breaks.
      digest: hash of these lines in hexadecimal, each chained to the one before.
    """

    lines: int = 0
    bytes: int = 0
    digest: str = ""

    def add(self, line: Line) -> None:
        """Takes in a line."""
        self.lines += 1
        self.bytes += line.length + 1
        self.digest = hashlib.sha256(self.digest.encode() + line.hash).hexdigest()

    @classmethod
    def from_notes(cls, notes: Any) -> "Chain":
        """Reads what `asdict` made of a chain.

        Raises:
          ValueError: it is something else.
        """
        if not isinstance(notes, dict) or set(notes) != {"lines", "bytes", "digest"}:
            raise ValueError("a position must have lines, bytes and digest")
        for name in ("lines", "bytes"):
            if type(notes[name]) is not int or not 0 <= notes[name] < 2**63:
                raise ValueError(f"a position's {name} must be a whole number from 0")
        if type(notes["digest"]) is not str or len(notes["digest"]) not in (0, 64):
            raise ValueError("a position's digest must have 64 digits")
        return cls(**notes)


def hashed(content: bytes) -> Line:
    """Returns a line that is held whole."""
    return Line(content, len(content), hashlib.sha256(content).digest())


class LineReader:
    """Lines of a file or a pipe; memory is bounded whatever comes.

    Attributes:
      ended: the input has come to its end.
      copy: receives the bytes of every line, its break included, as it is taken; of a long line piece by piece.
    """

    def __init__(self, descriptor: int, longest: int, wait: Callable[[int, float | None], bool] | None = None) -> None:
        """Reads from where the descriptor stands.

        Args:
          descriptor: of a file or a pipe.
          longest: bytes of the longest line that is kept.
          wait: waits until there is something to read, at most so many seconds; returns whether there is.
        """
        self.ended = False
        self.copy: Callable[[bytes], None] | None = None
        self._descriptor, self._longest, self._wait = descriptor, longest, wait or until_readable
        self._buffer = bytearray()
        self._searched = 0
        self._passed, self._hash = 0, hashlib.sha256()

    def next(self, seconds: float | None = None) -> Line | None:
        """Returns the next whole line; None where the input ends, or where no line came in so many seconds."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                return self._cut(end)
            self._searched = len(self._buffer)
            if self._passed or len(self._buffer) > self._longest:
                self._pass_over(len(self._buffer))
            if self.ended or not self._wait(self._descriptor, seconds):
                return None
            piece = os.read(self._descriptor, READ_BYTES)
            self.ended = not piece
            self._buffer += piece

    @property
    def midway(self) -> bool:
        """Pieces of a long line have been taken and its end has not come."""
        return self._passed > 0

    def rest(self) -> bytes | None:
        """Returns what stands after the last line break; None where it is longer than what is kept."""
        return None if self._passed else bytes(self._buffer)

    def _pass_over(self, size: int) -> None:
        piece = bytes(self._buffer[:size])
        if self.copy is not None:
            self.copy(piece)
        self._hash.update(piece)
        self._passed += size
        del self._buffer[:size]
        self._searched = 0

    def _cut(self, end: int) -> Line:
        if self._passed or end > self._longest:
            self._pass_over(end)
            line = Line(None, self._passed, self._hash.digest())
            self._passed, self._hash, end = 0, hashlib.sha256(), 0
            taken = b"\n"
        else:
            content = bytes(self._buffer[:end])
            line, taken = hashed(content), content + b"\n"
        if self.copy is not None:
            self.copy(taken)
        del self._buffer[: end + 1]
        self._searched = 0
        return line


def until_readable(descriptor: int, seconds: float | None) -> bool:
    """Waits until a descriptor can be read, at most so many seconds; returns whether it can."""
    return bool(select.select([descriptor], [], [], seconds)[0])


def _write(descriptor: int, content: bytes | bytearray) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


class Journal:
    """The lines that came since a table was saved, beside it on the disk, as they came.

    Its first line says after which line of the whole input it begins.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Names the file; `begin` makes it."""
        self.path = path
        self._descriptor = _NONE
        self._buffer = bytearray()
        self._synced = 0

    @property
    def waiting(self) -> bool:
        """Lines have come that are not on the disk yet."""
        return bool(self._buffer)

    def append(self, content: bytes) -> None:
        """Takes in bytes of lines; they are on the disk after `sync`."""
        self._buffer += content
        if len(self._buffer) > JOURNAL_BUFFER_BYTES:
            self._write()

    def _write(self) -> None:
        with named_in_errors(self.path):
            _write(self._descriptor, self._buffer)
        self._buffer = bytearray()

    def sync(self) -> None:
        """Puts every line so far onto the disk.

        Raises:
          OSError: the disk takes no more; the file is named.
        """
        if self._buffer:
            self._write()
            with named_in_errors(self.path):
                os.fsync(self._descriptor)
                self._synced = os.fstat(self._descriptor).st_size

    def begin(self, position: Chain) -> None:
        """Begins anew: a table that was saved holds all lines up to a position."""
        self.close()
        header = json.dumps(asdict(position)).encode() + b"\n"
        write_atomically(self.path, header)
        self._synced = len(header)
        with named_in_errors(self.path):
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @property
    def is_open(self) -> bool:
        """Lines can be taken in."""
        return self._descriptor != _NONE

    def undo(self) -> None:
        """Takes back every line since the last `sync`; where the disk refuses that, lets the file go."""
        self._buffer = bytearray()
        try:
            os.ftruncate(self._descriptor, self._synced)
        except OSError:
            self.close()

    def remove(self) -> None:
        """Removes the file: a table that was saved holds all lines."""
        self.close()
        with named_in_errors(self.path):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets the file go as it is; lines that `sync` has not written are given up."""
        self._buffer = bytearray()
        if self._descriptor != _NONE:
            os.close(self._descriptor)
            self._descriptor = _NONE

    def read(self, held: Chain, longest: int) -> Iterator[Line]:
        """Yields the lines that a table does not hold; one that was torn at the end is none.

        Args:
          held: the lines that the table holds.
          longest: bytes of the longest line that is kept.

        Raises:
          ValueError: the file is damaged, or belongs to another table.
        """
        if not self.path.is_file():  # A pipe would be waited for without end.
            raise ValueError(f"{self.path} is no journal, for it is no file; move it away")
        with named_in_errors(self.path), self.path.open("rb") as file:
            header = file.readline(_LONGEST_HEADER)
            try:
                before = Chain.from_notes(json.loads(header))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path} is no journal, or is damaged: {_short(error)}") from error
            file.seek(len(header))
            os.lseek(file.fileno(), len(header), os.SEEK_SET)
            reader = LineReader(file.fileno(), longest)
            while before.lines < held.lines and (line := reader.next()):
                before.add(line)
            if before != held:
                raise ValueError(
                    f"{self.path} does not go on from the {held.lines} lines that its table holds (line {before.lines} "
                    "was compared); bring back the table that belongs to it, or remove the journal, whose lines are "
                    "then lost"
                )
            while line := reader.next():
                yield line


def _short(error: Exception) -> str:
    return str(error)[:100]


class Answers:
    """Answers, one per line, in a file; those that a killed run wrote already are recognised and not written again."""

    def __init__(self, path: pathlib.Path, held: Chain | None) -> None:
        """Opens the file, or makes a new one.

        Args:
          path: the file.
          held: answers that were there when the table was saved; None where the file cannot be ours.

        Raises:
          FileExistsError: there is a file that is not ours.
          ValueError: it does not begin with the answers that were there.
          OSError: the file cannot be opened.
        """
        self.path = path
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is no regular file; choose another one, or --output=- for standard output")
        with named_in_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._size = os.fstat(self._descriptor).st_size
            self.position = Chain()
            if self._size:
                self.position = self._checked(held)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _checked(self, held: Chain | None) -> Chain:
        if held is None:
            raise FileExistsError(
                f"{self.path} exists already, and no saved table says that its answers go on there; remove it, or "
                "choose another file"
            )
        found = Chain()
        with self.path.open("rb") as file:
            for line in file:
                if found.lines < held.lines:
                    found.add(hashed(line.removesuffix(b"\n")))
                elif found != held or not line.startswith(_ANSWER[: len(line)]):
                    break
            else:
                if found == held and held.bytes <= self._size:
                    return found
        raise ValueError(
            f"{self.path} does not begin with the {held.lines} answers that were given, or has lines that are no "
            "answers; choose another file for the answers to come"
        )

    def write(self, answer: bytes) -> None:
        """Writes an answer without its line break.

        Raises:
          OSError: the disk takes no more; nothing of the answer is left, and the file is named.
        """
        content, position = answer + b"\n", self.position.bytes
        with named_in_errors(self.path):
            if position < self._size:
                if os.pread(self._descriptor, len(content), position) == content:
                    self.position.add(hashed(answer))
                    return
                self.cut()
            os.lseek(self._descriptor, position, os.SEEK_SET)
            try:
                _write(self._descriptor, content)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, position)
                raise
        self.position.add(hashed(answer))
        self._size = self.position.bytes

    def cut(self) -> None:
        """Removes what stands after the last answer."""
        with named_in_errors(self.path):
            os.ftruncate(self._descriptor, self.position.bytes)
        self._size = self.position.bytes

    def sync(self) -> None:
        """Puts every answer so far onto the disk."""
        with named_in_errors(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
