"""Trainings to early stop with evaluation, within a time limit: what `experiments.benchmark gpu --parts=training` does.

A run that the limit ends is saved by the training program and goes on in the next call with the same --output; its
folder lies beside the record. Every epoch's line is in the record within seconds.
"""

import dataclasses
import functools
import os
import pathlib
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

from experiments import train
from experiments.benchmarks.small_run import small_options
from experiments.benchmarks.timing import Part
from tim4rec_jax.config import TrainConfig
from tim4rec_jax.run_dir import read_environment, read_results
from tim4rec_jax.training.logging import read_metrics

# Seconds between two looks at a running training.
_LOOK_SECONDS = 3.0
# A training that has not begun its second epoch is of no use; less is not tried.
_LEAST_SECONDS = 20.0
_QUIET = ("--train.progress=false", "--train.tensorboard=false")


@dataclasses.dataclass(frozen=True)
class Training:
    """A training.

    Attributes:
      name: in the record.
      options: of `experiments.train`, without the data.
      log: which of the logs it needs, "ml1m" or "beauty"; None where its options say all.
    """

    name: str
    options: tuple[str, ...]
    log: str | None


def trainings(tiny: bool) -> tuple[Training, ...]:
    """Returns what is trained, the most valuable first."""
    if tiny:
        return (Training("quickstart", (*small_options(), "--train.epochs=2"), None),)
    several = ("ml1m_tim4rec_causal", "8 steps per dispatch", ("--train.steps_per_dispatch=8",), "ml1m")
    wanted = [
        ("ml1m_tim4rec_causal", "", (), "ml1m"),
        ("ml1m_tim4rec", "", (), "ml1m"),
        *([several] if hasattr(TrainConfig(), "steps_per_dispatch") else []),
        ("ml1m_echomamba4rec", "", (), "ml1m"),
        ("beauty_tim4rec", "", (), "beauty"),
        ("beauty_tim4rec_causal", "", (), "beauty"),
    ]
    return tuple(
        Training(f"{config}{', ' if how else ''}{how}", (f"--config={config}", *options), log)
        for config, how, options, log in wanted
    )


def data_options(log: str, path: pathlib.Path) -> tuple[tuple[str, ...], str]:
    """Returns the options that read a log file, and what the record says of it."""
    if log == "ml1m" and "imputed" in path.name:
        return ("--data.name=custom", f"--data.path={path}"), "MovieLens-1M with imputed timestamps"
    return (f"--data.path={path}",), {"ml1m": "MovieLens-1M", "beauty": "Amazon Beauty"}[log]


def look(run: pathlib.Path) -> dict[str, Any]:
    """Returns what a run folder has so far: its validated epochs with their seconds, and results once it is done."""
    lines = read_metrics(run) if run.exists() else []
    epochs = [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "valid"]
    seconds = [epoch["train_seconds"] for epoch in epochs]
    found: dict[str, Any] = {"epochs": epochs, "seconds_an_epoch": statistics.median(seconds) if seconds else None}
    try:
        found["environment"] = read_environment(run)
        found["results"] = read_results(run)
    except FileNotFoundError:
        found.setdefault("environment", None)
    return found


def _stopped_after(seconds: float) -> Callable[[], None]:
    """Has this process told by SIGTERM to save and stop after so many seconds; returns what takes that back."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    return timer.cancel


def _train(part: Part, training: Training, options: tuple[str, ...], note: str, folder: pathlib.Path) -> None:
    """Trains, or goes on, until done or the part's time is over.

    Raises:
      TimeoutError: it is not done yet.
      RuntimeError: the training program failed.
    """
    run, record = folder / training.name.replace(", ", "_").replace(" ", "_"), part.record["runs"]
    if part.budget.left() < _LEAST_SECONDS and not part.settings.tiny:
        raise TimeoutError(f"{part.budget.left():.0f} s are too few to begin")
    ended = threading.Event()

    def keep_looking() -> None:
        while not ended.wait(_LOOK_SECONDS):
            record[training.name] = {"note": note, **look(run)}
            part.save(f"epochs of {training.name}: {len(record[training.name]['epochs'])}")

    watcher = threading.Thread(target=keep_looking, daemon=True)
    watcher.start()
    cancel = _stopped_after(part.budget.left())
    resumed = ("--resume",) if run.exists() else ()
    try:
        code = train.main([*training.options, *_QUIET, *options, f"--run_dir={run}", *resumed])
    finally:
        cancel()
        ended.set()
        watcher.join()
    record[training.name] = {"note": note, **look(run)}
    if "results" not in record[training.name]:
        if code == 0:
            raise TimeoutError("stopped by the time limit; the next call goes on with it")
        raise RuntimeError(f"the training program ended with {code}")


def train_all(part: Part, logs: dict[str, pathlib.Path | None], folder: pathlib.Path) -> None:
    """Trains everything for which there is a log."""
    part.record.setdefault("runs", {})

    def without_log(log: str) -> None:
        raise FileNotFoundError(f"no log: give --{log}=FILE")

    def jobs() -> Iterator[tuple[str, Callable[[], None]]]:
        for training in trainings(part.settings.tiny):
            options, note = (), "synthetic"
            if training.log is not None:
                path = logs[training.log]
                if path is None:
                    yield training.name, functools.partial(without_log, training.log)
                    continue
                options, note = data_options(training.log, path)
            yield training.name, functools.partial(_train, part, training, options, note, folder)

    part.do_all(jobs())
