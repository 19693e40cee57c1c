"""Memory of processes over time: it must not depend on how long they have run.

saves       a table of states is saved again and again while it gains a user each time
questions   lists of varied lengths, with and without what was seen, for histories of varied lengths, from the table
            and from the recommender
events      experiments.stream in a process of its own takes in events from standard input, keeping a table
epochs      experiments.train in a process of its own trains a tiny model

The resident memory of the process and the programs compiled so far are read at 20 points of each part. What grows
between the first tenth and the end is shown with the programs that were compiled meanwhile. What a table holds grows
with users and events (`UserTable`); a program compiled per number of users would show in both columns.
"""

import argparse
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments.benchmarks.small_run import START, draw_lines, make_run, small_options, spawn
from experiments.cli import OptionParser
from tim4rec_jax.checks import require
from tim4rec_jax.run_dir import METRICS, environment
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.user_table import Event, UserTable
from tim4rec_jax.training.logging import read_metrics

READINGS = 20
USERS = 1000
_COMPILED = "/jax/core/compile/backend_compile_duration"
_MOST_SECONDS = 900
_SPARE_EPOCHS = 5


def _parse(rest: list[str]) -> argparse.Namespace:
    parser = OptionParser(prog="experiments.benchmark memory")
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(rest)
    for name in ("saves", "questions", "events", "epochs"):
        require(getattr(options, name) >= READINGS, f"--{name}={getattr(options, name)} must be at least {READINGS}")
    return options


def resident_bytes(process: int | str = "self") -> int:
    """Resident memory of a process; ValueError if it has ended."""
    status = pathlib.Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    require("VmRSS:" in status, f"process {process} ended before its memory was read; take more epochs")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def _is_reading(done: int, total: int) -> bool:
    return done * READINGS // total > (done - 1) * READINGS // total


def _saving(recommender: Recommender, rng: np.random.Generator, folder: pathlib.Path) -> Callable[[int], None]:
    table = UserTable(recommender)

    def save(i: int) -> None:
        table.add([Event(f"user {i}", str(rng.choice(recommender.item_ids)), START)])
        table.flush()
        table.save(folder / "users.npz")

    return save


def _asking(recommender: Recommender, rng: np.random.Generator, _: pathlib.Path) -> Callable[[int], None]:
    table = UserTable(recommender)
    users = [f"user {j}" for j in range(60)]

    def ask(i: int) -> None:
        length = int(rng.integers(1, 65))
        history = History(rng.integers(1, 9, length).astype(np.int32), START + 100 * i + np.arange(length))
        user = users[i % len(users)]
        table.add_histories({user: history})
        k, exclude_seen = int(rng.integers(5, 17)), bool(rng.integers(2))
        table.top_k([user], k, exclude_seen=exclude_seen)
        recommender.top_k([history], k, exclude_seen=exclude_seen)

    return ask


