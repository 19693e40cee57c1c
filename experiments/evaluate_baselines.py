"""What needs no training, popularity and a first-order Markov chain over items, on the log of a named experiment."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from experiments.cli import OptionParser, parse_settings
from experiments.configs import load_config
from experiments.record import command_without_folders, settings_without_folders
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig
from tim4rec_jax.data.interactions import load_log, with_precision
from tim4rec_jax.data.splits import describe, split_log
from tim4rec_jax.evaluation.baselines import baseline_ranks
from tim4rec_jax.evaluation.metrics import check_top_k, summarise
from tim4rec_jax.evaluation.seen_targets import describe_seen, measured
from tim4rec_jax.files import write_atomically
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


def is_asked_for(argv: Sequence[str]) -> bool:
    """Tells whether a command line measures baselines."""
    return any(argument.partition("=")[0] == "--baselines" for argument in argv)


def _evidence(config: ExperimentConfig) -> dict[str, Any]:
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
        "protocol": f"full ranking of the test part, {describe(config.data)}, seen items "
        + describe_seen(config.eval, part.report().get("seen_target_share"))
        + "; the rank of a target among equal scores is the mean over their orders",
        **part.report(),
        "targets": len(part.examples.users),
        "metrics": {name: summarise(of_one, config.eval.top_k) for name, of_one in ranks.items()},
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
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, (json.dumps(records | {name: record}, indent=1) + "\n").encode())


def measure(argv: Sequence[str]) -> Table:
    """Measures as the command line asks; returns a row of metrics per baseline.

    Raises:
      FileNotFoundError, ValueError: the log cannot be read, or the options do not fit.
    """
    finder = OptionParser(add_help=False)
    finder.add_argument("--config", required=True)
    base = load_config(finder.parse_known_args(argv)[0].config)
    arguments = parse_settings(
        Arguments, argv, Arguments(base.data, base.eval, base.name), prog="experiments.evaluate --baselines"
    )
    if not arguments.baselines:
        raise ValueError("--baselines=false measures nothing; leave it out and give --run to measure a run")
    record = _evidence(dataclasses.replace(base, data=arguments.data, eval=arguments.eval))
    if arguments.output is not None:
        _write(arguments.output, arguments.data.name, record)
    table = Table(title=f"{arguments.data.name}: {record['targets']:,} targets", caption=record["protocol"])
    table.add_column("metric")
    for name in record["metrics"]:
        table.add_column(name, justify="right")
    for metric in next(iter(record["metrics"].values())):
        table.add_row(metric, *(f"{of_one[metric]:.4f}" for of_one in record["metrics"].values()))
    return table
