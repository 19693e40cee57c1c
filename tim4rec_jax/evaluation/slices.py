"""Metrics by group of users and by time: which lists belong to which part."""

import pathlib
from collections.abc import Sequence

import numpy as np
import polars as pl

from tim4rec_jax.checks import listed, require, shortened
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import Examples
from tim4rec_jax.eval_config import MOST_BUCKETS, EvalConfig, parse_buckets

NOT_IN_TABLE, NO_VALUE = "(not in the table)", "(no value)"
_READERS = {
    ".csv": pl.read_csv,
    ".parquet": pl.read_parquet,
    ".tsv": lambda f, **o: pl.read_csv(f, separator="\t", **o),
}
_FORMATS = {"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}


def slices(log: InteractionLog, examples: Examples, evaluation: EvalConfig) -> dict[str, np.ndarray]:
    """Says of every example which part it belongs to, by what the settings ask for.

    Args:
      log: the cleaned log.
      examples: what is predicted; of a list with several targets the first decides.
      evaluation: reads users, groups and time_buckets.

    Returns:
      {"gender": [n] texts, "month": [n] texts}, or nothing.

    Raises:
      ValueError: the table of users cannot be read, names a user twice or lacks a column, or there are too many parts.
    """
    found = {}
    if evaluation.groups is not None and evaluation.users is not None:
        groups = user_groups(pathlib.Path(evaluation.users), evaluation.groups, log.user_ids.to_list())
        found[evaluation.groups] = groups[examples.users]
    if evaluation.time_buckets is not None:
        found[evaluation.time_buckets] = time_buckets(
            log.timestamps[examples.target_rows(log)], evaluation.time_buckets
        )
    for name, labels in found.items():
        count = len(np.unique(labels))
        require(
            count <= MOST_BUCKETS,
            f"{name} makes {count} parts of {len(labels)} targets, more than {MOST_BUCKETS}: give a coarser one",
        )
    return found


def user_groups(table: pathlib.Path, column: str, users: Sequence[str]) -> np.ndarray:
    """Reads the group of every user from a table with a column user_id.

    Args:
      table: CSV, TSV or Parquet, with a header.
      column: the one that holds the group.
      users: raw ids of the log.

    Returns:
      [users] texts; "(not in the table)" for a user that it lacks, "(no value)" where the column is empty.

    Raises:
      ValueError: it cannot be read, lacks a column, or has a user twice.
    """
    reader = _READERS.get(table.suffix.lower())
    if reader is None:
        raise ValueError(f"eval.users={table}: expected a table that ends in .csv, .tsv or .parquet")
    require(table.is_file(), f"eval.users={table} is not there; give a table with a column user_id")
    try:
        frame = reader(table)
    except Exception as error:
        raise ValueError(f"eval.users={table} cannot be read: {shortened(str(error), 120)}") from error
    for name in ("user_id", column):
        require(name in frame.columns, f"eval.users={table} has no column {name!r}, only {listed(frame.columns, 120)}")
    ids = frame["user_id"].cast(pl.String)
    twice = ids.filter(ids.is_duplicated()).to_list()
    if twice:
        raise ValueError(f"eval.users={table} has user {twice[0]!r} {twice.count(twice[0])} times; leave one")
    values = frame[column].cast(pl.String).to_list()
    of_user = dict(
        zip(ids.to_list(), (NO_VALUE if v is None or not v.strip() else v.strip() for v in values), strict=True)
    )
    return np.array([of_user.get(user, NOT_IN_TABLE) for user in users], object)


def time_buckets(seconds: np.ndarray, buckets: str) -> np.ndarray:
    """Says in which stretch of time each second lies, [n] texts in order of time; UTC.

    Args:
      seconds: int64 [n] since 1970.
      buckets: "day", "week" (of ISO 8601, as in 2026-W05), "month", or "quantiles:4" for as many parts of like size,
        each named by its first and last day; equal seconds stay together.
    """
    times = pl.from_epoch(pl.Series(seconds), time_unit="s")
    if (count := parse_buckets(buckets)) is None:
        return times.dt.strftime(_FORMATS[buckets]).to_numpy().astype(object)
    edges = np.quantile(seconds, np.arange(1, count) / count, method="lower")
    part = np.searchsorted(edges, seconds, side="left")
    days = times.dt.strftime("%Y-%m-%d").to_numpy()
    names = {}
    for nth, one in enumerate(np.unique(part), start=1):
        inside = days[part == one]
        names[one] = f"{nth}: {inside.min()} to {inside.max()}"
    return np.array([names[one] for one in part], object)
