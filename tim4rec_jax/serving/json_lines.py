"""Lines of JSON in and out: objects whose users and items are raw ids."""

import collections
import json
from typing import Any

from tim4rec_jax.checks import shortened, shown


def shown_json(value: Any, most: int = 80) -> str:
    """Returns a value as JSON, for a message."""
    return shortened(json.dumps(value), most)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{shown_json(next(name for name, count in counts.items() if count > 1))} stands there twice")
    return values


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def read_json(content: bytes) -> Any:
    """Returns the value of a line; a name that stands twice and numbers that are none are refused.

    Raises:
      ValueError: the line is not JSON in UTF-8.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON in UTF-8 (byte {error.start + 1}: {error.reason})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deep)") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({shortened(str(error), 120)})") from error


def require_keys(values: dict[str, Any], known: set[str]) -> None:
    """Raises ValueError for the first names that are not known."""
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown keys {shown(unknown)}; known: {sorted(known)}")


def raw_id(value: Any) -> str:
    """Returns a JSON string or whole number as a raw id; ids that look like numbers are often written as such.

    Raises:
      ValueError: it is neither, or holds what is no character.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"id {shown_json(value)} must be a string or a whole number")
    try:
        str(value).encode()  # Text with half a character of UTF-16 can be written nowhere.
    except UnicodeEncodeError as error:
        raise ValueError(f"id {shown(value)} has half of a surrogate pair, which is no character") from error
    except ValueError as error:
        raise ValueError(f"id {shown(value)} is a number too long for an id") from error
    return str(value)


def as_json(value: Any) -> bytes:
    """Returns a value as a JSON line in UTF-8 without its line break; what is no character stays escaped."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")
