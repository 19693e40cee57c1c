"""SASRec and HSTU of RecTools and SASRec of RecBole on our split, ranked and measured by our code: outside anchors.

    python -m experiments.benchmarks.outside_anchors --config=ml100k_sasrec --data.path=ml-100k.inter \
        --anchor=rectools_sasrec --python=anchors/bin/python --output=experiments/results/outside_anchors_ml100k.json

Each library trains in an environment of its own (experiments/README.md has the pip lines) on the events before a user's
last two, stops and chooses the epoch by ndcg@10 on the last but one, and scores the whole catalogue after all but the
last, which is the target. Nothing is chosen on the test part. An item that a library does not know, having met it in no
training event, stands behind all others. Settings are the libraries' own but for width, layers, epochs and patience.
HSTU of RecTools reads the time of the target, as its authors do: the time at which one asks.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import cli
from experiments.configs import load_config
from tim4rec_jax.checks import require
from tim4rec_jax.config import DataConfig, EvalConfig
from tim4rec_jax.data.interactions import InteractionLog, load_log
from tim4rec_jax.data.splits import Examples, gather_windows, leave_one_out
from tim4rec_jax.evaluation.measures import metrics_of_ranks
from tim4rec_jax.evaluation.metrics import ahead_among, rank_of_target
from tim4rec_jax.evaluation.seen_targets import (
    ALL_ITEMS,
    SEEN_EXCLUDED,
    TITLES,
    Protocol,
    first_rows,
    measured,
    new_items,
)
from tim4rec_jax.json_files import read_object
from tim4rec_jax.run_dir import environment

# Users that are ranked at once.
_ROWS = 256


@dataclass(frozen=True)
class Arguments:
    """Trains another library's model and measures it as ours are.

    Attributes:
      data, eval: settings, each an option by its path; they start from the named experiment.
      config: the experiment's name.
      anchor: which model of which library.
      python: an interpreter that has the library.
      output: JSON file; what it holds of other anchors stays.
      d_model: width.
      num_layers: layers.
      epochs: at most.
      patience: epochs without a better validation until it stops.
      seed: of the library's random numbers.
    """

    data: DataConfig
    eval: EvalConfig
    config: str
    anchor: Literal["rectools_sasrec", "rectools_hstu", "recbole_sasrec"]
    python: pathlib.Path
    output: pathlib.Path
    d_model: int = 64
    num_layers: int = 2
    epochs: int = 100
    patience: int = 10
    seed: int = 2020


def ranks_of_scores(log: InteractionLog, examples: Examples, scores: np.ndarray) -> dict[Protocol, np.ndarray]:
    """Ranks each example's target by the library's rule under either protocol, [n] float32.

    Args:
      log: the cleaned log.
      examples: what is predicted.
      scores: float32 [n, v]; -inf is behind everything.

    Raises:
      ValueError: a score is NaN.
    """
    require(not np.isnan(scores).any(), f"{np.count_nonzero(np.isnan(scores))} scores are NaN")
    unrepeated = new_items(log, first_rows(log))
    targets, found = examples.targets(log), []
    for first in range(0, len(targets), _ROWS):
        some = slice(first, first + _ROWS)
        users, ends = examples.users[some], examples.ends[some]
        seen = gather_windows(unrepeated, log.timestamps, log.offsets, users, ends, int(ends.max())).items
        rows = jnp.asarray(scores[some]), jnp.asarray(targets[some])
        ranks = rank_of_target(*rows)
        found.append((ranks, ranks - ahead_among(*rows, jnp.asarray(seen))))
    return {
        name: np.concatenate([np.asarray(of[place]) for of in found])
        for place, name in enumerate((ALL_ITEMS, SEEN_EXCLUDED))
    }


def of_library(
    python: pathlib.Path, log: InteractionLog, folder: pathlib.Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """Lets a library work in its own environment and returns what it says of itself.

    Args:
      python: an interpreter that has the library.
      log: the cleaned log.
      folder: an empty folder; what the library writes lies there.
      settings: as `outside_models` reads them.

    Raises:
      ValueError: the library fails.
    """
    (folder / "settings.json").write_text(json.dumps(settings))
    columns = {"items": log.items, "timestamps": log.timestamps, "offsets": log.offsets, "num_items": log.num_items}
    np.savez(folder / "log.npz", **columns)
    program = pathlib.Path(__file__).with_name("outside_models.py")
    command = [python.absolute(), program, folder]
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    complaint = "".join(done.stderr.strip().splitlines()[-1:])
    require(done.returncode == 0, f"{settings['anchor']} with {python}: {complaint}")
    return json.loads((folder / "about.json").read_text())


def evidence(arguments: Arguments) -> dict[str, Any]:
    """Trains and measures; returns the record.

    Raises:
      ValueError: the log is not split by leaving one out, or the library fails.
    """
    data, evaluation = arguments.data, arguments.eval
    require(data.split == "leave_one_out", f"data.split={data.split}: the libraries train on leave_one_out here")
    log = load_log(data)
    test = leave_one_out(log).test
    require(
        len(test) == log.num_users, f"{log.num_users - len(test)} users have fewer than 3 events; set data.k_core=3"
    )
    names = ("anchor", "d_model", "num_layers", "epochs", "patience", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve()
        about = of_library(arguments.python, log, folder, settings)
        scores = np.load(folder / "scores.npy")
    ranks, parts = ranks_of_scores(log, test, scores), measured(log, test, evaluation)
    config = load_config(arguments.config)
    protocols = {name: part.protocol(config) for name, part in parts.items()}
    metrics = {
        name: metrics_of_ranks(ranks[name][part.kept], evaluation.measures, part.lists) for name, part in parts.items()
    }
    return {
        "environment": environment(log.fingerprint, command=cli.command_without_folders(sys.orig_argv)),
        "log": {"name": data.name, "users": log.num_users, "items": log.num_items, "rows": log.num_rows},
        "seed": arguments.seed,
        "library": about,
        "unknown_targets": int(np.count_nonzero(np.isneginf(scores[np.arange(len(test)), test.targets(log)]))),
        "protocols": protocols,
        **parts[ALL_ITEMS].report(),
        "test": metrics[ALL_ITEMS],
        "test_seen_excluded": metrics[SEEN_EXCLUDED],
    }


@cli.program
def main(argv: Sequence[str]) -> int:
    """Adds one anchor to the record."""
    name = cli.peek(argv, "--config")
    require(name is not None, "give --config, as in --config=ml100k_sasrec: the experiment whose log is measured")
    base = load_config(str(name))
    missing = [option for option in ("--anchor", "--python", "--output") if not cli.has_option(argv, option)]
    require(not missing, f"give {', '.join(missing)}")
    default = Arguments(base.data, base.eval, base.name, "rectools_sasrec", pathlib.Path(), pathlib.Path())
    arguments = cli.parse_settings(Arguments, argv, default, prog="experiments.benchmarks.outside_anchors")
    record = evidence(arguments)
    known = read_object(arguments.output) if arguments.output.exists() else {}
    cli.write_json(arguments.output, known | {arguments.anchor: record})
    both = {TITLES[ALL_ITEMS]: record["test"], TITLES[SEEN_EXCLUDED]: record["test_seen_excluded"]}
    rows = [(metric, *(f"{of[metric]:.4f}" for of in both.values())) for metric in record["test"]]
    Console().print(cli.table(("metric", *both), rows, title=f"{arguments.anchor} on {arguments.data.name}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
