"""Statistics of a cleaned log: what was read, what was left out and why, and what remained."""

import datetime
from dataclasses import dataclass

from rich.table import Table

MIN_EVENTS = 3  # of a user: one to train from, one to validate and one to test


@dataclass(frozen=True)
class LogStatistics:
    """What a log held and what cleaning left of it.

    Attributes:
      rows_read: rows before cleaning, blank lines included.
      dropped: reason -> rows left out.
      duplicates: rows whose (user, item) occurs earlier in the cleaned log; they are kept.
      rounded_timestamps: timestamps as read that had a fraction of a second, rounded down.
      users, items, rows: size of the cleaned log.
      first_time, last_time: int seconds.
      tied_share: share of rows with the same time as the row before of the same user, at the timestamp precision.
    """

    rows_read: int
    dropped: dict[str, int]
    duplicates: int
    rounded_timestamps: int
    users: int
    items: int
    rows: int
    first_time: int
    last_time: int
    tied_share: float

    @property
    def training_examples(self) -> int:
        """Prefixes that train under leave-one-out: n - 3 for a user with n events."""
        return self.rows - MIN_EVENTS * self.users

    @property
    def mean_length(self) -> float:
        """Events a user."""
        return self.rows / self.users

    @property
    def span_days(self) -> float:
        """Days between the first and the last event."""
        return (self.last_time - self.first_time) / 86_400

    def table(self, title: str = "interaction log") -> Table:
        """Returns the statistics as a table for `rich.print`."""
        table = Table("", title=title, show_header=False)
        table.add_column(justify="right")
        table.add_row("rows read", f"{self.rows_read:,}")
        for reason, rows in self.dropped.items():
            table.add_row(f"dropped: {reason}", f"{rows:,}")
        table.add_row("users", f"{self.users:,}")
        table.add_row("items", f"{self.items:,}")
        table.add_row("rows", f"{self.rows:,}")
        table.add_row("repeated (user, item) rows, kept", f"{self.duplicates:,}")
        table.add_row("training examples, leave one out", f"{self.training_examples:,}")
        table.add_row("mean length", f"{self.mean_length:.1f}")
        table.add_row("first event", utc(self.first_time))
        table.add_row("last event", utc(self.last_time))
        table.add_row("span", f"{self.span_days:,.1f} days")
        table.add_row("timestamps rounded down to seconds", f"{self.rounded_timestamps:,}")
        table.add_row("tied with the row before", f"{self.tied_share:.1%}")
        return table


def utc(seconds: int) -> str:
    """Returns epoch seconds as a date and time to read."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
