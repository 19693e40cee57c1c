"""The folder of a run: everything needed to recommend, to resume and to retell how the numbers came about.

    config.json         the resolved settings and "format_version"
    environment.json    versions, device, commit, data fingerprint, command line, start
    item_ids.parquet    index, item_id, title: row i-1 is the item of model index i
    histories.parquet   user_id, items (model indices), timestamps (seconds), oldest first
    test_ranks.parquet  user_id, rank: where each test target stood, the best item at 1; written with results.json
    metrics.jsonl  results.json  curves.png  checkpoints/

Nothing in it is a pickle. Every file is written beside its place and then renamed, so none is ever half-written.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import polars as pl

from tim4rec_jax.config import ExperimentConfig, ParallelConfig, experiment_from_dict
from tim4rec_jax.files import replacing, write_atomically

FORMAT_VERSION = 1
CONFIG, ENVIRONMENT, RESULTS = "config.json", "environment.json", "results.json"
METRICS, CURVES, CHECKPOINTS = "metrics.jsonl", "curves.png", "checkpoints"
ITEMS, HISTORIES, TEST_RANKS = "item_ids.parquet", "histories.parquet", "test_ranks.parquet"

# What may change when a run is resumed: none of it alters the steps already taken or the shapes of the checkpoint.
CHANGEABLE_ON_RESUME = (
    *(f"train.{name}" for name in ("epochs", "max_steps", "patience", "log_every", "checkpoint_every")),
    *(f"train.{name}" for name in ("progress", "tensorboard")),
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
      user_ids: raw ids, one a user.
      item_ids: raw ids; the one of index i is at i-1.
      titles: one an item, or None.
      fingerprint: hash of the cleaned log.
    """

    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    user_ids: pl.Series
    item_ids: pl.Series
    titles: pl.Series | None
    fingerprint: str


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
    if (path / CONFIG).exists():
        _require_same_run(path, config, log, resume)
    path.mkdir(parents=True, exist_ok=True)
    if resume and (path / ENVIRONMENT).exists():
        write_config(path, config)
        return path
    _write_items(path, log)
    _write_histories(path, log)
    _write_json(path / ENVIRONMENT, environment(log.fingerprint, command=command))
    write_config(path, config)  # last: a folder with settings is a whole run
    return path


def _require_same_run(path: pathlib.Path, config: ExperimentConfig, log: Log, resume: bool) -> None:
    old, new = _flat(read_config(path).to_dict()), _flat(_plain(config))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    refused = [key for key in changed if not resume or key not in CHANGEABLE_ON_RESUME]
    if refused:
        raise ValueError(
            f"{path} holds a run with other settings:\n  "
            + "\n  ".join(f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in refused)
            + "\n"
            + ("resuming cannot change these; " if resume else "")
            + "choose another run folder, or use the settings of the run"
        )
    fingerprint = read_environment(path)["data_fingerprint"]
    if fingerprint != log.fingerprint:
        raise ValueError(
            f"{path} holds a run on other data: fingerprint {fingerprint} → {log.fingerprint}; choose another run "
            "folder, or give the log the run began with"
        )
    if not resume and any((path / name).exists() for name in (METRICS, CHECKPOINTS, RESULTS)):
        raise FileExistsError(
            f"{path} already holds this run; continue it with resume, choose another run folder, or remove this one"
        )


def _plain(config: ExperimentConfig) -> dict[str, Any]:
    """The settings as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(config.to_dict(), allow_nan=False))


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[path + key] = list(value) if isinstance(value, tuple) else value
    return flat


def write_config(path: pathlib.Path, config: ExperimentConfig) -> None:
    """Writes config.json."""
    _write_json(path / CONFIG, {"format_version": FORMAT_VERSION} | _plain(config))


def read_config(path: pathlib.Path) -> ExperimentConfig:
    """Returns the settings of a run.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: the run has another format, or its settings are not known here.
    """
    values = _read_json(path, CONFIG)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is a run folder of format {version}, this program reads format {FORMAT_VERSION}; "
            "use the version of the program that wrote it (see environment.json), or train anew"
        )
    try:
        return experiment_from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from error


def read_environment(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `environment` said when the run began."""
    return _read_json(path, ENVIRONMENT)


def write_results(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes results.json; values are finite numbers, strings, lists and dicts."""
    _write_json(path / RESULTS, results)


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `write_results` wrote; raises FileNotFoundError while the run is unfinished."""
    return _read_json(path, RESULTS)


def write_test_ranks(path: pathlib.Path, user_ids: pl.Series, ranks: np.ndarray) -> None:
    """Writes test_ranks.parquet.

    Args:
      path: the run folder.
      user_ids: [n] raw ids of the tested users, one a target.
      ranks: [n] int, ranks from 1 of their test items.
    """
    frame = pl.DataFrame({"user_id": user_ids.cast(pl.String), "rank": pl.Series(ranks, dtype=pl.Int32)})
    with replacing(path / TEST_RANKS) as temporary:
        frame.write_parquet(temporary)


def read_test_ranks(path: pathlib.Path) -> pl.DataFrame:
    """Returns user_id (String) and rank (Int32, from 1) of every tested user; FileNotFoundError while unfinished."""
    return pl.read_parquet(_existing(path, TEST_RANKS))


def read_items(path: pathlib.Path) -> pl.DataFrame:
    """Returns index (Int32, from 1), item_id (String) and title (String or null) of every item, by index."""
    return pl.read_parquet(_existing(path, ITEMS))


def read_histories(path: pathlib.Path) -> pl.DataFrame:
    """Returns user_id (String), items (List(Int32)) and timestamps (List(Int64), seconds) of every user."""
    return pl.read_parquet(_existing(path, HISTORIES))


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
    with replacing(path / HISTORIES) as temporary:
        histories.write_parquet(temporary)


def environment(fingerprint: str | None = None, *, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what a result depends on besides its settings, ready for JSON.

    Args:
      fingerprint: of the cleaned log.
      command: command line; None is that of this process.
    """
    devices = jax.devices()
    return {
        **{name: _version(name) for name in ("tim4rec_jax", "jax", "jaxlib", "flax", "optax")},
        "orbax": _version("orbax-checkpoint"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **_git_state(pathlib.Path(__file__)),
        "data_fingerprint": fingerprint,
        "command": list(sys.orig_argv if command is None else command),
        "start_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout that is not installed


def _git_state(file: pathlib.Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that tracks `file`; nulls elsewhere, e.g. in site-packages."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an environment may lie inside someone else's checkout
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}


def _existing(path: pathlib.Path, name: str) -> pathlib.Path:
    file = pathlib.Path(path) / name
    if file.is_file():
        return file
    if not pathlib.Path(path).is_dir():
        raise FileNotFoundError(f"there is no run folder {path}")
    if name in (RESULTS, TEST_RANKS):
        raise FileNotFoundError(f"{path} has no {name} yet: the run has not finished")
    raise FileNotFoundError(f"{path} is not a run folder: {name} is missing")


def _read_json(path: pathlib.Path, name: str) -> dict[str, Any]:
    file = _existing(path, name)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} where an object is expected")
    return values


def _write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(file, (text + "\n").encode())
