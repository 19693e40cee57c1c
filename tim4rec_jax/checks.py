"""The one check of settings: what does not hold is a `ValueError`; and how its message quotes a value."""

import reprlib


def require(condition: bool, message: str) -> None:
    """Raises ValueError with a message that quotes the value and the limit, unless a condition holds."""
    if not condition:
        raise ValueError(message)


def shown(value: object, most: int = 80) -> str:
    """Returns a value as messages quote it: its repr, cut in the middle to at most `most` characters."""
    # reprlib never writes out the whole of a long text or a deep list.
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    short.fillvalue = "…"
    text = short.repr(value)
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - most // 2 - 1) :]}"
