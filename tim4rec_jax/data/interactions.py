"""Cleaned interaction logs: read from files or data frames, filtered, numbered, sorted, with what that left out."""

import dataclasses
import datetime
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from tim4rec_jax.checks import require, shown
from tim4rec_jax.data import catalog
from tim4rec_jax.data.cleaning import (
    SortedRows,
    blocks,
    filter_core,
    number_by_first_appearance,
    repeated_rows,
    sort_by_time,
)
from tim4rec_jax.data.columns import FILE_ORDER, BadRow, FactorizedLog, Rules
from tim4rec_jax.data.log_files import LogColumns, find_log, part_of
from tim4rec_jax.data.readers import read_frame, read_log
from tim4rec_jax.data.sources import Source, expanded
from tim4rec_jax.data.synthetic import generate
from tim4rec_jax.data.titles import titles_for
from tim4rec_jax.data_config import DataConfig, Duplicates, TimestampPrecision
from tim4rec_jax.files import replacing_folder
from tim4rec_jax.notebook import html_table

BLANK_LINES = "blank lines"
_VERSION = 2  # raise it whenever reading or cleaning changes what comes out
# Arrays from this length on are mapped: the system reads their pages when they are needed and may drop them again.
# Shorter ones are copied, so that nothing that happens to the file can reach a log in use.
_MAPPED_FROM = 2**22
_ARRAYS, _IDS = ("items", "timestamps", "offsets"), ("user_ids", "item_ids")


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
      taken: what reading told from the files themselves (form of times, separator, files), by what it is about.
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
    taken: dict[str, str] = field(default_factory=dict)

    @property
    def mean_length(self) -> float:
        """Events per user."""
        return self.rows / self.users

    @property
    def span_days(self) -> float:
        """Days between the first and the last event."""
        return (self.last_time - self.first_time) / 86_400

    def table(self, title: str = "interaction log") -> Table:
        """Returns the statistics as a table for `rich.print`."""
        return titled_table(title, self.facts())

    def facts(self) -> list[tuple[str, str]]:
        """Returns what `table` shows, by name."""
        rows = [("rows read", f"{self.rows_read:,}")]
        rows += [("read as", "; ".join(f"{name}: {how}" for name, how in self.taken.items()))] if self.taken else []
        rows += [(f"dropped: {reason}", f"{count:,}") for reason, count in self.dropped.items()]
        rows += [
            ("users", f"{self.users:,}"),
            ("items", f"{self.items:,}"),
            ("rows", f"{self.rows:,}"),
            ("repeated (user, item) rows, kept", f"{self.duplicates:,}"),
            ("training examples, leave one out", f"{self.training_examples:,}"),
            ("mean length", f"{self.mean_length:.1f}"),
        ]
        if self.taken.get("order") == FILE_ORDER:
            return [*rows, ("events ordered by", FILE_ORDER)]
        rows += [
            ("first event", utc(self.first_time)),
            ("last event", utc(self.last_time)),
            ("span", f"{self.span_days:,.1f} days"),
            ("timestamps rounded down to seconds", f"{self.rounded_timestamps:,}"),
            ("tied with the row before", f"{self.tied_share:.1%}"),
            ("events ordered by", {"int64": "exact seconds", "float32": "float32"}[self.timestamp_precision]),
        ]
        if self.timestamp_precision == "float32" and self.reordered_users is not None:
            rows += [
                ("users whose order float32 changes", f"{self.reordered_users:,}"),
                ("validation targets float32 changes, leave one out", f"{self.changed_valid_targets:,}"),
                ("test targets float32 changes, leave one out", f"{self.changed_test_targets:,}"),
            ]
        return rows


def titled_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Returns names and values as a table for `rich.print`."""
    table = Table("", title=title, show_header=False)
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def utc(seconds: int) -> str:
    """Returns epoch seconds as a date and time to read."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


