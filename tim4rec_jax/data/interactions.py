"""Cleaned interaction logs: one flat row block a user, in time order, with the statistics of the cleaning."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from rich.console import Console

from tim4rec_jax.checks import require
from tim4rec_jax.data import cache, catalog
from tim4rec_jax.data.cleaning import filter_core, number_by_first_appearance, sort_by_time
from tim4rec_jax.data.coding import CodedLog, encode
from tim4rec_jax.data.readers import LogColumns, RawLog, find_log, read_parts
from tim4rec_jax.data.sources import Source, expanded
from tim4rec_jax.data.statistics import LogStatistics
from tim4rec_jax.data.synthetic import generate
from tim4rec_jax.data.titles import titles_for
from tim4rec_jax.data_config import DataConfig, TimestampPrecision

BLANK_LINES = "blank lines"
_CACHE_VERSION = 2  # raise it whenever reading, cleaning or the layout of a cached log changes


@dataclass(frozen=True, eq=False)
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
        return arrays + sum(column.estimated_size() for column in columns)


def load_log(config: DataConfig, console: Console | None = None) -> InteractionLog:
    """Reads, cleans and caches the log that a configuration names.

    `data.path` is read where it is set, whatever the name; else the name's generated or downloaded log. Files are
    cleaned once: the result is kept in `cache_dir/cleaned` under the hash of their content and of the settings. What
    `timestamp_precision="published"` comes to is in the log's statistics; see `with_precision`.

    Args:
      config: which log, and how to clean it.
      console: where notes go; standard error by default.

    Returns:
      The cleaned log.

    Raises:
      FileNotFoundError: if nothing is at `data.path` or `data.item_path`.
      ConnectionError: if a download fails.
      ValueError: for an unknown name, bad input (the message names file and line), or a log that cleaning leaves empty.
    """
    console = console or Console(stderr=True)
    if config.name not in ("synthetic", "custom"):
        catalog.find_entry(config.name)
    if config.timestamp_precision != "published":
        return _load(config, config.timestamp_precision, console)
    log, difference = None, _no_published_log(config)
    if difference is None:
        log = _load(config, "float32", console)
        difference = catalog.expected_mismatch(config.name, log.num_users, log.num_items, log.num_rows)
    if log is not None and difference is None:
        return log
    _note(
        console,
        "events are ordered by exact seconds (--data.timestamp_precision=float32 gives the original program's order): "
        + difference,
    )
    return _load(config, "int64", console)


def _no_published_log(config: DataConfig) -> str | None:
    """Returns why a log cannot be the published data set of `data.name`, as far as the settings tell."""
    entry = catalog.CATALOG.get(config.name)
    if entry is None:
        return f"data.name={config.name} is no published data set"
    if config.k_core != 5:
        return f"data.k_core={config.k_core}, and the published logs are cleaned with 5"
    if config.path is not None and entry.expected is None:
        return f"no published counts of {config.name} are known to tell by what is in data.path"
    return None


def with_precision(config: DataConfig, log: InteractionLog) -> DataConfig:
    """Returns the settings with what `timestamp_precision="published"` has come to for the log that they loaded."""
    return dataclasses.replace(config, timestamp_precision=log.statistics.timestamp_precision)


def _load(config: DataConfig, precision: TimestampPrecision, console: Console) -> InteractionLog:
    if config.path is None and config.name == "synthetic":
        return clean(
            generate(config.synthetic), k_core=config.k_core, timestamp_precision=precision,
            min_events=config.min_events,
        )  # fmt: skip
    columns = LogColumns(config.user_column, config.item_column, config.time_column, config.columns)
    sources, log_format = _locate(config, columns, console)
    fingerprint = _fingerprint(config, precision, sources, log_format)
    path = expanded(config.cache_dir) / "cleaned" / f"{fingerprint}.npz"
    log = _from_cache(path, fingerprint, console)
    if log is None:
        _note(console, f"reading {', '.join(map(str, sources))} ({log_format})")
        coded = encode(read_parts(sources, log_format, columns))
        log = clean_coded(
            coded, k_core=config.k_core, timestamp_precision=precision, min_events=config.min_events,
            fingerprint=fingerprint,
        )  # fmt: skip
        log = _to_cache(path, log, console)
    if config.k_core == 5 and config.timestamp_precision != "published":
        mismatch = catalog.expected_mismatch(config.name, log.num_users, log.num_items, log.num_rows)
        if mismatch:
            _note(console, f"warning: {mismatch}")
    titles = titles_for(sources[0], config.item_path, log.item_ids, lambda text: _note(console, f"note: {text}"))
    return log if titles is None else with_titles(log, titles)


def _locate(config: DataConfig, columns: LogColumns, console: Console) -> tuple[list[Source], str]:
    if config.name == "custom" and config.path is None:
        raise ValueError("data.name=custom needs data.path, the file or folder to read")
    if config.name == "synthetic":
        _note(console, f"data.path is set: reading {config.path} instead of generating the synthetic log")
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
        "version": _CACHE_VERSION,
        "format": log_format,
        "columns": [config.user_column, config.item_column, config.time_column, config.columns],
        "k_core": config.k_core,
        "min_events": max(config.k_core, config.min_events),
        "timestamp_precision": precision,
        "sources": [source.sha256() for source in sources],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _from_cache(path: pathlib.Path, fingerprint: str, console: Console) -> InteractionLog | None:
    try:
        entry = cache.read_entry(path)
        return InteractionLog(
            **entry.arrays,
            user_ids=entry.tables["users"]["id"],
            item_ids=entry.tables["items"]["id"],
            titles=None,
            statistics=LogStatistics(**entry.record),
            fingerprint=fingerprint,
        )
    except FileNotFoundError:
        return None
    except (cache.CorruptEntryError, KeyError, TypeError, pl.exceptions.ColumnNotFoundError) as error:
        _note(console, f"warning: the cached log cannot be used and is built again: {error}")
        return None


def _to_cache(path: pathlib.Path, log: InteractionLog, console: Console) -> InteractionLog:
    """Writes the log and returns it, read back where reading maps it, so that its columns take no memory twice."""
    try:
        require(not str(path).startswith("~"), "no home folder is known")
        cache.write_entry(
            path,
            arrays={"items": log.items, "timestamps": log.timestamps, "offsets": log.offsets},
            tables={"users": log.user_ids.to_frame("id"), "items": log.item_ids.to_frame("id")},
            record=dataclasses.asdict(log.statistics),
        )
    except (OSError, ValueError) as error:
        # The log itself is fine; only the next start is slower.
        _note(console, f"warning: the cleaned log could not be cached at {path} ({error}); set data.cache_dir")
        return log
    large = log.num_rows >= cache.MAPPED_FROM
    return (_from_cache(path, log.fingerprint, console) if large else None) or log


def clean(
    frame: pl.DataFrame,
    *,
    k_core: int,
    timestamp_precision: TimestampPrecision,
    min_events: int = 3,
    fingerprint: str | None = None,
    dropped: Mapping[str, int] | None = None,
    rounded_timestamps: int = 0,
) -> InteractionLog:
    """Filters, numbers and sorts a log; `with_titles` adds titles.

    Users and items with fewer than `k_core` rows, and users with fewer than `min_events`, are removed until none is
    left. Raw ids become 1, 2, ... (items) and 0, 1, ... (users) by first appearance in what remains, in file order.
    Then each user's rows are sorted by time, ties in file order: with "int64" by the exact time; with "float32" by
    seconds rounded to it, as the original program does, so that rows up to 128 s apart may tie.

    Args:
      frame: user (String), item (String), timestamp (Int64 seconds), one row an interaction, in file order.
      k_core: least rows of a user and of an item; 0 keeps all.
      timestamp_precision: "int64" or "float32".
      min_events: least rows of a user; 3 to leave one out, 1 for a cut in time.
      fingerprint: content hash to keep with the log; None hashes the frame and the settings.
      dropped: rows left out earlier, by reason.
      rounded_timestamps: for the statistics.

    Raises:
      ValueError: for missing ids or times, negative times, or when nothing is left (the message names the filter).
    """
    _check_frame(frame)
    settings = k_core, max(k_core, min_events), timestamp_precision
    coded = encode([RawLog(frame, 0, rounded_timestamps)])
    return clean_coded(
        coded, k_core=k_core, timestamp_precision=timestamp_precision, min_events=min_events, dropped=dropped,
        fingerprint=fingerprint or _frame_fingerprint(frame, settings),
    )  # fmt: skip


def clean_coded(
    log: CodedLog,
    *,
    k_core: int,
    timestamp_precision: TimestampPrecision,
    fingerprint: str,
    min_events: int = 3,
    dropped: Mapping[str, int] | None = None,
) -> InteractionLog:
    """Filters, numbers and sorts a log as `clean` does, in place of the log given: its columns are gone afterwards.

    Args:
      log: as read.
      k_core, timestamp_precision, fingerprint, min_events, dropped: see `clean`.

    Raises:
      ValueError: when nothing is left (the message names the filter).
    """
    dropped = dict(dropped or {}) | ({BLANK_LINES: log.blank_lines} if log.blank_lines else {})
    rows_read = len(log.users) + sum(dropped.values())
    keep, filtered = filter_core(log.users, log.items, len(log.user_ids), len(log.item_ids), k_core, min_events)
    # Each column is let go as soon as its successor is there.
    log.users, user_order = number_by_first_appearance(log.users, keep, len(log.user_ids))
    log.items, item_order = number_by_first_appearance(log.items, keep, len(log.item_ids))
    log.timestamps = log.timestamps[keep]
    log.fractions = None if log.fractions is None else log.fractions[keep]
    log.items += 1
    rows = sort_by_time(log.users, log.items, log.timestamps, len(user_order), timestamp_precision, log.fractions)
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


def with_titles(log: InteractionLog, titles: pl.DataFrame) -> InteractionLog:
    """Adds item titles to a log.

    Args:
      log: cleaned log.
      titles: item (String, unique) and title (String).

    Returns:
      The log with `titles` in the order of its item ids, null where unknown.
    """
    joined = log.item_ids.to_frame("item").join(titles, on="item", how="left", maintain_order="left")
    return dataclasses.replace(log, titles=joined["title"])


def _check_frame(frame: pl.DataFrame) -> None:
    for name, dtype in (("user", pl.String), ("item", pl.String), ("timestamp", pl.Int64)):
        if name not in frame.columns:
            raise ValueError(f"no column {name!r} in the frame; its columns are {', '.join(frame.columns)}")
        if frame[name].dtype != dtype:
            raise ValueError(f"column {name!r} is {frame[name].dtype}; cast it to {dtype}")
        if frame[name].null_count():
            row = frame[name].is_null().arg_true()[0]
            raise ValueError(f"row {row}: no {name}; every interaction needs a user, an item and a timestamp")
    if not frame.height:
        raise ValueError("the log has no rows")
    if frame["timestamp"].min() < 0:
        row = frame["timestamp"].arg_min()
        raise ValueError(f"row {row}: timestamp {frame['timestamp'][row]} is negative; give epoch seconds")


def _frame_fingerprint(frame: pl.DataFrame, settings: tuple[int, int, str]) -> str:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {settings}".encode())
    for name in ("user", "item"):
        digest.update("\0".join(frame[name]).encode())
    digest.update(frame["timestamp"].to_numpy().tobytes())
    return digest.hexdigest()


def _note(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
