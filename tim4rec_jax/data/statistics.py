"""Statistics of a cleaned log: what was read, what was left out and why, and what remained."""

import datetime
from dataclasses import dataclass

from rich.table import Table

from tim4rec_jax.data_config import TimestampPrecision


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
      training_examples: prefixes that train under leave-one-out: n - 3 for a user with n events; 0 under 3 events.
      timestamp_precision: by which events are ordered.
      reordered_users: users whose events exact seconds would order otherwise; None where that is not known.
      changed_valid_targets, changed_test_targets: last but one and last items of users, which validate and test under
        leave-one-out, that would be others by exact seconds; None likewise.
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
    training_examples: int
    timestamp_precision: TimestampPrecision
    reordered_users: int | None
    changed_valid_targets: int | None
    changed_test_targets: int | None

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
        table.add_row("events ordered by", {"int64": "exact seconds", "float32": "float32"}[self.timestamp_precision])
        if self.timestamp_precision == "float32" and self.reordered_users is not None:
            table.add_row("users whose order float32 changes", f"{self.reordered_users:,}")
            table.add_row("validation targets float32 changes, leave one out", f"{self.changed_valid_targets:,}")
            table.add_row("test targets float32 changes, leave one out", f"{self.changed_test_targets:,}")
        return table


def utc(seconds: int) -> str:
    """Returns epoch seconds as a date and time to read."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
