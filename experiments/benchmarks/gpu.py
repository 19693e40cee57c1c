"""Everything that a GPU is needed for, in one call: are the kernels right, how fast are they, what does a step take.

correctness  every operator at full and at odd sizes against float64, values and gradients
ops          the device's ceilings, operators forward and backward in all forms, the share of the floor that each form
             reaches, and ways to cut up the SSD
train_step   the training step of two of the paper's settings, with kernels on and off, and PyTorch's

The record is saved after every step, so that a run that is cut off keeps what it has; what there was no time for is
named in it.
A result that is wrong makes the exit code 1, but not before everything else is measured.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from experiments.benchmarks import operator_speed, operators, train_step
from experiments.benchmarks.timing import Budget, Part, Settings, reason
from experiments.cli import OptionParser
from tim4rec_jax.files import write_atomically
from tim4rec_jax.run_dir import environment

# Part, share of the budget, and what fills its record.
_PARTS = {
    "correctness": (0.3, operators.check_all),
    "ops": (0.45, operator_speed.time_all),
    "train_step": (0.25, train_step.time_kernels),
}
# JAX takes this share of the device's memory at once and leaves the rest to PyTorch.
_MEMORY_SHARE = "0.6"


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for an unknown part, or a budget that is none.
    """
    parser = OptionParser(prog="experiments.benchmark gpu")
    parser.add_argument("--parts", default=",".join(_PARTS), help="which parts, with commas between them")
    parser.add_argument("--budget_seconds", type=float, default=540, help="nothing is begun after so many seconds")
    parser.add_flag("--tiny", "sizes at which the program can be tried out on any machine")
    parser.add_argument("--only", nargs="+", default=(), help="what has one of these in its label, e.g. l4099")
    parser.add_argument("--implementation", default="pallas_triton", help="which of our kernels")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn afresh by default")
    options = parser.parse_args(rest)
    options.parts = options.parts.split(",")
    unknown = sorted(set(options.parts) - set(_PARTS))
    if unknown:
        raise ValueError(f"--parts={','.join(unknown)}: expected some of {','.join(_PARTS)}")
    if options.budget_seconds <= 0:
        raise ValueError(f"--budget_seconds={options.budget_seconds} must be positive")
    return options


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "mamba-ssm", "causal-conv1d", "mamba2-jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _run_parts(
    chosen: list[str],
    settings: Settings,
    seed: int,
    budget: Budget,
    record: dict[str, Any],
    save: Callable[[str], None],
) -> None:
    """Runs the parts, each with its share of what time is left."""
    rng = np.random.default_rng(seed)
    for index, name in enumerate(chosen):
        share, run_part = _PARTS[name]
        share /= sum(_PARTS[other][0] for other in chosen[index:])
        record[name] = {}
        try:
            run_part(Part(settings, rng, budget.share(share), record[name], save))
        except Exception as error:  # The next part may still work.
            record[name]["error"] = reason(error)
        save(f"end of {name}")


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Checks and measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    budget = Budget(chosen.budget_seconds)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_SHARE)
    settings = Settings(chosen.implementation, chosen.tiny, options.repeats, tuple(chosen.only))
    seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
    record: dict[str, Any] = {
        "environment": environment(),
        "versions": _versions(),
        "settings": dataclasses.asdict(settings)
        | {"parts": chosen.parts, "budget_seconds": chosen.budget_seconds, "seed": seed},
    }

    def save(label: str) -> None:
        print(f"{budget.left():6.0f} s left, done: {label}", file=sys.stderr, flush=True)
        if options.output:
            whole = {"benchmark": "gpu", **record}
            write_atomically(options.output, (json.dumps(whole, indent=2) + "\n").encode())

    _run_parts([name for name in _PARTS if name in chosen.parts], settings, seed, budget, record, save)
    correctness = record.get("correctness", {})
    record["failed"] = bool(correctness.get("failed") or correctness.get("error"))
    return record, report(record)


def _operator_row(result: dict[str, Any], ours: str) -> tuple[str, ...]:
    """One line on an operator: our times, our share of the floor, and what other forms take in ours."""
    seconds = {name: form["median_seconds"] for name, form in result["forms"].items()}
    label = f"{result['op']} {' '.join(f'{axis}{size}' for axis, size in result['sizes'].items())}"
    own = [seconds.get(f"{ours}: {of}") for of in operator_speed.PASSES]
    shown = ["" if s is None else f"{1e6 * s:.0f}" for s in own]
    floor = result["forms"].get(f"{ours}: forward_backward", {}).get("fraction_of_floor")
    others = [
        f"{name.rsplit(': ', 1)[0]} {s / own[1]:.1f}x"
        for name, s in seconds.items()
        if own[1] and name.endswith(": forward_backward") and not name.startswith(f"{ours}: ")
    ]
    return label, result["precision"], *shown, "" if floor is None else f"{100 * floor:.0f}", ", ".join(others)


def report(record: dict[str, Any]) -> Table:
    """The medians, shares of the floor and ratios, and how many checks held."""
    checks = record.get("correctness", {}).get("checks", [])
    table = Table(title=f"{sum(c['ok'] for c in checks)} of {len(checks)} checks held", title_justify="left")
    for column in ("what", "precision", "forward us", "both us", "% of floor", "others"):
        table.add_column(column, justify="left" if column in ("what", "others") else "right")
    for check in checks:
        if not check["ok"]:
            table.add_row(f"FAILED: {check['op']} {check['sizes']}", check["precision"], "", "", "", "")
    for result in record.get("ops", {}).get("comparisons", []):
        table.add_row(*_operator_row(result, record["settings"]["implementation"]))
    for kind in ("comparisons", "sweep"):
        for result in record.get("train_step", {}).get(kind, []):
            times = {name: form["median_seconds"] for name, form in result["forms"].items()}
            forms = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in times.items())
            table.add_row(f"step of {result['config']}", result["precision"], "", "", "", forms)
    for part in record["settings"]["parts"]:
        skipped = len(record.get(part, {}).get("skipped", {}))
        if skipped or record.get(part, {}).get("error"):
            table.add_row(f"{part}: {skipped} skipped", "", "", "", "", record[part].get("error", ""))
    return table
