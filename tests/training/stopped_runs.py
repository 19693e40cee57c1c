"""A program that trains by forking, asks its children to stop while they are at one thing or another, and goes on.

    python -m tests.training.stopped_runs out.json folder option...

Where a run may be caught in code that is not Python, as compilation is, it is held there by a hash of a password:
that takes as long as it is told to, without the interpreter and without heed to signals.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments import train
from tests.training.killed_runs import finish, options_of, start
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator
from tim4rec_jax.training import loop
from tim4rec_jax.training.loop import Session
from tim4rec_jax.training.setup import Setup

# What is interrupted: owner, function, at which call, and whether Python is held too.
MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "reading the log": (train, "load_log", 1, True),
    "making the run folder": (loop, "create_run", 1, False),
    "compiling": (Setup, "compile_steps", 1, True),
    "between steps": (Session, "log_line", 5, False),
    "first validation": (FullSortEvaluator, "__call__", 1, True),
    "later validation": (FullSortEvaluator, "__call__", 2, False),
    "after validation": (Session, "is_last", 2, False),
    "test": (loop, "_test", 1, False),
    "the last table": (train, "final_tables", 1, False),
}


def outside_python() -> None:
    """Returns after far more than half a minute."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def in_python() -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        time.sleep(0.01)


def hold(owner: Any, name: str, count: int, marker: pathlib.Path, wait: Callable[[], None]) -> None:
    """Replaces a function by one that tells when it is called for the `count`-th time, and does not go on."""
    original, calls = getattr(owner, name), []

    def held(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            marker.touch()
            # After a step a request is met when the step's work is done.
            time.sleep(0.5) if name == "log_line" else wait()
        return original(*arguments, **options)

    setattr(owner, name, held)


def stop(moment: str, number: signal.Signals, folder: pathlib.Path, options: list[str]) -> dict[str, Any]:
    """Interrupts a run once; returns how it ended and how long that took."""
    owner, name, count, outside = MOMENTS[moment]
    marker, said = folder.with_name(f"{folder.name}.marker"), folder.with_name(f"{folder.name}.log")
    original = getattr(owner, name)
    hold(owner, name, count, marker, outside_python if outside else in_python)
    child = start(options_of(options, folder), said)
    setattr(owner, name, original)
    while not marker.exists():
        time.sleep(0.01)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"{moment}: ended early: {said.read_text()}"
    asked = time.monotonic()
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - asked
    return {"moment": moment, "signal": number, "code": code, "seconds": seconds, "said": said.read_text()}


def main(output: str, base: str, *options: str) -> None:
    folder, options = pathlib.Path(base), list(options)
    finish(options_of(options, folder / "reference"))
    found = []
    for count, moment in enumerate(MOMENTS):
        here = folder / f"run_{count}"
        number = signal.SIGINT if moment in ("compiling", "test") else signal.SIGTERM
        found.append(stop(moment, number, here, options) | {"folder": here.name})
        finish(options_of(options, here))
    pathlib.Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
