"""One line of a stream: an event to take in, or a question to answer."""

from typing import Any

from tim4rec_jax.checks import require
from tim4rec_jax.serving.durable_log import Line
from tim4rec_jax.serving.json_lines import raw_id, read_json, require_keys, shown_json
from tim4rec_jax.serving.user_table import Event, UserTable

LONGEST_USER = 1000
_LONGEST_MESSAGE = 280
_LONGEST_SHOWN = 60


def parsed(content: bytes) -> dict[str, Any]:
    """Reads an event or a question.

    Raises:
      ValueError: the line is neither.
    """
    values = read_json(content)
    if not isinstance(values, dict) or "user" not in values or ("item" in values) == ("recommend" in values):
        raise ValueError('must be an object with "user" and either "item" and "timestamp", or "recommend"')
    require_keys(values, {"user", "item", "timestamp"} if "item" in values else {"user", "recommend", "exclude_seen"})
    return values


def _id(values: dict[str, Any], name: str) -> str:
    try:
        return raw_id(values[name])
    except ValueError as error:
        raise ValueError(f'"{name}": {error}') from error


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
        f'"user": id {shown_json(user, _LONGEST_SHOWN)} has {len(user)} characters, over {LONGEST_USER}',
    )
    if "item" in values:
        item = _id(values, "item")
        require("timestamp" in values, '"timestamp" is missing: seconds since 1970')
        time = values["timestamp"]
        if type(time) is not int:
            raise ValueError(
                f"user {user!r}: timestamp {shown_json(time, _LONGEST_SHOWN)} must be a whole number of seconds since "
                "1970, without a fraction"
            )
        # Larger numbers than any time are the table's to refuse, which says more.
        if latest_time < time < 2**31:
            raise ValueError(f"user {user!r}: timestamp {time} is over --latest_time={latest_time}")
        table.add([Event(user, item, time)])
        return None
    k, exclude_seen = values["recommend"], values.get("exclude_seen", False)
    if type(k) is not int or abs(k) >= 2**31:
        raise ValueError(f'"recommend" must be a whole number of items, not {shown_json(k, _LONGEST_SHOWN)}')
    if not isinstance(exclude_seen, bool):
        raise ValueError(f'"exclude_seen" must be true or false, not {shown_json(exclude_seen, _LONGEST_SHOWN)}')
    [items] = table.recommender.named(*table.top_k([user], k, exclude_seen=exclude_seen))
    return {"user": user, "items": [{"item": r.item_id, "score": r.score, "title": r.title} for r in items]}


def error_line(error: Exception) -> dict[str, str]:
    """What a bad line is answered, without its number."""
    message = str(error)
    return {"error": message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}.."}
