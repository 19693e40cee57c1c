"""What needs no training on the log of a named experiment: popularity, a first-order Markov chain and item-kNN."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
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
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, PROTOCOLS, TITLES, Measured, main_protocol, measured
from tim4rec_jax.run_dir import environment


@dataclass(frozen=True)
class Arguments:
    """Measures popularity, a Markov chain and item-kNN by full ranking; `data`, `eval` start from the named experiment.

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
    parts = measured(log, split.test, config.eval)
    ranks, knn = baseline_ranks(log, split, parts[ALL_ITEMS].examples, config.eval)

    def of_protocol(part: Measured) -> dict[str, Any]:
        names, kept, lists = config.eval.measures, part.kept, part.lists
        found = {name: metrics_of_ranks(own[part.protocol_name][kept], names, lists) for name, own in ranks.items()}
        how = part.protocol(config) + "; the rank of a target among equal scores is the mean over their orders"
        return {"protocol": how, "targets": len(part.examples), "metrics": found}

    main, *others = parts.values()
    return {
        "environment": environment(log.fingerprint, command=command_without_folders(sys.orig_argv)),
        "data": settings_without_folders(config)["data"],
        "log": {"users": log.num_users, "items": log.num_items, "rows": log.num_rows},
        **main.report(),
        **knn.report(),
        **of_protocol(main),
        **{part.protocol_name: of_protocol(part) for part in others},
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


def _grid(record: dict[str, Any], name: str) -> Table:
    """Returns what item-kNN was chosen from."""
    found = record["item_knn"]
    metric = next(key for key in found["valid"][0] if "@" in key)
    rows = [(f"{one['k']}", f"{one['shrinkage']:g}", f"{one[metric]:.4f}") for one in found["valid"]]
    caption = f"chosen: k {found['k']}, shrinkage {found['shrinkage']:g}"
    return table(("k", "shrinkage", metric), rows, title=f"{name}: item-kNN on the validation part", caption=caption)


def measure(argv: Sequence[str]) -> Group:
    """Measures as the command line asks; returns the grid of item-kNN, and the metrics of every baseline.

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
    both = {main_protocol(arguments.eval): record} | {name: record[name] for name in PROTOCOLS if name in record}
    both = {name: both[name] for name in PROTOCOLS if name in both}
    rows = [
        (metric, TITLES[name], *(f"{of[metric]:.4f}" for of in found["metrics"].values()))
        for metric in record["metrics"]["popularity"]
        for name, found in both.items()
    ]
    title = f"{arguments.data.name}: {next(iter(both.values()))['targets']:,} targets"
    caption = "\n".join(f"{TITLES[name]}: {found['protocol']}" for name, found in both.items())
    found = table(("metric", "ranked", *record["metrics"]), rows, title=title, caption=caption, left=(0, 1))
    return Group(_grid(record, arguments.data.name), found)
