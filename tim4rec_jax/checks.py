"""The one check of settings: what does not hold is a `ValueError`."""


def require(condition: bool, message: str) -> None:
    """Raises ValueError with a message that quotes the value and the limit, unless a condition holds."""
    if not condition:
        raise ValueError(message)
