"""Runs the parts of `experiments.benchmark gpu` one after the other, each in a process of its own, on one record.

A part may crash, hang or be killed: what it found until then is in the record, and the next part begins.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

from experiments.benchmarks.timing import Budget
from tim4rec_jax.files import write_atomically

# Parts in the order of their worth, and their shares of the time.
SHARES = {
    "correctness": 120,
    "ops": 80,
    "cuts": 60,
    "opponents": 70,
    "train_step": 60,
    "captured_step": 40,
    "training": 90,
    "counters": 20,
}
# Flags of XLA for parts that want some.
_FLAGS = {
    "train_step": "--xla_gpu_enable_command_buffer=",
    "captured_step": "--xla_gpu_enable_command_buffer=+CUSTOM_CALL",
}
# A part ends by itself when its time is over, once the job is done that it is at; this long after that it is ended.
_GRACE_SECONDS = 20.0
# A process that crashes is started again, without the job in which it did so twice.
_MOST_STARTS = 4
_LEAST_SECONDS = 5.0


def end_with_parent() -> None:
    """Ends this process soon after the one that started it has gone, so that two never write one record."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read(output: pathlib.Path) -> dict[str, Any]:
    """Reads the record of a call before this one, or what it has come to.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        record = json.loads(output.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("benchmark") != "gpu":
        raise ValueError(f"--output={output} holds no record of this benchmark to go on with: name another file")
    if "implementations" not in record.get("settings", {}):
        raise ValueError(f"--output={output} is a record of an earlier version: name another file")
    return record


def earlier(output: pathlib.Path, now: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Returns the record that a call goes on with.

    Raises:
      ValueError: it was made on another device, or at other sizes.
    """
    record = read(output)
    there = record["environment"]["device_kind"]
    if there != now["device_kind"]:
        raise ValueError(f"--output={output} was measured on {there}, this is {now['device_kind']}: name another file")
    if record["settings"]["tiny"] != tiny:
        raise ValueError(f"--output={output} was made with tiny={record['settings']['tiny']}: name another file")
    del record["benchmark"]
    return record


def is_wrong(record: dict[str, Any]) -> bool:
    """Returns whether a value is wrong, or values could not be checked."""
    correctness = record.get("correctness", {})
    return bool(correctness.get("failed") or correctness.get("error"))


def _found(output: pathlib.Path, part: str) -> dict[str, Any]:
    return read(output).get(part, {}) if output.exists() else {}


def _is_done(part: dict[str, Any]) -> bool:
    return bool(part.get("ended")) and not part.get("skipped") and not part.get("error")


def _lacked_time(part: dict[str, Any]) -> bool:
    reasons = part.get("skipped", {}).values()
    return not part.get("ended") or any("are over" in why or why.startswith("TimeoutError") for why in reasons)


def _run_part(part: str, seconds: float, output: pathlib.Path, options: list[str], budget: Budget) -> None:
    """Runs one part in a process, again where it crashes, until it has ended or its time is over."""
    own = Budget(seconds)
    given = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS.get(part, '')}".strip()}
    for _ in range(_MOST_STARTS):
        left = min(own.left(), budget.left())
        if left < _LEAST_SECONDS:
            return
        command = [sys.executable, "-m", "experiments.benchmark", "gpu", f"--output={output}", *options]
        command += [f"--parts={part}", f"--budget_seconds={left}", "--ends_with_parent"]
        process = subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(left + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{part} is ended: its {left:.0f} s are over", file=sys.stderr, flush=True)
            return
        finally:
            process.kill()
            process.wait()
        if code >= 0:
            return
        print(f"{part} was ended by signal {-code}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace, chosen: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Runs the chosen parts; returns the record.

    Args:
      options: of `experiments.benchmark`.
      chosen: options of `gpu`, as read.
      rest: options of `gpu`, as given.

    Raises:
      ValueError: no file is named, or it holds something else.
      RuntimeError: no part left a record.
    """
    output = options.output
    if output is None:
        raise ValueError("--plan goes on with what it has found: give --output=FILE")
    if output.exists():
        read(output)
    handed_on = ("--plan", "--parts", "--budget_seconds")
    given = [f"--repeats={options.repeats}"]
    skip = False
    for word in rest:
        # `--parts a` and `--parts=a` alike are this process's own.
        if skip or word.partition("=")[0] in handed_on:
            skip = not skip and "=" not in word
            continue
        given.append(word)
    budget, total = Budget(chosen.budget_seconds), sum(SHARES[part] for part in chosen.parts)
    todo = [part for part in chosen.parts if not _is_done(_found(output, part))]
    for part in todo:
        if budget.left() >= _LEAST_SECONDS:
            _run_part(part, chosen.budget_seconds * SHARES[part] / total, output, given, budget)
    # What others left over goes to those that were cut off.
    for part in todo:
        if budget.left() >= _LEAST_SECONDS and _lacked_time(_found(output, part)):
            _run_part(part, budget.left(), output, given, budget)
    if not output.exists():
        raise RuntimeError("no part left a record: its lines above say why")
    record = read(output)
    record["environment"]["command"] = [*sys.orig_argv]
    record["settings"] |= {"plan": chosen.plan, "parts": chosen.parts, "budget_seconds": chosen.budget_seconds}
    record["failed"] = is_wrong(record)
    write_atomically(output, (json.dumps(record, indent=2) + "\n").encode())
    return record
