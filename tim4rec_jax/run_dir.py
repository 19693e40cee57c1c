"""The folder of a run: everything needed to recommend, to resume and to retell how the numbers came about.

    config.json         the resolved settings and "format_version"
    environment.json    versions, device, commit, data fingerprint, command line, start
    manifest.json       id of the run, and hashes of the files that decide its answers; see `run_manifest`
    item_ids.parquet    index, item_id, title: row i-1 is the item of model index i
    histories.parquet   user_id, items (model indices), timestamps (seconds), oldest first; of files already split also
                        before_valid and before_test, how many of them train, and train or validate
    bad_rows.csv        file, line, reason, text of rows that were left out of the log; only where there are any
    trackers.json       ids of the run with MLflow and Weights & Biases; only where it was told to them
    test_ranks.parquet  user_id, rank, rank_seen_excluded (or rank_all_items, where eval.exclude_seen is on): where each
                        test target stood, the best item at 1, equals at their mean rank, null where it was left
                        out; written with results.json
    profile/            traces of steps; only where they were asked for
    metrics.jsonl  results.json  curves.png  checkpoints/

Nothing in it is a pickle. Every file is written beside its place and then renamed, so none is ever half-written.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import polars as pl

from tim4rec_jax.config import ExperimentConfig, ParallelConfig, experiment_from_dict, flat
from tim4rec_jax.files import replacing, sync_folder, write_atomically
from tim4rec_jax.json_files import as_bytes, read_object, write_object
from tim4rec_jax.run_environment import environment
from tim4rec_jax.run_manifest import (
    MANIFEST,
    bytes_digest,
    file_digest,
    new_manifest,
    read_manifest,
    require_as_written,
    write_manifest,
)

FORMAT_VERSION = 1
CONFIG, ENVIRONMENT, RESULTS = "config.json", "environment.json", "results.json"
METRICS, CURVES, CHECKPOINTS, PROFILE = "metrics.jsonl", "curves.png", "checkpoints", "profile"
ITEMS, HISTORIES, TEST_RANKS = "item_ids.parquet", "histories.parquet", "test_ranks.parquet"
BAD_ROWS, TRACKERS = "bad_rows.csv", "trackers.json"

# Differences of settings that an error names.
SHOWN_DIFFERENCES = 3
# What may change when a run is resumed: none of it alters the steps already taken or the shapes of the checkpoint.
CHANGEABLE_ON_RESUME = (
    *(f"train.{name}" for name in ("epochs", "max_steps", "patience", "log_every", "checkpoint_every")),
    *(f"train.{name}" for name in ("progress", "tensorboard", "trackers", "steps_per_dispatch", "capture")),
    *(f"data.{name}" for name in ("path", "item_path", "cache_dir")),
    "eval.batch_size",
    *(f"parallel.{field.name}" for field in dataclasses.fields(ParallelConfig)),
)


class Log(Protocol):
    """The cleaned log of a run; user u owns the rows offsets[u] to offsets[u+1].

    Attributes:
      items: int32[rows], model indices, 1 and up.
      timestamps: int64[rows], seconds.
      offsets: int64[users+1].
      user_ids: raw ids, one per user.
      item_ids: raw ids; the one of index i is at i-1.
      titles: one per item, or None.
      fingerprint: hash of the cleaned log.
      parts: int64[users, 2], events before validation and before the test in files already split; else None.
      bad_rows: file, line, reason and text of rows that were left out.
    """

    @property
    def items(self) -> np.ndarray: ...
    @property
    def timestamps(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def user_ids(self) -> pl.Series: ...
    @property
    def item_ids(self) -> pl.Series: ...
    @property
    def parts(self) -> np.ndarray | None: ...
    @property
    def bad_rows(self) -> Sequence[tuple[str, int, str, str]]: ...
    @property
    def titles(self) -> pl.Series | None: ...
    @property
    def fingerprint(self) -> str: ...


def create_run(
    path: pathlib.Path,
    config: ExperimentConfig,
    log: Log,
    *,
    resume: bool = False,
    command: Sequence[str] | None = None,
) -> pathlib.Path:
    """Makes the run folder, or opens it again to resume, and returns its absolute path.

    Args:
      path: the folder; may exist if it is empty or belongs to this very run.
      config: resolved settings.
      log: the cleaned log the run trains on.
      resume: continue a run that is there; only settings of `CHANGEABLE_ON_RESUME` may differ, and config.json takes
        the new ones. Without a run in the folder a new one is made.
      command: command line to record; None is that of this process.

    Raises:
      ValueError: the folder holds a run with other settings, other data or another format.
      FileExistsError: the folder holds this very run, already begun, and `resume` is off.
    """
    path = pathlib.Path(path).absolute()
    if os.path.lexists(path / CONFIG):
        if has_begun(path):
            _require_same_run(path, config, log, resume)
            write_config(path, config)
            return path
        # Nothing is lost with it. First of all it is no run any more, for a kill may come between any two files.
        (path / CONFIG).unlink()
        sync_folder(path)
    elif has_begun(path):
        raise ValueError(f"{path} holds a run without its {CONFIG}; choose another run folder, or remove this one")
    path.mkdir(parents=True, exist_ok=True)
    _write_items(path, log)
    _write_histories(path, log)
    _write_bad_rows(path, log)
    write_object(path / ENVIRONMENT, environment(log.fingerprint, command=command))
    content = _config_bytes(config)
    digests = {name: file_digest(path / name) for name in (ITEMS, HISTORIES)} | {CONFIG: bytes_digest(content)}
    write_manifest(path, new_manifest(log.fingerprint, digests))
    write_atomically(path / CONFIG, content)  # last: a folder with settings is a whole run
    return path


def has_begun(path: pathlib.Path) -> bool:
    """Tells whether a folder holds anything of a run that would be missed."""
    path = pathlib.Path(path)
    metrics = path / METRICS
    logged = metrics.stat().st_size > 0 if metrics.is_file() else os.path.lexists(metrics)
    return logged or os.path.lexists(path / RESULTS) or any((path / CHECKPOINTS).glob("*/*"))


def discard_run(path: pathlib.Path) -> None:
    """Removes a run folder in which nothing has been trained; any other stays."""
    if has_begun(path):
        return
    for name in (CONFIG, MANIFEST, ENVIRONMENT, HISTORIES, ITEMS, BAD_ROWS, METRICS, TRACKERS):
        (path / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, PROFILE, "tensorboard", "wandb"):
        shutil.rmtree(path / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rmdir()


def _require_same_run(path: pathlib.Path, config: ExperimentConfig, log: Log, resume: bool) -> None:
    old, new = flat(read_config(path).to_dict()), flat(config.to_dict())
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    refused = [key for key in changed if not resume or key not in CHANGEABLE_ON_RESUME]
    if refused:
        shown = ", ".join(f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in refused[:SHOWN_DIFFERENCES])
        more = f" and {len(refused) - SHOWN_DIFFERENCES} more" if len(refused) > SHOWN_DIFFERENCES else ""
        raise ValueError(
            f"{path} holds a run with other settings: {shown}{more}; "
            + ("resuming cannot change these: " if resume else "")
            + "choose another run folder, or use the settings of the run"
        )
    fingerprint = read_environment(path)["data_fingerprint"]
    if fingerprint != log.fingerprint:
        raise ValueError(
            f"{path} holds a run on other data: fingerprint {fingerprint[:16]} → {log.fingerprint[:16]}; choose "
            "another run folder, or give the log the run began with"
        )
    if not resume:
        raise FileExistsError(
            f"{path} already holds this run; continue it with resume, choose another run folder, or remove this one"
        )
    for name in (ITEMS, HISTORIES):
        require_as_written(path, name)


def _plain(config: ExperimentConfig) -> dict[str, Any]:
    """The settings as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(config.to_dict(), allow_nan=False))


