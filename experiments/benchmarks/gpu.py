r"""Everything that a GPU is needed for, in one call: are the kernels right, how fast are they, what does a step take.

    python -m experiments.benchmark gpu --plan=ten-minutes --ml1m=ml-1m.inter.gz --mamba_ssm=mamba_ssm.tar.gz \
        --output=gpu.json
    python -m experiments.benchmark gpu --parts=correctness --only l4099 conv --output=some.json

correctness    every backend of every operator at full and at odd sizes against float64, values and gradients
ops            the device's ceilings, every backend forward and backward: time, compile time, share of the floor
cuts           other configs of the kernels: cuts of the SSD, fields of a backend's config, programs of the loss
opponents      PyTorch, mamba_ssm in chunks of 64 and 256, causal_conv1d; their times stand with those of `ops`
train_step     the training step, with kernels on and off, one and several steps per dispatch, and PyTorch's; no launch
               is captured
captured_step  the same with command buffers, custom calls among them
training       trainings to early stop, with evaluation: --ml1m=FILE and --beauty=FILE say where the logs are
counters       hardware counters of the SSD's kernels by ncu, where that is installed

`--plan=ten-minutes` runs each part in a process of its own, in this order, each with its share of --budget_seconds, and
what time is left goes to those that were cut off. The record is saved after every step; a call with the same --output
goes on where the one before ended, however it ended. What there was no time for is named in it, and so is what failed.
A result that is wrong makes the exit code 1, but not before everything else is measured.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import secrets
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from experiments.benchmarks import (
    gpu_counters,
    gpu_plan,
    gpu_training,
    operator_kernels,
    operators,
    opponents,
    train_step,
)
from experiments.benchmarks.timing import Budget, Part, Settings, reason
from experiments.cli import OptionParser
from tim4rec_jax.files import write_atomically
from tim4rec_jax.run_dir import environment

# Part, and what fills its record.
_RUN: dict[str, Callable[[Part], None]] = {
    "correctness": operators.check_all,
    "ops": operator_kernels.time_all,
    "cuts": operator_kernels.time_cuts,
    "opponents": operator_kernels.time_opponents,
    "train_step": train_step.time_kernels,
    "captured_step": train_step.time_kernels,
    "counters": gpu_counters.count_all,
}
# JAX takes this share of the device's memory at once and leaves the rest to PyTorch.
_MEMORY_SHARE = "0.6"


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for an unknown part or plan, a budget that is none, or a file that is not there.
    """
    parser = OptionParser(prog="experiments.benchmark gpu")
    parser.add_argument("--plan", choices=("ten-minutes",), help="each part in a process of its own")
    parser.add_argument("--parts", default=",".join(gpu_plan.SHARES), help="which parts, with commas between them")
    parser.add_argument("--budget_seconds", type=float, default=540, help="nothing is begun after so many seconds")
    parser.add_flag("--tiny", "sizes at which the program can be tried out on any machine")
    parser.add_argument("--only", nargs="+", default=(), help="what has one of these in its label, e.g. l4099")
    parser.add_argument("--implementations", default="", help="which backends, with commas between them; default all")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn afresh by default")
    parser.add_argument(
        "--mamba_ssm", type=pathlib.Path, help="its source, a .tar.gz or a folder; default: as installed"
    )
    parser.add_argument(
        "--ml1m", type=pathlib.Path, help="MovieLens-1M; one with imputed timestamps has that in its name"
    )
    parser.add_argument("--beauty", type=pathlib.Path, help="Amazon Beauty")
    parser.add_flag("--ends_with_parent", "this process is a part of a plan and ends when the plan does")
    options = parser.parse_args(rest)
    options.parts = options.parts.split(",")
    options.implementations = tuple(name for name in options.implementations.split(",") if name)
    unknown = sorted(set(options.parts) - set(gpu_plan.SHARES))
    if unknown:
        raise ValueError(f"--parts={','.join(unknown)}: expected some of {','.join(gpu_plan.SHARES)}")
    options.parts = [name for name in gpu_plan.SHARES if name in options.parts]
    if options.budget_seconds <= 0:
        raise ValueError(f"--budget_seconds={options.budget_seconds} must be positive")
    for name in ("mamba_ssm", "ml1m", "beauty"):
        if (path := getattr(options, name)) and not path.exists():
            raise ValueError(f"--{name}={path} is not there")
    return options


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "jax-triton", "mamba-ssm", "causal-conv1d", "mamba2-jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _runs_folder(output: pathlib.Path | None) -> pathlib.Path:
    return output.parent / f"{output.stem}_runs" if output else pathlib.Path(tempfile.mkdtemp(prefix="gpu_runs_"))


