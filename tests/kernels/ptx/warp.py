"""32 threads of a program, with their registers, and where their addresses lead."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tests.kernels.ptx.arithmetic import UNSIGNED
from tests.kernels.ptx.memory import Author, Fault, Memory

LANES = np.arange(32)
SHARED_BASE = 1024
# Arrays lie so far apart that an index out of one never reaches another.
_APART = 36
_NEVER_WRITTEN = 0xCDCD_CDCD_CDCD_CDCD


def array_address(number: int) -> int:
    """Where an array begins: in the middle of its room, so that offsets below 0 stay in it."""
    return (int(number) + 1 << _APART) + (1 << _APART - 1)


class Launch:
    """What the programs of one launch share.

    Args:
      arrays: what the kernel's parameters point to.
      grid: number of programs.
    """

    def __init__(self, arrays: Sequence[Memory], grid: tuple[int, int, int]):
        self.arrays, self.grid = arrays, grid
        self._clock = 0

    def tick(self) -> int:
        """Returns a later time at each call."""
        self._clock += 1
        return self._clock

    def special_registers(self, program: int) -> dict[str, int]:
        """A program's place in the grid."""
        x, y, _ = self.grid
        place = program % x, program // x % y, program // (x * y)
        registers = {f"%ctaid.{axis}": number for axis, number in zip("xyz", place, strict=True)}
        return registers | {f"%nctaid.{axis}": number for axis, number in zip("xyz", self.grid, strict=True)}


class Later:
    """Work that may be done at any time until it is waited for, and is done here at the last moment, in groups."""

    def __init__(self) -> None:
        # The last group is still open.
        self._groups: list[list[Callable[[], None]]] = [[]]

    def add(self, work: Callable[[], None]) -> None:
        """Adds work to the open group."""
        self._groups[-1].append(work)

    def commit(self) -> None:
        """Closes the open group."""
        self._groups.append([])

    def wait(self, left: int) -> None:
        """Does the work of all closed groups but the last ones."""
        done = max(len(self._groups) - 1 - left, 0)
        for work in sum(self._groups[:done], []):
            work()
        self._groups = self._groups[done:]

    def is_left(self) -> bool:
        """Something was never waited for."""
        return any(self._groups)


class Warp:
    """32 threads of a program.

    Args:
      launch: what it is part of.
      shared: the program's shared memory.
      widths: dtype of registers by the letters of their names.
      author: as whom it accesses memory.
      threads: of a program.
    """

    def __init__(self, launch: Launch, shared: Memory, widths: Mapping[str, np.dtype], author: Author, threads: int):
        self.launch, self.shared, self.widths, self.author = launch, shared, widths, author
        special = launch.special_registers(author.program)
        special |= {"%tid.x": 32 * author.warp + LANES, "%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "%laneid": LANES}
        self._special = {n: np.broadcast_to(np.asarray(v, np.uint32), 32) for n, v in special.items()}
        self.products, self.copies = Later(), Later()
        self._registers: dict[str, np.ndarray] = dict(self._special)

    def dtype(self, name: str) -> np.dtype:
        """Of a register's bits."""
        if name in self._special:
            return UNSIGNED[4]
        dtype = self.widths.get(name.rstrip("0123456789"))
        if dtype is None:
            raise Fault(f"register {name!r} is not declared")
        return dtype

    def bits(self, name: str, *, undefined: bool = False) -> np.ndarray:
        """A register as it is, [32]; with `undefined` also one that nobody wrote."""
        bits = self._registers.get(name)
        if bits is None:
            if not undefined:
                raise Fault(f"reads {name}, which nobody wrote")
            return self._never_written(name)
        return bits

    def _never_written(self, name: str) -> np.ndarray:
        return np.full(32, _NEVER_WRITTEN, np.uint64).astype(self.dtype(name))

    def read(self, name: str, dtype: np.dtype, *, low: bool = False) -> np.ndarray:
        """A register, or with `low` what fits of it, as [32] of a type."""
        bits = self.bits(name)
        if low and bits.dtype.itemsize > dtype.itemsize:
            bits = bits.astype(UNSIGNED[dtype.itemsize])
        if bits.dtype.itemsize != dtype.itemsize:
            raise Fault(f"{name} has {8 * bits.dtype.itemsize} bits, expected {8 * dtype.itemsize}")
        return bits.view(dtype)

    def write(self, name: str, value: np.ndarray, active: np.ndarray | None, *, widen: bool = False) -> None:
        """Sets a register in the active lanes (None: in all), with `widen` extended as the value's type is."""
        if name == "_":
            return
        dtype = self.dtype(name)
        if widen and value.dtype.itemsize < dtype.itemsize:
            value = value.astype(dtype)
        if value.dtype.itemsize != dtype.itemsize:
            raise Fault(f"{name} has {8 * dtype.itemsize} bits, not {8 * value.dtype.itemsize}")
        value = value.view(dtype)
        if active is not None:
            value = np.where(active, value, self.bits(name, undefined=True))
        self._registers[name] = value

    def _parts(self, space: str, addresses: np.ndarray) -> Iterator[tuple[Memory, np.ndarray, np.ndarray]]:
        """Yields each memory that addresses lie in, which of them do, and their offsets."""
        if space == "shared":
            yield self.shared, np.arange(len(addresses)), addresses - SHARED_BASE
            return
        numbers = (addresses >> _APART) - 1
        for number in np.unique(numbers):
            if not 0 <= number < len(self.launch.arrays):
                raise Fault(f"address {addresses[numbers == number][0]:#x} belongs to no array")
            which = np.flatnonzero(numbers == number)
            yield self.launch.arrays[number], which, addresses[which] - array_address(number)

    def load(self, space: str, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Reads `size` bytes at each lane's address; returns uint8 [n, size]."""
        result = np.empty((len(lanes), size), np.uint8)
        for memory, which, offsets in self._parts(space, addresses):
            result[which] = memory.load(self.author, lanes[which], offsets, size)
        return result

    def store(self, space: str, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Writes uint8 [n, size] at the lanes' addresses."""
        for memory, which, offsets in self._parts(space, addresses):
            memory.store(self.author, lanes[which], offsets, values[which])

    def load_asynchronously(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Reads shared memory as tensor cores do: [n] addresses, for all lanes; returns uint8 [n, size]."""
        self.shared.check_shown(self.author, addresses - SHARED_BASE)
        return self.load("shared", np.zeros(len(addresses), np.int64), addresses, size)