def _config_bytes(config: ExperimentConfig) -> bytes:
    return as_bytes({"format_version": FORMAT_VERSION} | _plain(config))


def require_no_run_file(output: pathlib.Path) -> None:
    """Refuses to write over what a run consists of.

    Raises:
      ValueError: `output` is one of the files that training keeps in a run folder.
    """
    own = (CONFIG, MANIFEST, ENVIRONMENT, RESULTS, METRICS, CURVES, ITEMS, HISTORIES, TEST_RANKS)
    output = pathlib.Path(output).resolve()
    runs = [output.parent] if output.name in own else []
    runs += [folder.parent for folder in output.parents if folder.name == CHECKPOINTS]
    if any((run / CONFIG).exists() for run in runs):
        raise ValueError(f"{output} is a file of a run, which would be lost; choose another --output")


def write_config(path: pathlib.Path, config: ExperimentConfig) -> None:
    """Writes other settings into config.json, and into the manifest where there is one."""
    content, manifest = _config_bytes(config), read_manifest(path)
    if manifest is None:
        write_atomically(path / CONFIG, content)
        return
    digest = bytes_digest(content)
    if manifest.files[CONFIG] != [digest]:
        # A kill in between leaves settings that the manifest knows, the old or the new.
        known = manifest.files | {CONFIG: [*manifest.files[CONFIG], digest]}
        write_manifest(path, manifest._replace(files=known))
        write_atomically(path / CONFIG, content)
        write_manifest(path, manifest._replace(files=known | {CONFIG: [digest]}))


