"""What needs no training, popularity and a first-order Markov chain over items, on the log of a named experiment."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from experiments.cli import (
    command_without_folders,
    parse_settings,
    peek,
    settings_without_folders,
    table,
    write_json,
)
from experiments.configs import load_config
from tim4rec_jax.checks import require
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig
from tim4rec_jax.data.interactions import load_log, with_precision
from tim4rec_jax.data.splits import require_held_out, split_log
from tim4rec_jax.evaluation.baselines import baseline_ranks
from tim4rec_jax.evaluation.measures import metrics_of_ranks
from tim4rec_jax.evaluation.metrics import check_top_k
from tim4rec_jax.evaluation.seen_targets import measured
from tim4rec_jax.run_dir import environment


@dataclass(frozen=True)
class Arguments:
    """Measures popularity and a Markov chain by full ranking; `data` and `eval` start from the named experiment.

    Attributes:
      data, eval: settings, each an option by its path.
      config: the experiment's name.
      baselines: measure these instead of a run.
      output: JSON file to write the numbers to, by the name of the data; what it holds of other data stays.
    """

    data: DataConfig
    eval: EvalConfig
    config: str
    baselines: bool = False
    output: pathlib.Path | None = None


def _evidence(config: ExperimentConfig) -> dict[str, Any]:
    require_held_out(config.data, "--baselines")
    log = load_log(config.data)
    check_top_k(config.eval.top_k, log.num_items, "eval.top_k")
    config = dataclasses.replace(config, data=with_precision(config.data, log))
    split = split_log(log, config.data)
    part = measured(log, split.test, config.eval)
    ranks = baseline_ranks(log, split.first_held_out, part.examples, exclude_seen=config.eval.exclude_seen)
    return {
        "environment": environment(log.fingerprint, command=command_without_folders(sys.orig_argv)),
        "data": settings_without_folders(config)["data"],
        "log": {"users": log.num_users, "items": log.num_items, "rows": log.num_rows},
        "protocol": part.protocol(config) + "; the rank of a target among equal scores is the mean over their orders",
        **part.report(),
        "targets": len(part.examples.users),
        "metrics": {name: metrics_of_ranks(of_one, config.eval.measures, part.lists) for name, of_one in ranks.items()},
    }


def _write(output: pathlib.Path, name: str, record: dict[str, Any]) -> None:
    try:
        records = json.loads(output.read_bytes())
        ours = isinstance(records, dict) and all(isinstance(one, dict) and "metrics" in one for one in records.values())
    except FileNotFoundError:
        records, ours = {}, True
    except (ValueError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{output} holds something else than baselines; choose another file for --output")
    write_json(output, records | {name: record})


def measure(argv: Sequence[str]) -> Table:
    """Measures as the command line asks; returns a row of metrics per baseline.

    Raises:
      FileNotFoundError, ValueError: the log cannot be read, or the options do not fit.
    """
    name = peek(argv, "--config")
    require(name is not None, "give --config, as in --config=ml100k_sasrec: the experiment whose log is measured")
    base = load_config(name)
    arguments = parse_settings(
        Arguments, argv, Arguments(base.data, base.eval, base.name), prog="experiments.evaluate --baselines"
    )
    if not arguments.baselines:
        raise ValueError("--baselines=false measures nothing; leave it out and give --run to measure a run")
    record = _evidence(dataclasses.replace(base, data=arguments.data, eval=arguments.eval))
    if arguments.output is not None:
        _write(arguments.output, arguments.data.name, record)
    metrics = record["metrics"]
    rows = [(one, *(f"{of[one]:.4f}" for of in metrics.values())) for one in next(iter(metrics.values()))]
    title = f"{arguments.data.name}: {record['targets']:,} targets"
    return table(("metric", *metrics), rows, title=title, caption=record["protocol"])
