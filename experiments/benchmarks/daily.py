"""A model kept up to date: each day begun with yesterday's parameters, against one trained from initial values.

The log is cut in time into parts of equally many events, the days; on day n everything up to its end is split again
into training, validation and test. `cold` is trained with the experiment's own settings. `warm` begins with the warm
run of the day before (on day 2 with the cold one of day 1), without a warm-up of the rate, for a share of the cold
epochs (--share). What counts is the training time after which validation first reaches the cold run's best value,
beside that of all the cold run's epochs, over which its rate falls; both without what compiling takes. The test stands
beside them.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np
from rich.table import Table

from experiments.cli import OptionParser, settings_without_folders, table
from experiments.runs import require_comparable
from experiments.train import parse
from tim4rec_jax.checks import require
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog, load_log
from tim4rec_jax.run_dir import environment
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.loop import only_writer, train


def _parse(rest: list[str]) -> tuple[argparse.Namespace, ExperimentConfig]:
    """Reads the options of this benchmark, and behind them those of the experiment, as `experiments.train` has them.

    Raises:
      ValueError: for fewer than 2 days, a share outside (0, 1], or settings that do not go together.
    """
    parser = OptionParser(prog="experiments.benchmark daily")
    parser.add_argument("--config", default="ml100k_tim4rec_causal", help="the experiment")
    parser.add_argument("--days", type=int, default=5, help="parts of the log")
    parser.add_argument("--share", type=float, default=0.25, help="of the cold run's epochs that the warm one gets")
    parser.add_argument("--rate", type=float, default=1.0, help="of the warm run's learning rate to the cold one's")
    parser.add_argument("--runs", type=pathlib.Path, help="keep the run folders here")
    options, settings = parser.parse_known_args(rest)
    require(options.days >= 2, f"--days={options.days} must be at least 2: a day before and a day after")
    require(0 < options.share <= 1, f"--share={options.share} must lie in (0, 1]")
    config, _, _ = parse([f"--config={options.config}", *settings])
    require(config.data.holds_out, "data.split=none holds nothing out to measure; leave it out")
    require_comparable(config, "experiments.benchmark daily")
    require(config.data.where is None, f"data.where={config.data.where}: the days are cut by it; leave it out")
    return options, config


def _trained(config: ExperimentConfig, log: InteractionLog, folder: pathlib.Path) -> tuple[dict[str, Any], list[dict]]:
    with only_writer(folder):
        results = train(config, log, folder)
    return results, [line for line in read_metrics(folder) if line["kind"] == "valid"]


def _seconds_until(epochs: list[dict[str, Any]], monitor: str, value: float) -> float | None:
    """Returns the training seconds until validation first reaches a value; None if it never does.

    An epoch counts with the median of all, for the first one also compiles.
    """
    reached = [number for number, line in enumerate(epochs, 1) if round(line[monitor], 4) >= round(value, 4)]
    return reached[0] * _seconds_per_epoch(epochs) if reached else None


def _seconds_per_epoch(epochs: list[dict[str, Any]]) -> float:
    return statistics.median(line["train_seconds"] for line in epochs)


def _warm_settings(config: ExperimentConfig, epochs: int, options: argparse.Namespace, run: pathlib.Path) -> Any:
    changes = {
        "init_from": str(run),
        "epochs": max(1, int(epochs * options.share)),
        "warmup_steps": 0,
        "learning_rate": config.train.learning_rate * options.rate,
    }
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Trains both on every day.

    Returns:
      The record, and a table of the days.
    """
    own, config = _parse(rest)
    monitor, whole = config.eval.monitor, load_log(config.data)
    cuts = np.quantile(whole.timestamps, [day / own.days for day in range(1, own.days)], method="higher")
    days: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = own.runs or pathlib.Path(temporary)
        before = None
        for day in range(1, own.days + 1):
            data = config.data
            if day < own.days:
                data = dataclasses.replace(data, where=f"time<{int(cuts[day - 1])}")
            log, of_day = load_log(data), dataclasses.replace(config, data=data)
            cold, epochs = _trained(of_day, log, folder / f"day{day}_cold")
            best = cold["valid"][monitor]
            found = {"day": day, "users": log.num_users, "items": log.num_items, "events": log.num_rows}
            found["cold"] = {
                "seconds": len(epochs) * _seconds_per_epoch(epochs),
                "epochs": cold["epochs"],
                "best_epoch": cold["best_epoch"],
                "valid": best,
                "test": cold["test"][monitor],
            }
            if before is not None:
                warm_config = _warm_settings(of_day, cold["epochs"], own, before)
                warm, warm_epochs = _trained(warm_config, log, folder / f"day{day}_warm")
                found["warm"] = {
                    "seconds": _seconds_until(warm_epochs, monitor, best),
                    "seconds_of_all_epochs": len(warm_epochs) * _seconds_per_epoch(warm_epochs),
                    "epochs": warm["epochs"],
                    "valid": warm["valid"][monitor],
                    "test": warm["test"][monitor],
                    "init_from": warm["init_from"] | {"run": before.name},
                }
            before = folder / (f"day{day}_warm" if before is not None else f"day{day}_cold")
            days.append(found)
    record = {
        "environment": environment(whole.fingerprint, command=sys.orig_argv),
        "config": settings_without_folders(config),
        "share": own.share,
        "rate": own.rate,
        "monitor": monitor,
        "days": days,
    }
    return record, _table(days, monitor)


def _table(days: list[dict[str, Any]], monitor: str) -> Table:
    rows = []
    for day in days:
        for name in ("cold", "warm"):
            if (one := day.get(name)) is not None:
                seconds = one["seconds_of_all_epochs"] if name == "warm" else one["seconds"]
                reached = "" if name == "cold" else "no" if one["seconds"] is None else f"{one['seconds']:.1f}"
                numbers = f"{seconds:.1f}", f"{one['valid']:.4f}", reached, f"{one['test']:.4f}"
                rows.append((f"{day['day']}, {name}", f"{day['events']:,}", *numbers))
    header = ("day", "events", "seconds", f"valid {monitor}", "seconds to the cold one's", f"test {monitor}")
    return table(header, rows, title="each day's model from initial values, and from yesterday's parameters")
