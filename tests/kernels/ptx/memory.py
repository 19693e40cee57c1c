"""Memory that knows which of its bytes were written, and by whom they were accessed since the last barrier."""

from dataclasses import dataclass

import numpy as np

_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


class Fault(Exception):
    """What a kernel may not do, or an instruction that the interpreter does not know."""


@dataclass
class Author:
    """Who accesses memory.

    Attributes:
      program, warp: their numbers.
      epoch: when the program last met a `bar.sync`.
      time: when the warp last met that or a `bar.warp.sync`.
      fenced: epoch of the warp's last `fence.proxy.async`.
    """

    program: int
    warp: int
    epoch: int = 0
    time: int = 0
    fenced: int = 0


class _Trace:
    """Who accessed each byte: the program, the warps since their last `bar.sync`, the lanes since `bar.warp.sync`."""

    def __init__(self, size: int):
        self.program = np.full(size, -1, np.int32)
        self.epoch, self.time = np.zeros((2, size), np.int64)
        self.warps, self.lanes = np.zeros((2, size), np.uint32)

    def others(self, at: np.ndarray, author: Author, lanes: np.ndarray) -> np.ndarray:
        """[n, bytes] bool: somebody else accessed the byte, with no barrier since."""
        program = self.program[at]
        elsewhere = (program != -1) & (program != author.program)
        warps = (self.epoch[at] == author.epoch) & (self.warps[at] & ~_BITS[author.warp] != 0)
        in_warp = (self.time[at] == author.time) & (self.lanes[at] & ~_BITS[lanes][:, None] != 0)
        return elsewhere | warps | in_warp

    def add(self, at: np.ndarray, author: Author, lanes: np.ndarray) -> None:
        program = self.program[at]
        # -2 stands for several programs.
        self.program[at] = np.where((program == -1) | (program == author.program), author.program, -2)
        self.warps[at] = np.where(self.epoch[at] == author.epoch, self.warps[at], 0) | _BITS[author.warp]
        self.lanes[at[self.time[at] != author.time]] = 0
        np.bitwise_or.at(self.lanes, at, np.broadcast_to(_BITS[lanes][:, None], at.shape))
        self.epoch[at], self.time[at] = author.epoch, author.time


class Memory:
    """The bytes of an array, and what is known of them.

    Args:
      name: as faults call it.
      array: what they hold.
      written: whether somebody wrote that, or it is only there.
    """

    def __init__(self, name: str, array: np.ndarray, *, written: bool = True):
        self.name, self.size = name, array.nbytes
        self.bytes = np.frombuffer(array.tobytes(), np.uint8).copy()
        self.written = np.full(self.size, written)
        # The warp whose write tensor cores that read by themselves may not see yet, or -1.
        self._hidden = np.full(self.size, -1, np.int32)
        self.reads, self.writes = _Trace(self.size), _Trace(self.size)

    def _at(self, offsets: np.ndarray, size: int, verb: str) -> np.ndarray:
        if (offsets % size).any():
            raise Fault(f"{verb} {size} bytes at byte {offsets[offsets % size != 0][0]} of {self.name}: not aligned")
        outside = (offsets < 0) | (offsets + size > self.size)
        if outside.any():
            offset = offsets[outside][0]
            raise Fault(f"{verb} {size} bytes at byte {offset} of {self.name}, which has {self.size}")
        return offsets[:, None] + np.arange(size)

    def load(self, author: Author, lanes: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
        """Reads `size` bytes for each lane; returns uint8 [n, size]."""
        at = self._at(offsets, size, "reads")
        if not self.written[at].all():
            raise Fault(f"reads byte {at[~self.written[at]][0]} of {self.name}, which nobody wrote")
        self._no_race(self.writes.others(at, author, lanes), at, "reads", "wrote")
        self.reads.add(at, author, lanes)
        return self.bytes[at]

    def store(self, author: Author, lanes: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> None:
        """Writes uint8 [n, size]. Threads may write one value to the same place."""
        at = self._at(offsets, values.shape[1], "writes")
        changed = ~self.written[at] | (self.bytes[at] != values)
        self._no_race(self.writes.others(at, author, lanes) & changed, at, "writes", "wrote")
        self._no_race(self.reads.others(at, author, lanes) & changed, at, "writes", "read")
        self.bytes[at] = values
        self.written[at] = True
        self._no_race(self.bytes[at] != values, at, "writes", "writes at once")
        self._hidden[at] = author.warp
        self.writes.add(at, author, lanes)

    def show(self, author: Author) -> None:
        """A warp's fence: tensor cores see what it wrote, and its own ones what all wrote before the last barrier."""
        self._hidden[self._hidden == author.warp] = -1
        author.fenced = author.epoch

    def check_shown(self, author: Author, offsets: np.ndarray) -> None:
        """A warp's tensor cores are about to read."""
        inside = offsets[(offsets >= 0) & (offsets < self.size)]
        if ((self._hidden[inside] != -1) & (self.writes.epoch[inside] >= author.fenced)).any():
            raise Fault(f"reads {self.name} by tensor cores with no fence.proxy.async after it was written")

    def _no_race(self, race: np.ndarray, at: np.ndarray, verb: str, other: str) -> None:
        if race.any():
            raise Fault(f"race: {verb} byte {at[race][0]} of {self.name}, which another thread {other}")