def read_config(path: pathlib.Path) -> ExperimentConfig:
    """Returns the settings of a run.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: the run has another format, its settings are not known here, or are not those it was made with.
    """
    file = _existing(path, CONFIG)
    values = read_object(file)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is a run folder of format {str(version)[:20]}, this program reads format {FORMAT_VERSION}; "
            "use the version of the program that wrote it (see environment.json), or train anew"
        )
    require_as_written(path, CONFIG)
    try:
        return experiment_from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_earlier_model_settings(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the part "model" of a config.json of the version with one class for all models; None for a later one."""
    settings = read_object(_existing(path, CONFIG)).get("model", {})
    return settings if "time_mode" in settings else None


# What programs read of it, and the types this has.
_ENVIRONMENT_TYPES = {"data_fingerprint": str, "git_commit": str | None, "command": list}


def read_environment(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `environment` said when the run began.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: it is not what `environment` says, or speaks of other data than the manifest.
    """
    file = _existing(path, ENVIRONMENT)
    values = read_object(file)
    for name, kind in _ENVIRONMENT_TYPES.items():
        if name not in values or not isinstance(values[name], kind):
            raise ValueError(f"{file} has no {name}; put back the file as training left it, or train anew")
    manifest = read_manifest(path)
    if manifest is not None and values["data_fingerprint"] != manifest.data_fingerprint:
        raise ValueError(
            f"{file} has the data_fingerprint {values['data_fingerprint'][:16]}, the run was made with "
            f"{manifest.data_fingerprint[:16]}; put back the file as training left it, or train anew"
        )
    return values


def write_results(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes results.json; values are finite numbers, strings, lists and dicts."""
    write_object(path / RESULTS, results)


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `write_results` wrote.

    Raises:
      FileNotFoundError: the run is unfinished.
      ValueError: the numbers of its test are no finite numbers.
    """
    file = _existing(path, RESULTS)
    values = read_object(file)
    test = values.get("test", {})
    if not isinstance(test, dict) or not all(_is_finite(value) for value in test.values()):
        raise ValueError(f'{file} has no finite numbers under "test"; write it anew: train on with resume')
    return values


def _is_finite(value: Any) -> bool:
    # JSON has whole numbers that are larger than every float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def withdraw_results(path: pathlib.Path) -> None:
    """Removes what a run wrote at its end, for it is training on."""
    for name in (RESULTS, TEST_RANKS):
        (path / name).unlink(missing_ok=True)


def write_test_ranks(
    path: pathlib.Path, user_ids: pl.Series, ranks: np.ndarray, others: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes test_ranks.parquet.

    Args:
      path: the run folder.
      user_ids: [n] raw ids of the tested users, one a target.
      ranks: [n] ranks from 1 of their test items, whole or in halves, 0 where one was left out.
      others: the same under other protocols, by their names.
    """
    columns = {"rank": ranks} | {f"rank_{name}": of_one for name, of_one in (others or {}).items()}
    series = {name: pl.Series(np.asarray(column), dtype=pl.Float32) for name, column in columns.items()}
    frame = pl.DataFrame({"user_id": user_ids.cast(pl.String)} | series)
    frame = frame.with_columns(pl.when(pl.col(name) > 0).then(pl.col(name)) for name in columns)
    with replacing(path / TEST_RANKS) as temporary:
        frame.write_parquet(temporary)


def read_test_ranks(path: pathlib.Path, protocol: str | None = None) -> pl.DataFrame:
    """Returns user_id (String) and rank (Float32, from 1) of every target that was measured.

    Args:
      path: the run folder.
      protocol: "seen_excluded" or "all_items", whichever is not that of the run's eval.exclude_seen; None is that one.

    Raises:
      FileNotFoundError: the run is unfinished.
      ValueError: it is of a version that ranked under one protocol.
    """
    frame, column = _read_table(path, TEST_RANKS), "rank" if protocol is None else f"rank_{protocol}"
    if column not in frame.columns:
        raise ValueError(f"{path} has no {column}: it is of an earlier version; give it to experiments.evaluate")
    return frame.select("user_id", rank=column).drop_nulls("rank")


def read_items(path: pathlib.Path) -> pl.DataFrame:
    """Returns index (Int32, from 1), item_id (String) and title (String or null) of every item, by index.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: the items are not those the run was made with, or no numbering of different items.
    """
    items = _read_table(path, ITEMS)
    if not items["index"].equals(pl.int_range(1, len(items) + 1, dtype=pl.Int32, eager=True)):
        raise _not_a_run(path, ITEMS, "its index does not count 1, 2, 3 .. from the first row to the last")
    _require_different(path, ITEMS, items["item_id"])
    return items


def read_histories(path: pathlib.Path) -> pl.DataFrame:
    """Returns user_id (String), items (List(Int32)) and timestamps (List(Int64), seconds) of every user.

    Of files already split also before_valid and before_test (Int64), see `Log`.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: the histories are not those the run was made with, name items that are not there, or run backwards.
    """
    histories = _read_table(path, HISTORIES)
    _require_different(path, HISTORIES, histories["user_id"])
    counts = histories["items"].list.len()
    if len(histories) == 0 or not ((counts > 0) & (counts == histories["timestamps"].list.len())).all():
        raise _not_a_run(path, HISTORIES, "there are no users, or one has no events or not one time for each item")
    num_items = len(read_items(path))
    items, times = (histories[name].explode() for name in ("items", "timestamps"))
    if items.null_count() or times.null_count() or not items.is_between(1, num_items).all():
        raise _not_a_run(path, HISTORIES, f"an item lies outside 1 to {num_items}, the items of {ITEMS}")
    # In the order of the log, which is that of the times as they were rounded for sorting.
    times = times.to_numpy().astype(read_config(path).data.timestamp_precision)
    first_of_user = np.cumsum(counts.to_numpy())[:-1]
    backwards = np.flatnonzero(times[1:] < times[:-1]) + 1
    if len(backwards) and not np.isin(backwards, first_of_user).all():
        raise _not_a_run(path, HISTORIES, "times of a user run backwards")
    if "before_valid" in histories.columns:
        before = pl.col("before_valid"), pl.col("before_test")
        fits = (before[0] >= 0) & (before[0] <= before[1]) & (before[1] <= pl.col("items").list.len())
        if not histories.select(fits.all()).item():
            raise _not_a_run(path, HISTORIES, "its parts are no parts of the histories")
    return histories


_PARTS = "parts of histories.parquet"
_SCHEMAS = {
    ITEMS: {"index": pl.Int32, "item_id": pl.String, "title": pl.String},
    HISTORIES: {"user_id": pl.String, "items": pl.List(pl.Int32), "timestamps": pl.List(pl.Int64)},
    _PARTS: {"before_valid": pl.Int64, "before_test": pl.Int64},
    TEST_RANKS: {"user_id": pl.String, "rank": pl.Float32},
}
_MAY_BE_NULL = ("title",)
# Only where seen items are excluded are targets left out.
_OTHER_RANKS = ("rank_seen_excluded", "rank_all_items")


def _not_a_run(path: pathlib.Path, name: str, reason: str) -> ValueError:
    return ValueError(f"{path / name}: {reason}; put back the file as training left it, or train anew")


def _require_different(path: pathlib.Path, name: str, ids: pl.Series) -> None:
    if ids.n_unique() < len(ids):
        raise _not_a_run(path, name, f"{ids.name} {ids.filter(ids.is_duplicated())[0][:40]!r} is there more than once")


def _read_table(path: pathlib.Path, name: str) -> pl.DataFrame:
    file, schema = _existing(path, name), dict(_SCHEMAS[name])
    if name != TEST_RANKS:
        require_as_written(path, name)
    try:
        table = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise _not_a_run(
            path, name, f"it cannot be read as Parquet ({str(error).partition(chr(10))[0][:80]})"
        ) from error
    if name == HISTORIES and "before_valid" in table.columns:
        schema |= _SCHEMAS[_PARTS]
    may_be_null = _MAY_BE_NULL
    if name == TEST_RANKS and (others := [column for column in _OTHER_RANKS if column in table.columns][:1]):
        schema |= {others[0]: pl.Float32}
        may_be_null += ("rank" if others == ["rank_all_items"] else "rank_seen_excluded",)
    if name == TEST_RANKS:
        # Whole numbers in runs of earlier versions, which counted no halves.
        table = table.with_columns(pl.col(c).cast(pl.Float32) for c, of in table.schema.items() if of == pl.Int32)
    if table.schema != schema:
        wanted = ", ".join(f"{column} {kind}" for column, kind in schema.items())
        raise _not_a_run(path, name, f"it does not have the columns {wanted}")
    if nulls := [column for column in schema if column not in may_be_null and table[column].null_count()]:
        raise _not_a_run(path, name, f"a value of {nulls[0]} is missing")
    return table


def _write_items(path: pathlib.Path, log: Log) -> None:
    count = len(log.item_ids)
    titles = pl.Series([None], dtype=pl.String).new_from_index(0, count) if log.titles is None else log.titles
    items = pl.DataFrame(
        {
            "index": pl.Series(np.arange(1, count + 1, dtype=np.int32)),
            "item_id": log.item_ids.cast(pl.String),
            "title": titles.cast(pl.String),
        }
    )
    with replacing(path / ITEMS) as temporary:
        items.write_parquet(temporary)


def _write_histories(path: pathlib.Path, log: Log) -> None:
    lengths = np.diff(log.offsets)
    if len(lengths) != len(log.user_ids) or (lengths < 1).any():
        raise ValueError(
            f"the log has {len(log.user_ids)} users and {len(lengths)} histories, {(lengths < 1).sum()} of them empty; "
            "every user needs one history of at least one event"
        )
    user = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    events = pl.DataFrame({"user": user, "items": log.items, "timestamps": log.timestamps})
    histories = events.group_by("user", maintain_order=True).agg(
        pl.col("items").cast(pl.Int32), pl.col("timestamps").cast(pl.Int64)
    )
    histories = histories.select(log.user_ids.cast(pl.String).alias("user_id"), "items", "timestamps")
    if log.parts is not None:
        histories = histories.with_columns(
            before_valid=pl.Series(log.parts[:, 0], dtype=pl.Int64),
            before_test=pl.Series(log.parts[:, 1], dtype=pl.Int64),
        )
    with replacing(path / HISTORIES) as temporary:
        histories.write_parquet(temporary)


def _write_bad_rows(path: pathlib.Path, log: Log) -> None:
    if not log.bad_rows:
        return
    schema = {"file": pl.String, "line": pl.Int64, "reason": pl.String, "text": pl.String}
    with replacing(path / BAD_ROWS) as temporary:
        pl.DataFrame([tuple(row) for row in log.bad_rows], schema=schema, orient="row").write_csv(temporary)


def _existing(path: pathlib.Path, name: str) -> pathlib.Path:
    file = pathlib.Path(path) / name
    if file.is_file():
        return file
    if not pathlib.Path(path).is_dir():
        raise FileNotFoundError(f"there is no run folder {path}")
    if os.path.lexists(file):
        raise ValueError(f"{path} is not a run folder: {name} is not a file")
    if name in (RESULTS, TEST_RANKS):
        raise FileNotFoundError(f"{path} has no {name} yet: the run has not finished")
    raise FileNotFoundError(f"{path} is not a run folder: {name} is missing")
