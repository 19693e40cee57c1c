"""One line of a stream: an event to take in, or a question to answer."""

from typing import Any

import numpy as np

from tim4rec_jax.checks import require
from tim4rec_jax.serving.durable_log import Line
from tim4rec_jax.serving.json_lines import raw_id, read_json, require_keys, shown_json
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.rules import NO_RULES, Rules
from tim4rec_jax.serving.user_table import Event, UserTable

LONGEST_USER = 1000
_LONGEST_MESSAGE = 280
_LONGEST_SHOWN = 60


class UnknownItem(Exception):
    """An event's item is not in the catalogue, and the rules pass over such events."""


_KEYS = {
    "item": {"user", "item", "timestamp"},
    "recommend": {"user", "recommend", "exclude_seen", "allow", "deny"},
    "score": {"user", "score"},
}


def parsed(content: bytes) -> dict[str, Any]:
    """Reads an event or a question.

    Raises:
      ValueError: the line is neither.
    """
    values = read_json(content)
    known = isinstance(values, dict)
    if known and "similar" in values and "user" not in values:
        require_keys(values, {"similar", "item", "allow", "deny"})
        require("item" in values, '"similar" asks for items like an "item"')
        return values
    kinds = [kind for kind in _KEYS if kind in values] if known else []
    if len(kinds) != 1 or "user" not in values:
        raise ValueError(
            'must be an object with "user" and either "item" and "timestamp", or "recommend", or "score"; '
            'or with "item" and "similar"'
        )
    require_keys(values, _KEYS[kinds[0]])
    return values


def _id(values: dict[str, Any], name: str) -> str:
    try:
        return raw_id(values[name])
    except ValueError as error:
        raise ValueError(f'"{name}": {error}') from error


def _ids(values: dict[str, Any], name: str) -> list[str] | None:
    if name not in values:
        return None
    if not isinstance(values[name], list):
        raise ValueError(f'"{name}" must be a list of item ids, not {shown_json(values[name], _LONGEST_SHOWN)}')
    try:
        return [raw_id(item) for item in values[name]]
    except ValueError as error:
        raise ValueError(f'"{name}": {error}') from error


def _number(values: dict[str, Any], name: str) -> int:
    k = values[name]
    if type(k) is not int or abs(k) >= 2**31:
        raise ValueError(f'"{name}" must be a whole number of items, not {shown_json(k, _LONGEST_SHOWN)}')
    return k


def _allowed(values: dict[str, Any], known: Recommender, rules: Rules) -> np.ndarray | None:
    """The items that the rules and a question's own lists leave together."""
    lists = {name: _ids(values, name) for name in ("allow", "deny")}
    if lists["allow"] is None and lists["deny"] is None:
        return rules.allowed
    own = np.full(known.num_items + 1, lists["allow"] is None)
    for name, value in (("allow", True), ("deny", False)):
        for item in lists[name] or []:
            if not rules.skip_items or item in known.index_of_item:
                own[known.item_index(item, f'"{name}"')] = value
    return own if rules.allowed is None else own & rules.allowed


def answer_line(
    table: UserTable, line: Line, *, longest_line: int, latest_time: int, rules: Rules = NO_RULES
) -> dict[str, Any] | None:
    """Takes in an event, or answers a question.

    Args:
      table: the states.
      line: what came.
      longest_line: bytes of the longest line that is kept, for messages.
      latest_time: events after this second are refused.
      rules: of all questions; lists of their own restrict them further.

    Returns:
      The answer without its line number; None for an event or a blank line.

    Raises:
      ValueError: for a line that says neither, or what the table refuses; nothing has changed.
      UnknownItem: for an event with an unknown item, where the rules skip those; nothing has changed.
      FloatingPointError: the user's scores are not finite.
    """
    if line.content is None:
        raise ValueError(f"the line has {line.length} bytes, over --longest_line={longest_line}; passed over")
    if not line.content.strip():
        return None
    values = parsed(line.content)
    if "similar" in values:
        return _answer_similar(table.recommender, values, rules)
    user = _id(values, "user")
    require(
        len(user) <= LONGEST_USER or user in table,
        f'"user": id {shown_json(user, _LONGEST_SHOWN)} has {len(user)} characters, over {LONGEST_USER}',
    )
    if "item" in values:
        return _take_event(table, user, values, latest_time, rules)
    known, popular = table.recommender, rules.popular_users and user not in table
    source = "popularity" if popular else "model"
    if "score" in values:
        items = _ids(values, "score") or []
        kept = [item for item in items if not rules.skip_items or item in known.index_of_item]
        found = np.array([known.item_index(item, f"user {user!r}") for item in kept], np.int32)
        scores = known.training_counts[found] if popular else table.item_scores(user, found)
        return {"user": user, "source": source, "items": _named(known, found[None], scores[None])}
    k, exclude_seen = _number(values, "recommend"), values.get("exclude_seen", rules.exclude_seen)
    if not isinstance(exclude_seen, bool):
        raise ValueError(f'"exclude_seen" must be true or false, not {shown_json(exclude_seen, _LONGEST_SHOWN)}')
    allowed = _allowed(values, known, rules)
    if popular:
        indices, scores = (part[None] for part in known.popular(k, allowed=allowed))
    else:
        indices, scores = table.top_k([user], k, exclude_seen=exclude_seen, allowed=allowed)
    return {"user": user, "source": source, "items": _named(known, indices, scores)}


def _named(known: Recommender, indices: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    [items] = known.named(indices, scores)
    return [{"item": r.item_id, "score": r.score, "title": r.title} for r in items]


def _answer_similar(known: Recommender, values: dict[str, Any], rules: Rules) -> dict[str, Any]:
    item = _id(values, "item")
    allowed = _allowed(values, known, rules)
    found = known.similar([known.item_index(item, '"similar"')], _number(values, "similar"), allowed=allowed)
    return {"item": item, "items": _named(known, *found)}


def _take_event(table: UserTable, user: str, values: dict[str, Any], latest_time: int, rules: Rules) -> None:
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
    if rules.skip_items and item not in table.recommender.index_of_item:
        raise UnknownItem(item)
    table.add([Event(user, item, time)])


def error_line(error: Exception) -> dict[str, str]:
    """What a bad line is answered, without its number."""
    message = str(error)
    return {"error": message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}.."}
