"""One line of experiments.stream: what it asks for, and what it is answered."""

import collections
import json
from typing import Any

from experiments.recommend import raw_id
from tim4rec_jax.checks import require
from tim4rec_jax.serving.durable_log import Line
from tim4rec_jax.serving.user_table import Event, UserTable

LONGEST_USER = 1000
_LONGEST_MESSAGE = 280
_LONGEST_SHOWN = 60


def _shown(value: Any) -> str:
    """A value for messages."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}.."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{_shown(twice)} stands there twice")
    return values


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def parsed(content: bytes) -> dict[str, Any]:
    """Reads an event or a question.

    Raises:
      ValueError: the line is neither.
    """
    try:
        values = json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON in UTF-8 (byte {error.start + 1}: {error.reason})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deep)") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(values, dict) or "user" not in values or ("item" in values) == ("recommend" in values):
        raise ValueError('must be an object with "user" and either "item" and "timestamp", or "recommend"')
    known = {"user", "item", "timestamp"} if "item" in values else {"user", "recommend", "exclude_seen"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown keys {unknown}; known: {sorted(known)}")
    return values


def _id(values: dict[str, Any], name: str) -> str:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'"{name}": id {_shown(value)} must be a string or a whole number')
    return raw_id(value)


def answer_line(table: UserTable, line: Line, *, longest_line: int, latest_time: int) -> dict[str, Any] | None:
    """Takes in an event, or answers a question.

    Args:
      table: the states.
      line: what came.
      longest_line: bytes of the longest line that is kept, for messages.
      latest_time: events after this second are refused.

    Returns:
      The answer without its line number; None for an event or a blank line.

    Raises:
      ValueError: for a line that says neither, or what the table refuses; nothing has changed.
      FloatingPointError: the user's scores are not finite.
    """
    if line.content is None:
        raise ValueError(f"the line has {line.length} bytes, over --longest_line={longest_line}; passed over")
    if not line.content.strip():
        return None
    values = parsed(line.content)
    user = _id(values, "user")
    require(
        len(user) <= LONGEST_USER or user in table,
        f'"user": id {_shown(user)} has {len(user)} characters, over {LONGEST_USER}',
    )
    if "item" in values:
        item = _id(values, "item")
        require("timestamp" in values, '"timestamp" is missing: seconds since 1970')
        time = values["timestamp"]
        if type(time) is not int:
            raise ValueError(
                f"user {user!r}: timestamp {_shown(time)} must be a whole number of seconds since 1970, without a "
                "fraction"
            )
        # Larger numbers than any time are the table's to refuse, which says more.
        if latest_time < time < 2**31:
            raise ValueError(f"user {user!r}: timestamp {time} is over --latest_time={latest_time}")
        table.add([Event(user, item, time)])
        return None
    k, exclude_seen = values["recommend"], values.get("exclude_seen", False)
    if type(k) is not int or abs(k) >= 2**31:
        raise ValueError(f'"recommend" must be a whole number of items, not {_shown(k)}')
    if not isinstance(exclude_seen, bool):
        raise ValueError(f'"exclude_seen" must be true or false, not {_shown(exclude_seen)}')
    [items] = table.recommender.named(*table.top_k([user], k, exclude_seen=exclude_seen))
    return {"user": user, "items": [{"item": r.item_id, "score": r.score, "title": r.title} for r in items]}


def error_line(error: Exception) -> dict[str, str]:
    """What a bad line is answered, without its number."""
    message = str(error)
    return {"error": message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}.."}


def as_json(answer: dict[str, Any]) -> bytes:
    """Returns an answer as a JSON line in UTF-8 without its line break; what is no character stays escaped."""
    return json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace")
