"""What a run says while it trains: metrics.jsonl, TensorBoard events, curves, the progress bar.

A line of metrics.jsonl is one strict JSON object with "kind" first. A number that is not finite is written as the
string "NaN", "Infinity" or "-Infinity", which `read_metrics` turns back into the number.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Mapping
from io import FileIO
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tim4rec_jax.figures import new_figure
from tim4rec_jax.files import named_in_errors, replacing, write_atomically
from tim4rec_jax.run_dir import CURVES, METRICS

Kind = Literal["train", "valid", "test", "event"]
NEEDED = {"train": ("step", "loss"), "valid": ("step", "epoch"), "test": (), "event": ()}
_ALWAYS_NUMBERS = ("step", "epoch", "loss", "train_loss", "train_seconds", "peak_resident_bytes")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricLogger:
    """Appends the lines of a run to metrics.jsonl and, if asked, its scalars to TensorBoard event files.

    A last line that a kill left half-written is dropped, and an event line says so.

    Args:
      run_dir: folder of the run; made if it is not there.
      tensorboard: also write event files to `run_dir/tensorboard`.
      write: off in all but one of several processes of a run: nothing is touched then.
    """

    def __init__(self, run_dir: pathlib.Path, *, tensorboard: bool, write: bool = True) -> None:
        self._file = pathlib.Path(run_dir) / METRICS
        self._writes = write
        if not write:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._tensorboard = self._file.parent / "tensorboard" if tensorboard else None
        self._events: Any = None
        self._purge_step: int | None = None
        torn = _drop_torn_line(self._file)
        self._stream = _open_to_append(self._file)
        if torn:
            self.log("event", message=f"dropped a half-written last line of {torn} bytes")

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, exc_type: type | None, *_: object) -> None:
        # What ended the run must not be hidden by what it left half done.
        with contextlib.suppress(*[OSError] if exc_type else []):
            self.close()

    def log(self, kind: Kind, **values: Any) -> None:
        """Writes one line, which is with the operating system when the call returns.

        Args:
          kind: "train" lines need `step` and `loss`, "valid" lines `step` and `epoch`.
          values: numbers (also 0-d arrays), strings, None, and lists and dicts of these. Numbers of a line that has a
            `step` also go to TensorBoard as `kind/name`.

        Raises:
          ValueError: the kind is unknown, a needed value is absent, or a value has no JSON form.
          OSError: the line cannot be written; what a part of it would have been is cut off when the run goes on.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} must be one of {get_args(Kind)}")
        if missing := [name for name in NEEDED[kind] if name not in values]:
            raise ValueError(f"a {kind} line needs {missing} besides {sorted(values)}")
        if not self._writes:
            return
        line = {"kind": kind} | {name: _jsonable(name, value) for name, value in values.items()}
        self._append((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
        if self._tensorboard is not None and "step" in values:
            self._log_scalars(self._tensorboard, kind, line)

    def _append(self, line: bytes) -> None:
        with named_in_errors(self._file):
            written = self._stream.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _log_scalars(self, folder: pathlib.Path, kind: str, line: Mapping[str, Any]) -> None:
        scalars = {
            f"{kind}/{name}": value
            for name, value in _numbers_restored(line).items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        with named_in_errors(folder):
            if self._events is None:
                self._events = EventFile(folder, self._purge_step)
            self._events.add(line["step"], scalars)

    def truncate_after(self, step: int, validated: int | None = None) -> int:
        """Drops the lines written after `step` and returns how many, so that a resumed run repeats none of them.

        A line without a `step` of its own belongs to the step of the line before it. A test line, whose step is the
        best epoch's, is dropped whatever its step: training that goes on ends with a test of its own.

        Args:
          step: optimiser steps done at the checkpoint that training resumes from.
          validated: last epoch whose validation training does not repeat; None keeps those up to `step`.
        """
        if not self._writes:
            return 0
        self._stream.close()
        position, kept, dropped = 0, [], 0
        for line, values in _lines(self._file):
            test = values.get("kind") == "test"
            position = position if test else values.get("step", position)
            repeated = validated is not None and values.get("kind") == "valid" and values["epoch"] > validated
            if position <= step and not test and not repeated:
                kept.append(line + "\n")
            else:
                dropped += 1
        write_atomically(self._file, "".join(kept).encode())
        self._stream = _open_to_append(self._file)
        if self._events is not None:
            self._events.close()
            self._events = None
        self._purge_step = step + 1
        return dropped

    def close(self) -> None:
        """Closes the files."""
        if not self._writes:
            return
        self._stream.close()
        if self._events is not None:
            self._events.close()


class EventFile:
    """One TensorBoard event file of scalars, written at once: a full disk is an error in the call that finds it.

    tensorboardX's SummaryWriter hands events to a thread; if that dies of a full disk, the tenth event after it waits
    for ever.

    Args:
      folder: of the event files; made if it is not there.
      purge_step: TensorBoard hides what older files say of this step and later ones; None hides nothing.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None = None) -> None:
        # Imported where it is wanted: tensorboardX takes PyTorch along wherever that is installed.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        self._event = lambda step, name, value: Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        folder.mkdir(parents=True, exist_ok=True)
        # File names carry whole seconds of a clock that may be set back: a second file must not overwrite the first.
        self._writer = EventsWriter(str(folder / "events"), f".{secrets.token_hex(8)}")
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step, which are with the operating system when the call returns.

        Raises:
          OSError: they cannot be written.
        """
        for name, value in values.items():
            self._writer.write_event(self._event(step, name, value))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def read_metrics(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl in order; a half-written last line is left out.

    Raises:
      FileNotFoundError: there is no metrics.jsonl.
      ValueError: a line is none that `MetricLogger.log` writes; the line is named.
    """
    return [_numbers_restored(values) for _, values in _lines(pathlib.Path(run_dir) / METRICS)]


def _lines(file: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: nothing has been logged in this run")
    complete = file.read_bytes().split(b"\n")[:-1]
    lines = []
    for number, raw in enumerate(complete, start=1):
        try:
            line = raw.decode()
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number} is not JSON: {str(error)[:120]}; remove the line") from error
        if reason := _complaint(values):
            raise ValueError(f"{file}:{number} {reason}; remove the line")
        lines.append((line, values))
    return lines


def _complaint(values: Any) -> str | None:
    """Says what keeps a line from being one that `MetricLogger.log` writes."""
    if not isinstance(values, dict):
        return f"is a {type(values).__name__} where an object is expected"
    if values.get("kind") not in NEEDED:
        return f"has no kind out of {', '.join(NEEDED)}"
    for name, value in (dict.fromkeys(NEEDED[values["kind"]]) | values).items():
        number = isinstance(value, int | float) and not isinstance(value, bool) or value in list(_NOT_FINITE)
        if not number and (name in _ALWAYS_NUMBERS or "@" in name):
            return f"has no number for {name[:40]}"
    return None


def _open_to_append(file: pathlib.Path) -> FileIO:
    """Opens without a buffer, so that nothing is left over that closing would try again to write."""
    return file.open("ab", buffering=0)


def _drop_torn_line(file: pathlib.Path) -> int:
    """Cuts what follows the last line break and returns its size in bytes."""
    if not os.path.lexists(file):
        return 0
    if not file.is_file():
        raise ValueError(f"{file} is not a file; remove it")
    content = file.read_bytes()
    torn = len(content) - (content.rfind(b"\n") + 1)
    if torn:
        write_atomically(file, content[: len(content) - torn])
    return torn


def _jsonable(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(name, item) for item in value]
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return next(text for text, number in _NOT_FINITE.items() if number == value or text == "NaN" and value != value)
    if isinstance(value, bool | int | float):
        return value
    raise ValueError(f"{name}={value!r} of type {type(value).__name__} has no place in a line of metrics.jsonl")


def _numbers_restored(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _numbers_restored(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_numbers_restored(value) for value in values]
    return _NOT_FINITE.get(values, values) if isinstance(values, str) else values


def plot_training_curves(run_dir: pathlib.Path, *, monitor: str = "ndcg@10") -> pathlib.Path:
    """Draws curves.png from metrics.jsonl and returns its path.

    One panel shows the loss by step, three the validation hit, ndcg and mrr by epoch; a line marks the best epoch.

    Args:
      run_dir: folder of the run.
      monitor: the metric whose best value, rounded to 4 decimals, makes the best epoch; of equals the last.

    Raises:
      ValueError: nothing to draw, or the validation lines lack `monitor`.
    """
    lines = read_metrics(run_dir)
    train = [line for line in lines if line["kind"] == "train"]
    valid = [line for line in lines if line["kind"] == "valid"]
    if not train and not valid:
        raise ValueError(f"{pathlib.Path(run_dir) / METRICS} has no train or valid line to draw")
    measured = [line for line in valid if any("@" in name for name in line)]  # Nothing is, where every event trains.
    if lacking := [line for line in measured if monitor not in line]:
        raise ValueError(f"the valid line of epoch {lacking[0]['epoch']} lacks {monitor}; it has {sorted(lacking[0])}")
    figure = new_figure(16, 4)
    # Margins that fit are given, for finding them takes longer than drawing.
    margins = {"left": 0.035, "right": 0.99, "bottom": 0.13, "top": 0.92, "wspace": 0.2}
    loss, *panels = figure.subplots(1, 4, gridspec_kw=margins)
    loss.plot([line["step"] for line in train], [line["loss"] for line in train], linewidth=1)
    loss.set(title="training loss", xlabel="step")
    epochs = [line["epoch"] for line in valid]
    best = max(measured, key=lambda line: (round(line[monitor], 4), line["epoch"]), default=None)
    for panel, metric in zip(panels, ("hit", "ndcg", "mrr"), strict=True):
        panel.set(title=f"validation {metric}", xlabel="epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        names = [name for name in (valid[-1] if valid else ()) if name.startswith(f"{metric}@")]
        for name in names:
            panel.plot(epochs, [line.get(name, math.nan) for line in valid], marker=".", label=name)
        if best is not None:
            label = f"best {monitor}: epoch {best['epoch']}"
            panel.axvline(best["epoch"], color="grey", linestyle="--", linewidth=1, label=label)
            panel.legend(fontsize="small")
    for panel in (loss, *panels):
        panel.grid(alpha=0.3)
    path = pathlib.Path(run_dir) / CURVES
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return path


class TrainingProgress:
    """Shows an epoch's progress as a bar with examples/s, loss and time left, and prints one line an epoch.

    Without a terminal, or when switched off, there is no bar and the lines alone are printed.

    Args:
      epochs: most epochs of the run.
      examples: training examples per epoch.
      enabled: show the bar.
      console: where to print; None is standard output.
    """

    def __init__(self, epochs: int, examples: int, *, enabled: bool = True, console: Console | None = None) -> None:
        self._epochs, self._examples = epochs, examples
        self._console = Console() if console is None else console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=examples, rate="", loss="", visible=False)
        self._began, self._done = time.perf_counter(), 0

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start_epoch(self, epoch: int, *, done: int = 0) -> None:
        """Starts the bar of an epoch (counted from 1), `done` examples into it."""
        self._began, self._done = time.perf_counter(), 0
        self._bar.reset(
            self._task, description=f"epoch {epoch}/{self._epochs}", completed=done, rate="", loss="", visible=True
        )

    def advance(self, examples: int, *, loss: float | None = None) -> None:
        """Counts examples trained on; `loss` is shown until the next one is given."""
        self._done += examples
        self._bar.update(self._task, advance=examples, rate=f"{self.examples_per_second:,.0f} examples/s")
        if loss is not None:
            self._bar.update(self._task, loss=f"loss {loss:.4f}")

    @property
    def seconds(self) -> float:
        """Time since this epoch was started or resumed."""
        return time.perf_counter() - self._began

    @property
    def examples_per_second(self) -> float:
        """Examples trained on since this epoch was started or resumed, by `seconds`."""
        return self._done / max(self.seconds, 1e-9)

    def end_epoch(self, epoch: int, *, loss: float, seconds: float, rate: float, metrics: Mapping[str, float]) -> None:
        """Prints the line of an epoch.

        Args:
          epoch: counted from 1.
          loss: mean training loss of the epoch.
          seconds: training time.
          rate: examples per second.
          metrics: validation metrics to show, by name.
        """
        self._bar.update(self._task, visible=False)
        shown = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        self.report(f"epoch {epoch}/{self._epochs}  loss {loss:.4f}  {seconds:.1f} s  {rate:,.0f} examples/s{shown}")

    def report(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
