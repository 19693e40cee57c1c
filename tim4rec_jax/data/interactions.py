"""Cleaned interaction logs: read from files or data frames, filtered, numbered, sorted, with what that left out.

A step's temporary arrays are of the size of a block of rows, of the users or of the items; what is of the size of the
log is an int64 and a few bytes per row beside the columns.
"""

import dataclasses
import datetime
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from tim4rec_jax.checks import require, shown
from tim4rec_jax.data import catalog
from tim4rec_jax.data.columns import FactorizedLog
from tim4rec_jax.data.readers import LogColumns, find_log, read_frame, read_log
from tim4rec_jax.data.sources import Source, expanded
from tim4rec_jax.data.synthetic import generate
from tim4rec_jax.data.titles import titles_for
from tim4rec_jax.data_config import DataConfig, TimestampPrecision
from tim4rec_jax.files import replacing_folder

BLANK_LINES = "blank lines"
_VERSION = 2  # raise it whenever reading or cleaning changes what comes out
_BLOCK = 2**18
# Rows sorted at once: small enough for a processor's caches, so that a row costs the same in a log of any size.
_BUCKET_ROWS = 2**16
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
        """Events per user."""
        return self.rows / self.users

    @property
    def span_days(self) -> float:
        """Days between the first and the last event."""
        return (self.last_time - self.first_time) / 86_400

    def table(self, title: str = "interaction log") -> Table:
        """Returns the statistics as a table for `rich.print`."""
        rows = [("rows read", f"{self.rows_read:,}")]
        rows += [(f"dropped: {reason}", f"{count:,}") for reason, count in self.dropped.items()]
        rows += [
            ("users", f"{self.users:,}"),
            ("items", f"{self.items:,}"),
            ("rows", f"{self.rows:,}"),
            ("repeated (user, item) rows, kept", f"{self.duplicates:,}"),
            ("training examples, leave one out", f"{self.training_examples:,}"),
            ("mean length", f"{self.mean_length:.1f}"),
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
        return titled_table(title, rows)


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


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """A cleaned log; user u's events are the rows `offsets[u] : offsets[u + 1]`, in time order.

    Attributes:
      items: int32 [rows], 1 .. num_items.
      timestamps: int64 [rows], epoch seconds, never backwards within a user; see `_SortedRows`.
      offsets: int64 [users + 1].
      user_ids: raw id (String) of user u at position u.
      item_ids: raw id (String) of item i at position i - 1.
      titles: title (String, null where unknown) in the order of `item_ids`; None where no item file is known.
      statistics: of the cleaning.
      fingerprint: sha256 hex digest of the source bytes and of every setting of the cleaning.
    """

    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    user_ids: pl.Series
    item_ids: pl.Series
    titles: pl.Series | None = field(repr=False)
    statistics: LogStatistics
    fingerprint: str

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
    for name in ("path", "columns"):
        require(getattr(config, name) is None, f"data.{name} is of files, and a data frame is given; leave one out")
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


def _no_published_log(config: DataConfig, *, given: bool) -> str | None:
    """Returns why a log, `given` or downloaded, cannot be the data set of `data.name`, as far as the settings tell."""
    entry = catalog.CATALOG.get(config.name)
    if entry is None:
        return f"data.name={config.name} is no published data set"
    if config.k_core != 5:
        return f"data.k_core={config.k_core}, and the published logs are cleaned with 5"
    if given and entry.expected is None:
        return f"no published counts of {config.name} are known to tell by what the log is"
    return None


def with_precision(config: DataConfig, log: InteractionLog) -> DataConfig:
    """Returns the settings with what `timestamp_precision="published"` has come to for the log that they loaded."""
    return dataclasses.replace(config, timestamp_precision=log.statistics.timestamp_precision)


def _load(
    config: DataConfig, precision: TimestampPrecision, frame: pl.DataFrame | None, console: Console
) -> InteractionLog:
    rules = {"k_core": config.k_core, "timestamp_precision": precision, "min_events": config.min_events}
    columns = LogColumns(config.user_column, config.item_column, config.time_column, config.columns)
    source = None
    if frame is not None:
        log = clean(read_frame(frame, None if columns == LogColumns() else columns), **rules)
    elif config.path is None and config.name == "synthetic":
        return clean(generate(config.synthetic), **rules)
    else:
        sources, log_format = _locate(config, columns, console)
        source, fingerprint = sources[0], _fingerprint(config, precision, sources, log_format)
        folder = expanded(config.cache_dir) / "cleaned" / fingerprint
        log = _from_cache(folder, console)
        if log is None:
            catalog.note(console, f"reading {', '.join(map(str, sources))} ({log_format})")
            log = clean(read_log(sources, log_format, columns), fingerprint=fingerprint, **rules)
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
    if entry is not None and folder.is_dir():
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
    return find_log(path, config.format, columns, config.max_unpacked_gb)


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
      fingerprint: content hash to keep with the log; None hashes the rows and the settings.

    Raises:
      ValueError: as `read_frame`, or when nothing is left (the message names the filter).
    """
    log = read_frame(log) if isinstance(log, pl.DataFrame) else log
    fingerprint = fingerprint or _content_hash(log, (k_core, max(k_core, min_events), timestamp_precision))
    dropped = {BLANK_LINES: log.blank_lines} if log.blank_lines else {}
    rows_read = len(log.users) + log.blank_lines
    keep, filtered = _filter_core(log.users, log.items, len(log.user_ids), len(log.item_ids), k_core, min_events)
    # Each column is let go as soon as its successor is there.
    log.users, user_order = _number_by_first_appearance(log.users, keep, len(log.user_ids))
    log.items, item_order = _number_by_first_appearance(log.items, keep, len(log.item_ids))
    log.timestamps = log.timestamps[keep]
    log.fractions = None if log.fractions is None else log.fractions[keep]
    log.items += 1
    rows = _sort_by_time(log, len(user_order), timestamp_precision)
    log.users = log.items = log.timestamps = np.zeros(0, np.int64)
    log.fractions = None
    return InteractionLog(
        items=rows.items,
        timestamps=rows.timestamps,
        offsets=rows.offsets,
        user_ids=log.user_ids.gather(user_order),
        item_ids=log.item_ids.gather(item_order),
        titles=None,
        statistics=LogStatistics(
            rows_read=rows_read,
            dropped=dropped | filtered,
            duplicates=rows.repeated,
            rounded_timestamps=log.rounded_timestamps,
            users=len(user_order),
            items=len(item_order),
            rows=len(rows.items),
            first_time=int(rows.timestamps.min()),
            last_time=int(rows.timestamps.max()),
            tied_share=rows.tied / len(rows.items),
            training_examples=int(np.maximum(np.diff(rows.offsets) - 3, 0).sum()),
            timestamp_precision=timestamp_precision,
            reordered_users=rows.reordered,
            changed_valid_targets=rows.changed_last_but_one,
            changed_test_targets=rows.changed_last,
        ),
        fingerprint=fingerprint,
    )


def _content_hash(log: FactorizedLog, settings: tuple[int, int, str]) -> str:
    digest = hashlib.sha256(f"{_VERSION} {settings}".encode())
    for codes, ids in ((log.users, log.user_ids), (log.items, log.item_ids)):
        for block in _blocks(len(codes)):
            digest.update(("\0" if block.start else "").encode() + "\0".join(ids.gather(codes[block])).encode())
    for column in (log.timestamps, log.fractions):
        digest.update(b"" if column is None else column.tobytes())
    return digest.hexdigest()


def _blocks(num_rows: int) -> Iterator[slice]:
    return (slice(first, min(first + _BLOCK, num_rows)) for first in range(0, num_rows, _BLOCK))


def _count_rows(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Counts the rows of each code, int64 [num_codes]."""
    # np.bincount makes an int64 copy of what it counts.
    counts = np.zeros(num_codes, np.int64)
    for block in _blocks(len(codes)):
        counts += np.bincount(codes[block], minlength=num_codes)
    return counts


def _filter_core(
    users: np.ndarray, items: np.ndarray, num_users: int, num_items: int, k_core: int, min_events: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Finds the rows that stay when rare users and items, and users too short to split, go until none is left.

    Returns which rows stay, bool [rows], and the rows dropped by reason.
    """
    core, short = f"{k_core}-core", f"users with fewer than {min_events} events"
    dropped = {core: 0} if k_core > 1 else {}
    keep, left = np.ones(len(users), bool), len(users)
    user_rows, item_rows = _count_rows(users, num_users), _count_rows(items, num_items)
    while True:
        reason = core
        leaving = keep & ((user_rows < k_core)[users] | (item_rows < k_core)[items])
        if not leaving.any():
            reason = short
            leaving = keep & (user_rows < min_events)[users]
        gone = np.flatnonzero(leaving)
        if not gone.size:
            return keep, dropped
        dropped[reason] = dropped.get(reason, 0) + gone.size
        keep[gone] = False
        left -= gone.size
        if not left:
            counts = ", ".join(f"{rows:,} by {name}" for name, rows in dropped.items() if rows)
            raise ValueError(
                f"{_meaning(reason, core, k_core)} left none of the log's {len(users):,} rows ({num_users:,} users, "
                f"{num_items:,} items; dropped {counts}); "
                + (
                    "lower data.k_core"
                    if reason == core
                    else "to leave one out a user needs one event each to train, validate, test; --data.split=temporal "
                    "keeps shorter users"
                )
            )
        user_rows -= _count_rows(users[gone], num_users)
        item_rows -= _count_rows(items[gone], num_items)


def _meaning(reason: str, core: str, k_core: int) -> str:
    if reason != core:
        return f"leaving out {reason}"
    return f"the {reason} filter (users and items with fewer than {k_core} interactions, removed repeatedly)"


def _number_by_first_appearance(codes: np.ndarray, keep: np.ndarray, num_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the codes of the kept rows 0, 1, ... by their first such row.

    Returns the numbers of the kept rows, int32 [kept], and the codes in the order of their numbers.
    """
    first = np.full(num_codes, -1)
    for block in reversed(list(_blocks(len(codes)))):
        # Of repeated indices the last assignment stays: walking backwards leaves the first row.
        rows = np.flatnonzero(keep[block])[::-1] + block.start
        first[codes[rows]] = rows
    present = np.flatnonzero(first >= 0)
    order = present[np.argsort(first[present])]
    number = np.zeros(num_codes, np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return np.concatenate([number[codes[block][keep[block]]] for block in _blocks(len(codes))]), order


class _SortedRows(NamedTuple):
    """Rows by user and, within a user, by time.

    Attributes:
      items: int32 [rows].
      timestamps: int64 [rows], never backwards within a user: rows that tie at the precision have their times in order,
        whichever of them each belongs to.
      offsets: int64 [users + 1].
      repeated: rows whose (user, item) occurs before.
      tied: rows with the same time as the row before of the same user, at the precision.
      reordered: users whose rows exact seconds would order otherwise.
      changed_last_but_one, changed_last: users whose item there would be another then.
    """

    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    repeated: int
    tied: int
    reordered: int
    changed_last_but_one: int
    changed_last: int


def _sort_by_time(log: FactorizedLog, num_users: int, precision: TimestampPrecision) -> _SortedRows:
    """Sorts rows by user and time; rows of equal time stay in file order.

    "int64" compares exact times; "float32" rounds seconds first, and what that changes is counted. Rows are first dealt
    to buckets of neighbouring users, which takes linear time, and then sorted bucket by bucket.
    """
    users, items, timestamps, fractions = log.users, log.items, log.timestamps, log.fractions
    offsets = np.concatenate([[0], np.cumsum(_count_rows(users, num_users))])
    # NumPy sorts 16-bit numbers stably in linear time.
    users_per_bucket = max(-(-num_users * _BUCKET_ROWS // len(users)), -(-num_users // 2**16))
    order = np.argsort((users // np.int32(users_per_bucket)).astype(np.uint16), kind="stable")
    bounds = np.append(offsets[:-1:users_per_bucket], len(users))
    sorted_items, sorted_times = np.empty_like(items), np.empty_like(timestamps)
    repeated = tied = 0
    changes = np.zeros(3, np.int64)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        rows = order[first:last]
        finer = () if fractions is None else (fractions,)
        if precision == "float32":
            rows = rows[np.lexsort((timestamps[rows].astype(precision), users[rows]))]
        else:
            rows = rows[np.lexsort(tuple(key[rows] for key in (*finer, timestamps, users)))]
        user, item, seconds = users[rows], items[rows], timestamps[rows]
        if precision == "float32":
            # Rounding never swaps two times, so a stable sort of these rows is the order of exact times.
            exact = np.lexsort((*(key[rows] for key in finer), seconds, user))
            changes += _changes(user, item, exact)
            seconds = seconds[exact]
        sorted_items[first:last], sorted_times[first:last] = item, seconds
        pairs = np.sort(user.astype(np.int64) << 32 | item)
        repeated += int((pairs[1:] == pairs[:-1]).sum())
        times = seconds.astype(precision)
        tied += int(((user[1:] == user[:-1]) & (times[1:] == times[:-1])).sum())
    return _SortedRows(sorted_items, sorted_times, offsets, repeated, tied, *map(int, changes))


def _changes(users: np.ndarray, items: np.ndarray, exact: np.ndarray) -> tuple[int, int, int]:
    """Counts the users whose order, whose last item but one and whose last item exact seconds would change.

    Args:
      users, items: [rows], sorted by user.
      exact: int [rows], which of these rows exact seconds put where each stands.
    """
    last = np.flatnonzero(np.append(users[1:] != users[:-1], True))
    before = last[(last > 0) & (users[last] == users[last - 1])] - 1
    other = items[exact] != items
    reordered = np.unique(users[exact != np.arange(len(exact))])
    return len(reordered), int(other[before].sum()), int(other[last].sum())
