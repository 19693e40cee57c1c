"""Checks of settings and input: what does not hold is a `ValueError` of one short line."""

import datetime
import itertools
import numbers
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

# Containers are shown so deep, and so many members of each.
_DEPTH, _MEMBERS = 2, 4


def require(condition: bool, message: str) -> None:
    """Raises ValueError with a message that quotes the value and the limit, unless a condition holds."""
    if not condition:
        raise ValueError(message)


def shown(value: Any, most: int = 80) -> str:
    """Returns a value of unknown origin as one printable line of at most `most` characters, for a message.

    The cost is bounded whatever the value: of containers the first members of the first levels are looked at, of texts
    the beginning, and no `repr` of an unknown class is called.
    """
    return shortened(_shown(value, most, _DEPTH), most)


def shortened(text: str, most: int) -> str:
    """Returns a text without line breaks and control characters, its middle left out where it is longer than `most`."""
    if len(text) > 4 * most:
        text = text[: 2 * most] + text[-2 * most :]
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    if len(text) <= most:
        return text
    head = (most - 2) * 2 // 3
    return f"{text[:head]}..{text[len(text) - (most - 2 - head) :]}"


def listed(parts: Sequence[str], most: int = 200, separator: str = "; ") -> str:
    """Returns as many parts as fit into about `most` characters (the first always), and how many follow."""
    text = shortened(parts[0], most)
    for index, part in enumerate(parts[1:], 1):
        if len(text) + len(separator) + len(part) > most:
            return f"{text}{separator}and {len(parts) - index} more"
        text += separator + shortened(part, most)
    return text


def _members(values: Iterable[Any], count: int, most: int, depth: int) -> str:
    if depth == 0:
        return ".." if count else ""
    parts = [_shown(value, most, depth - 1) for value in itertools.islice(values, _MEMBERS)]
    return ", ".join(parts + [".."] * (count > _MEMBERS))


def _shown(value: Any, most: int, depth: int) -> str:
    if isinstance(value, str | bytes | bytearray):
        return repr(value[:most]) + (".." if len(value) > most else "")
    if isinstance(value, Mapping):
        if depth == 0:
            return "{..}" if value else "{}"
        pairs = itertools.islice(value.items(), _MEMBERS)
        parts = [f"{_shown(key, most, 0)}: {_shown(member, most, depth - 1)}" for key, member in pairs]
        return "{" + ", ".join(parts + [".."] * (len(value) > _MEMBERS)) + "}"
    if isinstance(value, AbstractSet):
        return "{" + _members(value, len(value), most, depth) + "}"
    if isinstance(value, list | tuple):
        opening, closing = "[]" if isinstance(value, list) else "()"
        return opening + _members(value, len(value), most, depth) + closing
    if isinstance(value, int) and value.bit_length() > 256:  # Digits of larger ones cost time, or are refused.
        return f"<a whole number of {value.bit_length()} bits>"
    if value is None or isinstance(value, bool | int | float | complex | datetime.date | datetime.time):
        return repr(value)
    if isinstance(value, pathlib.PurePath) or (isinstance(value, numbers.Number) and hasattr(value, "dtype")):
        return str(value)
    return f"<{type(value).__name__}>"
