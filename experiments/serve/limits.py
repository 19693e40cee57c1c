"""How much one request may ask for."""

from dataclasses import dataclass, fields

from tim4rec_jax.checks import require


@dataclass(frozen=True)
class Limits:
    """Most of everything in one request; more is refused in one line.

    Attributes:
      body: bytes (status 413; 422 for the others).
      users: users and histories.
      k: items of a list; fewer where the catalogue has fewer.
      history: events of a given history.
      events: events to take in.
      pairs: pairs to score, and items to find similar ones of.
      listed: ids in each of allow and deny.
      last: events of a user that are shown, and users that are listed.
    """

    body: int = 2**20
    users: int = 256
    k: int = 100
    history: int = 10_000
    events: int = 1000
    pairs: int = 1000
    listed: int = 10_000
    last: int = 200

    def check(self) -> None:
        """Raises ValueError for one that is no number of anything."""
        for field in fields(self):
            value = getattr(self, field.name)
            require(1 <= value <= 2**31, f"--limits.{field.name}={value} must lie in 1 to {2**31}")