def _run_parts(
    chosen: argparse.Namespace,
    settings: Settings,
    budget: Budget,
    record: dict[str, Any],
    save: Callable[[str], None],
    output: pathlib.Path | None,
) -> None:
    """Runs the parts in this process, each with its share of what time is left."""
    logs = {"ml1m": chosen.ml1m, "beauty": chosen.beauty}
    runs = _RUN | {
        "training": functools.partial(gpu_training.train_all, logs=logs, folder=_runs_folder(output)),
    }
    for index, name in enumerate(chosen.parts):
        share = gpu_plan.SHARES[name] / sum(gpu_plan.SHARES[other] for other in chosen.parts[index:])
        part = record.setdefault(name, {})
        part["ended"] = False
        part.pop("error", None)
        started = {key: record["now"][key] for key in ("start_utc", "git_commit")}
        part.setdefault("calls", []).append(
            started | {"xla_flags": os.environ.get("XLA_FLAGS"), "budget_seconds": share * budget.left()}
        )
        # Parts draw their inputs alike, whether or not others ran before them.
        rng = np.random.default_rng([record["settings"]["seed"], index if chosen.parts == list(_RUN) else len(name)])
        try:
            runs[name](Part(settings, rng, budget.share(share), part, save, record))
        except Exception as error:  # The next part may still work.
            part["error"] = reason(error)
        part["ended"] = True
        save(f"end of {name}")


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Checks and measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    if chosen.plan:
        record = gpu_plan.run(options, chosen, rest)
        return record, report(record)
    if chosen.ends_with_parent:
        gpu_plan.end_with_parent()
    budget = Budget(chosen.budget_seconds)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_SHARE)
    settings = Settings(chosen.implementations, chosen.tiny, options.repeats, tuple(chosen.only))
    now = environment()
    seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
    record: dict[str, Any] = {
        "environment": now,
        "versions": _versions(),
        "settings": dataclasses.asdict(settings)
        | {"parts": chosen.parts, "budget_seconds": chosen.budget_seconds, "seed": seed},
    }
    if options.output and options.output.exists():
        record |= gpu_plan.earlier(options.output, now, chosen.tiny)
        record["settings"]["parts"] = [
            name for name in gpu_plan.SHARES if name in record["settings"]["parts"] or name in chosen.parts
        ]
    record["now"] = now

    def save(label: str) -> None:
        print(f"{budget.left():6.0f} s left, {label}", file=sys.stderr, flush=True)
        if options.output:
            whole = {"benchmark": "gpu"} | {name: value for name, value in record.items() if name != "now"}
            write_atomically(options.output, (json.dumps(whole, indent=2) + "\n").encode())

    with tempfile.TemporaryDirectory() as unpacked:
        if chosen.mamba_ssm:
            opponents.offer_mamba_ssm(chosen.mamba_ssm, pathlib.Path(unpacked))
        _run_parts(chosen, settings, budget, record, save, options.output)
    del record["now"]
    record["failed"] = gpu_plan.is_wrong(record)
    return record, report(record)


def _operator_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line per form of an operator: its times, and its share of the floor."""
    label = f"{result['op']} {' '.join(f'{axis}{size}' for axis, size in result['sizes'].items())}"
    forms: dict[str, dict[str, dict[str, Any]]] = {}
    for name, form in result["forms"].items():
        forms.setdefault(name.rsplit(": ", 1)[0], {})[name.rsplit(": ", 1)[1]] = form
    rows = []
    for name, passes in forms.items():
        times = [f"{1e6 * passes[of]['median_seconds']:.0f}" if of in passes else "" for of in operator_kernels.PASSES]
        floor = passes.get("forward_backward", {}).get("fraction_of_floor")
        rows.append((label, result["precision"], *times, "" if floor is None else f"{100 * floor:.0f}", name))
    return rows


def report(record: dict[str, Any]) -> Table:
    """How many checks held, the medians, shares of the floor, and what is missing."""
    checks = record.get("correctness", {}).get("checks", [])
    refused = sum("refused" in check for check in checks)
    held = f"{sum(c['ok'] for c in checks) - refused} of {len(checks) - refused} checks held, {refused} refused"
    table = Table(title=held, title_justify="left")
    for column in ("what", "precision", "forward us", "both us", "% of floor", "form"):
        table.add_column(column, justify="left" if column in ("what", "form") else "right")
    for check in checks:
        if not check["ok"]:
            name = check.get("implementation", "")
            table.add_row(f"FAILED: {check['op']} {check['sizes']}", check["precision"], "", "", "", name)
    for result in record.get("ops", {}).get("comparisons", []):
        for row in _operator_rows(result):
            table.add_row(*row)
    for part in ("train_step", "captured_step"):
        for kind in ("comparisons", "sweep"):
            for result in record.get(part, {}).get(kind, []):
                times = {name: form["median_seconds"] for name, form in result["forms"].items()}
                forms = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in times.items())
                label = f"{part} of {result['config']}, {result['batch_size']} rows"
                table.add_row(label, result["precision"], "", "", "", forms)
    for name, trained in record.get("training", {}).get("runs", {}).items():
        test = trained.get("results", {}).get("test", {}).get("ndcg@10")
        seconds = trained["seconds_an_epoch"]
        said = "" if seconds is None else f"{seconds:.2f} s per epoch, {len(trained['epochs'])} epochs"
        table.add_row(f"training of {name}", "", "", "", "", said + ("" if test is None else f", ndcg@10 {test:.4f}"))
    for part in record["settings"]["parts"]:
        found = record.get(part, {})
        skipped = found.get("skipped", {})
        if skipped or found.get("error") or not found.get("ended"):
            first = found.get("error") or next(iter(skipped.values()), "it did not end")
            table.add_row(f"{part}: {len(skipped)} skipped", "", "", "", "", first)
    return table