@dataclass(frozen=True, eq=False, repr=False)
class InteractionLog:
    """A cleaned log; user u's events are the rows `offsets[u] : offsets[u + 1]`, in time order.

    Attributes:
      items: int32 [rows], 1 .. num_items.
      timestamps: int64 [rows], epoch seconds, never backwards within a user; see `cleaning.SortedRows`.
      offsets: int64 [users + 1].
      user_ids: raw id (String) of user u at position u.
      item_ids: raw id (String) of item i at position i - 1.
      titles: title (String, null where unknown) in the order of `item_ids`; None where no item file is known.
      statistics: of the cleaning.
      fingerprint: sha256 hex digest of the source bytes and of every setting of the cleaning.
      parts: int64 [users, 2], how many of each user's events train, and train or validate, where the files were split
        already; else None.
      bad_rows: rows that were left out as bad.
    """

    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    user_ids: pl.Series
    item_ids: pl.Series
    titles: pl.Series | None = field(repr=False)
    statistics: LogStatistics
    fingerprint: str
    parts: np.ndarray | None = field(default=None, repr=False)
    bad_rows: tuple[BadRow, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        in_file = self.statistics.taken.get("order") == FILE_ORDER
        span = FILE_ORDER if in_file else f"{utc(self.statistics.first_time)} to {utc(self.statistics.last_time)}"
        return f"InteractionLog: {self._sizes()}, {span}"

    def _repr_html_(self) -> str:
        rows = [(name, str(value)) for name, value in self.statistics.facts()]
        return html_table(f"Log: {self._sizes()}", (), rows)

    def _sizes(self) -> str:
        return f"{self.num_users:,} users, {self.num_items:,} items, {self.num_rows:,} events"

    @property
    def num_users(self) -> int:
        """Users."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """Items, padding not counted."""
        return len(self.item_ids)

    @property
    def num_rows(self) -> int:
        """Interactions."""
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Bytes held, ids and titles included."""
        columns = [self.user_ids, self.item_ids] + ([] if self.titles is None else [self.titles])
        arrays = self.items.nbytes + self.timestamps.nbytes + self.offsets.nbytes
        return arrays + sum(int(column.estimated_size()) for column in columns)


def load_log(
    source: Any, console: Console | None = None, *, columns: Sequence[str] | None = None, **settings: Any
) -> InteractionLog:
    """Reads and cleans the log of a file, a data frame or a configuration.

    Of a configuration `data.path` is read where it is set, whatever the name; else the name's generated or downloaded
    log. Files are cleaned once: the result is kept in `cache_dir/cleaned` under the hash of their content and of the
    settings. What `timestamp_precision="published"` comes to is in the log's statistics; see `with_precision`.

    Args:
      source: path of a file, folder or archive; a data frame of Polars, or any with `__arrow_c_stream__`, as those of
        pandas and PyArrow; or a `DataConfig`.
      console: where notes go; standard error by default.
      columns: names of the user, item and time columns of a file or data frame. A data frame's are found by themselves
        where they are called user or user_id, item, item_id or product_id, and timestamp.
      **settings: for a file or data frame, further settings of `DataConfig`, as in `k_core=0`.

    Returns:
      The cleaned log.

    Raises:
      TypeError: if `source` is none of these, or an unknown setting is given.
      FileNotFoundError: if nothing is at the path.
      ConnectionError: if a download fails.
      ValueError: for an unknown name, bad input (the message names file and line, or the data frame's row, from 1), or
        a log that cleaning leaves empty.
    """
    console = console or Console(stderr=True)
    if isinstance(source, DataConfig):
        require(columns is None and not settings, "a DataConfig says all settings itself; change them by its fields")
        return _load_ordered(source, None, console)
    require(
        columns is None or (len(columns) == 3 and not isinstance(columns, str)),
        f"columns={shown(columns)} must be three names, of the user, item and time columns",
    )
    given: dict[str, Any] = {"name": "custom"}
    if columns is not None:
        given |= dict(zip(("user_column", "item_column", "time_column"), columns, strict=True))
    if isinstance(source, str | os.PathLike):
        given["path"] = str(source)
    config = DataConfig(**given | settings)
    if "path" in given:
        return _load_ordered(config, None, console)
    for name in ("path", "columns", "separator"):
        require(getattr(config, name) is None, f"data.{name} is of files, and a data frame is given; leave one out")
    require(config.split != "given", "data.split=given is of files, and a data frame is given; leave one out")
    return _load_ordered(config, _polars_frame(source), console)


def _polars_frame(source: Any) -> pl.DataFrame:
    if isinstance(source, pl.LazyFrame):
        return source.collect()
    if isinstance(source, pl.DataFrame):
        return source
    if not hasattr(source, "__arrow_c_stream__"):
        raise TypeError(
            f"{shown(source)} is no log; give a path, a DataConfig, or a data frame of Polars, PyArrow or pandas "
            "(2.2 or later, with PyArrow installed)"
        )
    return pl.DataFrame(source)


def _load_ordered(config: DataConfig, frame: pl.DataFrame | None, console: Console) -> InteractionLog:
    """Loads with the order of events that "published" comes to."""
    if config.name not in ("synthetic", "custom"):
        catalog.find_entry(config.name)
    if config.timestamp_precision != "published":
        return _load(config, config.timestamp_precision, frame, console)
    difference = _no_published_log(config, given=config.path is not None or frame is not None)
    if difference is None:
        log = _load(config, "float32", frame, console)
        difference = catalog.expected_mismatch(config.name, log.num_users, log.num_items, log.num_rows)
        if difference is None:
            return log
    catalog.note(
        console,
        "events are ordered by exact seconds (--data.timestamp_precision=float32 gives the original program's order): "
        + difference,
    )
    return _load(config, "int64", frame, console)


# Settings of reading beside those that every log has; a fingerprint holds them where they are not the usual ones.
_OF_READING = ("separator", "time_unit", "time_format", "order", "where", "duplicates", "bad_rows")


def _no_published_log(config: DataConfig, *, given: bool) -> str | None:
    """Returns why a log, `given` or downloaded, cannot be the data set of `data.name`, as far as the settings tell."""
    entry = catalog.CATALOG.get(config.name)
    if entry is None:
        return f"data.name={config.name} is no published data set"
    changed = [name for name in _OF_READING if getattr(config, name) != getattr(DataConfig, name)]
    if changed:
        return f"data.{changed[0]} is set, and the published logs are read whole"
    if config.k_core != 5:
        return f"data.k_core={config.k_core}, and the published logs are cleaned with 5"
    if given and entry.expected is None:
        return f"no published counts of {config.name} are known to tell by what the log is"
    return None


def with_precision(config: DataConfig, log: InteractionLog) -> DataConfig:
    """Returns the settings with what `timestamp_precision="published"` has come to for the log that they loaded."""
    return dataclasses.replace(config, timestamp_precision=log.statistics.timestamp_precision)


def _require_nothing_of_files(config: DataConfig) -> None:
    """Refuses settings of reading where a log is generated."""
    settings = {*_OF_READING, "item_path", "format", "columns", "user_column", "item_column", "time_column"}
    for name in sorted(settings - {"duplicates"}):
        value = getattr(config, name)
        require(
            value == getattr(DataConfig, name),
            f"data.{name}={value} is of reading files, and data.name=synthetic makes its log; leave it out, or give "
            "data.path",
        )


def _load(
    config: DataConfig, precision: TimestampPrecision, frame: pl.DataFrame | None, console: Console
) -> InteractionLog:
    rules: dict[str, Any] = {"k_core": config.k_core, "timestamp_precision": precision, "min_events": config.min_events}
    rules["duplicates"] = config.duplicates
    reading = Rules(
        config.time_unit,
        config.time_format,
        config.separator,
        file_order=config.order == "file",
        conditions=config.conditions,
        skip_bad=config.bad_rows == "skip",
        presplit=config.split == "given",
    )
    time_column = config.time_column if config.order == "time" else None
    columns = LogColumns(config.user_column, config.item_column, time_column, config.columns)
    source = None
    usual = (config.user_column, config.item_column, config.time_column) == LogColumns().names
    if frame is not None:
        log = clean(read_frame(frame, None if usual else columns, rules=reading), **rules)
    elif config.path is None and config.name == "synthetic":
        _require_nothing_of_files(config)
        return clean(generate(config.synthetic), **rules)
    else:
        sources, log_format = _locate(config, columns, console)
        source, fingerprint = sources[0], _fingerprint(config, precision, sources, log_format)
        folder = expanded(config.cache_dir) / "cleaned" / fingerprint
        log = _from_cache(folder, console)
        if log is None:
            catalog.note(console, f"reading {', '.join(map(str, sources))} ({log_format})")
            log = clean(read_log(sources, log_format, columns, reading), fingerprint=fingerprint, **rules)
            log = _to_cache(folder, log, console)
    if config.k_core == 5 and config.timestamp_precision != "published":
        mismatch = catalog.expected_mismatch(config.name, log.num_users, log.num_items, log.num_rows)
        if mismatch:
            catalog.note(console, f"warning: {mismatch}")
    titles = titles_for(source, config.item_path, log.item_ids, lambda text: catalog.note(console, f"note: {text}"))
    if titles is None:
        return log
    joined = log.item_ids.to_frame("item").join(titles, on="item", how="left", maintain_order="left")
    return dataclasses.replace(log, titles=joined["title"])


def _locate(config: DataConfig, columns: LogColumns, console: Console) -> tuple[list[Source], str]:
    if config.name == "custom" and config.path is None:
        raise ValueError("data.name=custom needs data.path, the file or folder to read")
    if config.name == "synthetic":
        catalog.note(console, f"data.path is set: reading {config.path} instead of generating the synthetic log")
    entry = catalog.CATALOG.get(config.name)
    path = config.path or str(catalog.fetch(config.name, config.cache_dir, console, config.max_unpacked_gb))
    folder = expanded(path)
    if entry is not None and folder.is_dir() and config.split != "given":
        # A known data set has one file that its published numbers belong to, whatever lies beside it.
        found = sorted(folder.rglob(entry.log_file))
        if len(found) == 1:
            log_format = entry.format if config.format == "auto" else config.format
            return find_log(str(found[0]), log_format, columns, config.max_unpacked_gb)
        if config.path is None:
            raise FileNotFoundError(
                f"{folder} holds {len(found)} files {entry.log_file} where one is expected; delete the folder to "
                "unpack it again, or set data.path to the log"
            )
    return find_log(path, config.format, columns, config.max_unpacked_gb, presplit=config.split == "given")


def _fingerprint(config: DataConfig, precision: TimestampPrecision, sources: list[Source], log_format: str) -> str:
    settings = {
        "version": _VERSION,
        "format": log_format,
        "columns": [config.user_column, config.item_column, config.time_column, config.columns],
        "k_core": config.k_core,
        "min_events": max(config.k_core, config.min_events),
        "timestamp_precision": precision,
        "sources": [source.sha256() for source in sources],
    }
    # Left out where they are the usual ones: fingerprints of earlier versions stay what they were.
    settings |= {n: getattr(config, n) for n in _OF_READING if getattr(config, n) != getattr(DataConfig, n)}
    if config.split == "given":
        settings["parts"] = [part_of(source) for source in sources]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _digests(folder: pathlib.Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != "sha256.json":
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _stored_array(path: pathlib.Path) -> np.ndarray:
    mapped = np.load(path, mmap_mode="r")
    return np.asarray(mapped) if mapped.size >= _MAPPED_FROM else np.array(mapped)


def _from_cache(folder: pathlib.Path, console: Console) -> InteractionLog | None:
    """Reads a cached log; one that is damaged is removed, and one of another form counts as damaged."""
    if not os.path.isdir(folder):  # Path.is_dir raises for names that no file system takes.
        return None
    try:
        require(json.loads((folder / "sha256.json").read_bytes()) == _digests(folder), "its checksums differ")
        arrays: dict[str, Any] = {name: _stored_array(folder / f"{name}.npy") for name in _ARRAYS}
        arrays |= {name: pl.read_ipc(io.BytesIO((folder / f"{name}.arrow").read_bytes()))["id"] for name in _IDS}
        statistics = LogStatistics(**json.loads((folder / "statistics.json").read_bytes()))
        if (folder / "parts.npy").is_file():
            arrays["parts"] = _stored_array(folder / "parts.npy")
        if (folder / "bad_rows.json").is_file():
            arrays["bad_rows"] = tuple(BadRow(*row) for row in json.loads((folder / "bad_rows.json").read_bytes()))
        return InteractionLog(**arrays, titles=None, statistics=statistics, fingerprint=folder.name)
    except (OSError, ValueError, TypeError, pl.exceptions.PolarsError) as error:
        catalog.note(console, f"warning: the cached log at {folder} cannot be used and is built again: {error}")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _to_cache(folder: pathlib.Path, log: InteractionLog, console: Console) -> InteractionLog:
    """Writes the log and returns it, read back where reading maps it, so that its columns take no memory twice."""
    try:
        require(not str(folder).startswith("~"), "no home folder is known")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder) as partial:
            for name in _ARRAYS:
                np.save(partial / f"{name}.npy", getattr(log, name), allow_pickle=False)
            for name in _IDS:
                with (partial / f"{name}.arrow").open("wb") as file:
                    getattr(log, name).to_frame("id").write_ipc(file)
            if log.parts is not None:
                np.save(partial / "parts.npy", log.parts, allow_pickle=False)
            if log.bad_rows:
                (partial / "bad_rows.json").write_text(json.dumps(log.bad_rows), encoding="utf-8")
            (partial / "statistics.json").write_text(json.dumps(dataclasses.asdict(log.statistics)), encoding="utf-8")
            (partial / "sha256.json").write_text(json.dumps(_digests(partial)), encoding="utf-8")
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        if not os.path.isdir(folder):  # Else another process has written the same log in the meantime.
            # The log itself is fine; only the next start is slower.
            catalog.note(
                console, f"warning: the cleaned log could not be cached at {folder} ({error}); set data.cache_dir"
            )
            return log
    return (_from_cache(folder, console) if log.num_rows >= _MAPPED_FROM else None) or log


def clean(
    log: pl.DataFrame | FactorizedLog,
    *,
    k_core: int,
    timestamp_precision: TimestampPrecision,
    min_events: int = 3,
    duplicates: Duplicates = "keep",
    fingerprint: str | None = None,
) -> InteractionLog:
    """Filters, numbers and sorts a log.

    Users and items with fewer than `k_core` rows, and users with fewer than `min_events`, are removed until none is
    left. Raw ids become 1, 2, ... (items) and 0, 1, ... (users) by first appearance in what remains, in file order.
    Then each user's rows are sorted by time, ties in file order: with "int64" by the exact time; with "float32" by
    seconds rounded to it, as the original program does, so that rows up to 128 s apart may tie.

    Args:
      log: a data frame as of `readers.read_frame`, or a log as read, whose columns are gone afterwards.
      k_core: least rows of a user and of an item; 0 keeps all.
      timestamp_precision: "int64" or "float32".
      min_events: least rows of a user; 3 to leave one out, 1 for a cut in time.
      duplicates: of a user's events with the same item "keep" all, or the "first" or "last" alone.
      fingerprint: content hash to keep with the log; None hashes the rows and the settings.

    Raises:
      ValueError: as `read_frame`, when nothing is left (the message names the filter), or when files already split
        overlap in time.
    """
    log = read_frame(log) if isinstance(log, pl.DataFrame) else log
    fingerprint = fingerprint or _content_hash(log, (k_core, max(k_core, min_events), timestamp_precision), duplicates)
    dropped = {BLANK_LINES: log.blank_lines} if log.blank_lines else {}
    dropped |= log.dropped
    rows_read = len(log.users) + sum(dropped.values())
    _require_rows(log, dropped)
    users, items, filtered = _filtered(log, k_core, min_events, duplicates)
    rows = sort_by_time(log, len(users), timestamp_precision)
    log.users = log.items = log.timestamps = np.zeros(0, np.int64)
    log.fractions = log.parts = None
    return InteractionLog(
        items=rows.items,
        timestamps=rows.timestamps,
        offsets=rows.offsets,
        user_ids=users,
        item_ids=items,
        titles=None,
        statistics=LogStatistics(
            rows_read=rows_read,
            dropped=dropped | filtered,
            duplicates=rows.repeated,
            rounded_timestamps=log.rounded_timestamps,
            users=len(users),
            items=len(items),
            rows=len(rows.items),
            first_time=int(rows.timestamps.min()),
            last_time=int(rows.timestamps.max()),
            tied_share=rows.tied / len(rows.items),
            training_examples=int(np.maximum(np.diff(rows.offsets) - 3, 0).sum()),
            timestamp_precision=timestamp_precision,
            reordered_users=rows.reordered,
            changed_valid_targets=rows.changed_last_but_one,
            changed_test_targets=rows.changed_last,
            taken=log.taken,
        ),
        fingerprint=fingerprint,
        parts=None if rows.parts is None else _part_counts(rows, users),
        bad_rows=tuple(log.bad_rows),
    )


def _filtered(
    log: FactorizedLog, k_core: int, min_events: int, duplicates: Duplicates
) -> tuple[pl.Series, pl.Series, dict[str, int]]:
    """Filters and numbers the rows of a log in place; returns the ids of users and items, and what was dropped."""
    single = repeated_rows(log, duplicates)
    dropped = {}
    if duplicates != "keep":
        dropped[f"repeated (user, item) rows, the {duplicates} kept"] = int((~single).sum())
    counts = len(log.user_ids), len(log.item_ids)
    keep, filtered = filter_core(log.users, log.items, *counts, k_core, min_events, single)
    # Each column is let go as soon as its successor is there.
    log.users, user_order = number_by_first_appearance(log.users, keep, len(log.user_ids))
    log.items, item_order = number_by_first_appearance(log.items, keep, len(log.item_ids))
    log.timestamps = log.timestamps[keep]
    log.fractions = None if log.fractions is None else log.fractions[keep]
    log.parts = None if log.parts is None else log.parts[keep]
    log.items += 1
    return log.user_ids.gather(user_order), log.item_ids.gather(item_order), dropped | filtered


def _require_rows(log: FactorizedLog, dropped: dict[str, int]) -> None:
    if not len(log.users):
        counts = ", ".join(f"{rows:,} by {name}" for name, rows in dropped.items() if rows)
        raise ValueError(f"no row of the log is left (left out: {counts}); change data.where, or the rows")


def _part_counts(rows: SortedRows, user_ids: pl.Series) -> np.ndarray:
    """Counts each user's events before validation and before the test, int64 [users, 2], in a log already split."""
    assert rows.parts is not None
    starts = rows.offsets[:-1]
    back = np.flatnonzero(rows.parts[1:] < rows.parts[:-1]) + 1
    back = back[~np.isin(back, starts)]
    if len(back):
        users = np.unique(np.searchsorted(rows.offsets, back, side="right") - 1)
        names = ("training", "validation", "test")
        row = int(back[0])
        raise ValueError(
            f"data.split=given: user {shown(user_ids[int(users[0])])} has a {names[rows.parts[row]]} event after a "
            f"{names[rows.parts[row - 1]]} event ({len(users):,} such users), so that a model would see what comes "
            "later; split by time, or read all files with another data.split"
        )
    return np.stack([np.add.reduceat(rows.parts < part, starts, dtype=np.int64) for part in (1, 2)], axis=1)


def _content_hash(log: FactorizedLog, settings: tuple[int, int, str], duplicates: Duplicates) -> str:
    extra = "" if duplicates == "keep" else f" {duplicates}"
    digest = hashlib.sha256(f"{_VERSION} {settings}{extra}".encode())
    for codes, ids in ((log.users, log.user_ids), (log.items, log.item_ids)):
        for block in blocks(len(codes)):
            digest.update(("\0" if block.start else "").encode() + "\0".join(ids.gather(codes[block])).encode())
    for column in (log.timestamps, log.fractions):
        digest.update(b"" if column is None else column.tobytes())
    return digest.hexdigest()