def _inside(make: Callable, recommender: Recommender, total: int, seed: int) -> list[dict[str, int]]:
    """Reads this process over so many steps."""
    compiled, readings = [], []

    def count(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILED:
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with tempfile.TemporaryDirectory() as folder:
            step = make(recommender, np.random.default_rng(seed), pathlib.Path(folder))
            for i in range(total):
                step(i)
                if _is_reading(i + 1, total):
                    gc.collect()
                    readings.append({"done": i + 1, "resident_bytes": resident_bytes(), "programs": len(compiled)})
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return readings


def _of_child(process: subprocess.Popen, errors: pathlib.Path, done: int) -> dict[str, int]:
    programs = errors.read_bytes().count(b"Finished XLA compilation")
    return {"done": done, "resident_bytes": resident_bytes(process.pid), "programs": programs}


def _failed(process: subprocess.Popen, errors: pathlib.Path) -> ValueError:
    last = errors.read_text(errors="replace").splitlines()[-1:]
    return ValueError(f"{' '.join(process.args[1:3])} ended with {process.wait()}: {''.join(last)[:200]}")


def _streaming(run: pathlib.Path, item_ids: list[str], total: int, seed: int) -> list[dict[str, int]]:
    """Reads experiments.stream, each time after an answer, which comes after all lines before it."""
    lines, readings, done = draw_lines(item_ids, seed, total, USERS, READINGS), [], 0
    with tempfile.TemporaryDirectory() as folder, (errors := pathlib.Path(folder, "errors")).open("wb") as file:
        options = [f"--run={run}", f"--state={folder}/users.npz", "--save-every=10000"]
        process = spawn("stream", *options, environment=os.environ | {"JAX_LOG_COMPILES": "1"}, errors=file, piped=True)
        with process, process.stdin, process.stdout:
            for line in lines:
                done += b'"item"' in line
                process.stdin.write(line)
                if b'"recommend"' in line:
                    if b'"items"' not in process.stdout.readline():
                        process.kill()
                        raise _failed(process, errors)
                    readings.append(_of_child(process, errors, done))
            process.stdin.close()
            if process.wait():
                raise _failed(process, errors)
    return readings


def _training(total: int) -> list[dict[str, int]]:
    """Reads experiments.train at the end of epochs; a few more than are read, so that it has not ended at the last."""
    readings, deadline = [], time.monotonic() + _MOST_SECONDS
    with tempfile.TemporaryDirectory() as folder, (errors := pathlib.Path(folder, "errors")).open("wb") as file:
        run = pathlib.Path(folder, "run")
        epochs_of_all = total + _SPARE_EPOCHS
        options = [f"--train.epochs={epochs_of_all}", f"--train.patience={epochs_of_all}"]
        options += ["--eval.baselines", f"--run_dir={run}"]
        process = spawn(
            "train",
            *small_options(),
            *options,
            environment=os.environ | {"JAX_LOG_COMPILES": "1"},
            errors=file,
        )
        with process:
            while process.poll() is None and len(readings) < READINGS:
                lines = read_metrics(run) if (run / METRICS).is_file() else []
                epochs = [line for line in lines if line["kind"] == "valid"]
                if epochs and len(epochs) * READINGS // total > len(readings):
                    peak = {"peak_resident_bytes": epochs[-1]["peak_resident_bytes"]}
                    readings.append(_of_child(process, errors, len(epochs)) | peak)
                if time.monotonic() > deadline:
                    process.kill()
                time.sleep(0.02)
            if len(readings) < READINGS:
                raise _failed(process, errors)
            process.kill()
    return readings


def grown(readings: list[dict[str, int]]) -> dict[str, float]:
    """What was added between the first tenth and the end."""
    first, last = readings[max(0, len(readings) // 10 - 1)], readings[-1]
    return {
        "from": first["done"],
        "to": last["done"],
        "mb": (last["resident_bytes"] - first["resident_bytes"]) / 1e6,
        "programs": last["programs"] - first["programs"],
    }


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures the parts one after the other; returns the record and its table."""
    chosen, results = _parse(rest), {}
    with tempfile.TemporaryDirectory() as folder:
        run_folder = pathlib.Path(folder) / "run"
        item_ids = make_run(run_folder, chosen.seed)
        recommender = Recommender.from_run(run_folder)
        parts = {
            "saves": lambda: _inside(_saving, recommender, chosen.saves, chosen.seed),
            "questions": lambda: _inside(_asking, recommender, chosen.questions, chosen.seed),
            "events": lambda: _streaming(run_folder, item_ids, chosen.events, chosen.seed),
            "epochs": lambda: _training(chosen.epochs),
        }
        for name, measure in parts.items():
            began = time.monotonic()
            readings = measure()
            seconds = time.monotonic() - began
            results[name] = {"growth": grown(readings), "seconds": seconds, "readings": readings}
            print(f"{name}: {seconds:.0f} s, {json.dumps(results[name]['growth'])}", file=sys.stderr, flush=True)
    table = Table(title="resident memory, MB (programs compiled so far)")
    for name in ("part", "at a tenth", "at half", "at the end", "growth"):
        table.add_column(name, justify="right")
    for name, result in results.items():
        readings = result["readings"]
        shown = [readings[max(0, len(readings) // 10 - 1)], readings[len(readings) // 2 - 1], readings[-1]]
        cells = [f"{r['resident_bytes'] / 1e6:,.0f} ({r['programs']})" for r in shown]
        table.add_row(name, *cells, f"{result['growth']['mb']:.1f}")
    return {"environment": environment(), "settings": vars(chosen), "results": results}, table
