"""Pickles of PyTorch checkpoints, taken apart without importing or calling anything they name."""

import dataclasses
import io
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from tim4rec_jax.checks import require

# A tensor takes about 35; with Adam's moments that is a model of some 4,000 tensors.
MOST_OPERATIONS = 500_000

# What checkpoints are made of. Everything else could be code, and a file that names it is refused.
_HARMLESS = re.compile(
    r"collections\.(OrderedDict|defaultdict|Counter)|torch\.\w+Storage|torch\.storage\.\w+Storage"
    r"|torch\.(q?u?int|b?float|complex|bits|double|half|long|short|bool|qint)\w*|torch\.(Size|device|Tensor)"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|frozenset|complex|bytearray|int|float|bool|str|list|dict|tuple)"
    r"|numpy\.(dtype|ndarray|float\d+|int\d+)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    }
)
_MARK = object()


class CodeRefusedError(ValueError):
    """A pickle names something that reading it by `pickle` would import."""


@dataclasses.dataclass(frozen=True)
class Name:
    """What a pickle would import, such as "torch.FloatStorage"."""

    path: str


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What a pickle would call, and with what."""

    function: Any
    arguments: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Persistent:
    """A reference to data outside the pickle."""

    key: Any


class Names(dict):
    """A dict of the pickle, with the attributes that it would set on it."""

    attributes: Any = None


def _key(value: Any) -> Any:
    """Keys whose hash is quick and hard to make collide stand for themselves, all others for nothing but themselves."""
    plain = isinstance(value, str | bytes | bool | Name) or value is None
    return value if plain or (isinstance(value, int) and abs(value) < 2**60) else object()


class _Machine:
    """The stack machine of pickle over inert values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def _pop(self) -> Any:
        value = self.stack.pop()
        require(value is not _MARK, "a mark where a value is expected")
        return value

    def _since_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _take(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        require(isinstance(target, list), "members for something that is no list")
        target += values

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        require(isinstance(target, dict) and len(pairs) % 2 == 0, "names and values for something that is no dict")
        target.update(zip(map(_key, pairs[::2]), pairs[1::2], strict=True))

    def _import(self, path: str) -> None:
        if not _HARMLESS.fullmatch(path):
            raise CodeRefusedError(path)
        self.stack.append(Name(path))

    def _call(self, function: Any, arguments: Any) -> None:
        if function == Name("collections.OrderedDict") and isinstance(arguments, tuple):
            ordered = Names()
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            ordered.update((_key(p[0]), p[1]) for p in pairs if isinstance(p, list | tuple) and len(p) == 2)
            self.stack.append(ordered)
        else:
            self.stack.append(Call(function, arguments))

    def _build(self) -> None:
        state, target = self._pop(), self.stack[-1]
        if isinstance(target, Names):
            target.attributes = state

    def step(self, operation: str, argument: Any) -> None:
        """Carries out one operation."""
        stack = self.stack
        if operation in _VALUES:
            stack.append(argument)
        elif operation in _CONSTANTS:
            stack.append(_CONSTANTS[operation])
        elif operation in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            require(stack[-1] is not _MARK, "a mark where a value is expected")
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif operation in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif operation == "GLOBAL":
            self._import(argument.replace(" ", ".", 1))
        elif operation == "STACK_GLOBAL":
            module, name = self._take(2)
            require(isinstance(module, str) and isinstance(name, str), "an import without a name")
            self._import(f"{module}.{name}")
        else:
            require(operation in _OPERATIONS, f"the operation {operation}, which checkpoints do not use")
            _OPERATIONS[operation](self)


def _with_class(machine: _Machine, values: list[Any]) -> None:
    machine._call(values[0], tuple(values[1:]))


_OPERATIONS: dict[str, Callable[[_Machine], Any]] = {
    "MARK": lambda m: m.stack.append(_MARK),
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": lambda m: m._since_mark(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "EMPTY_SET": lambda m: m.stack.append([]),
    "EMPTY_TUPLE": lambda m: m.stack.append(()),
    "EMPTY_DICT": lambda m: m.stack.append(Names()),
    "LIST": lambda m: m.stack.append(m._since_mark()),
    "TUPLE": lambda m: m.stack.append(tuple(m._since_mark())),
    "FROZENSET": lambda m: m.stack.append(tuple(m._since_mark())),
    "DICT": lambda m: (pairs := m._since_mark(), m.stack.append(Names()), m._set(pairs)),
    "TUPLE1": lambda m: m.stack.append(tuple(m._take(1))),
    "TUPLE2": lambda m: m.stack.append(tuple(m._take(2))),
    "TUPLE3": lambda m: m.stack.append(tuple(m._take(3))),
    "APPEND": lambda m: m._extend(m._take(1)),
    "APPENDS": lambda m: m._extend(m._since_mark()),
    "ADDITEMS": lambda m: m._extend(m._since_mark()),
    "SETITEM": lambda m: m._set(m._take(2)),
    "SETITEMS": lambda m: m._set(m._since_mark()),
    "REDUCE": lambda m: m._call(*m._take(2)),
    "NEWOBJ": lambda m: m._call(*m._take(2)),
    "NEWOBJ_EX": lambda m: m._call(*m._take(3)[:2]),
    "OBJ": lambda m: _with_class(m, m._since_mark()),
    "BUILD": lambda m: m._build(),
    "BINPERSID": lambda m: m.stack.append(Persistent(m._pop())),
    "PROTO": lambda m: None,
    "FRAME": lambda m: None,
}


def read_pickle(stream: BinaryIO, most: int = MOST_OPERATIONS) -> Any:
    """Returns what the pickle at a stream's position describes; the stream stands after it.

    Dicts come as `Names`, sets as lists; what it would import, call or fetch as `Name`, `Call` and `Persistent`.
    Time and memory are bounded by `most`; values may be shared and cyclic, as the pickle says.

    Args:
      stream: bytes of a bounded length.
      most: operations that are carried out at most.

    Raises:
      CodeRefusedError: it names what no checkpoint needs; the message is that name.
      ValueError: it is damaged or cut short, or has too many operations.
    """
    machine = _Machine()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            require(count < most, f"more than {most:,} operations in its pickle")
            if operation.name == "INST":
                raise CodeRefusedError(str(argument).replace(" ", ".", 1))
            if operation.name != "STOP":
                machine.step(operation.name, argument)
        return machine._pop()
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None


def read_pickles(content: bytes, count: int) -> tuple[list[Any], int]:
    """Returns what several pickles in a row describe, and where they end; see `read_pickle`."""
    stream = io.BytesIO(content)
    return [read_pickle(stream) for _ in range(count)], stream.tell()
