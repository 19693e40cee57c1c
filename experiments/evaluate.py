"""Measures the best model of a run by full ranking, from the run folder alone.

    python -m experiments.evaluate --run=runs/quickstart
    python -m experiments.evaluate --run=runs/quickstart --split=valid --eval.exclude_seen
    python -m experiments.evaluate --run=runs/ml1m_tim4rec_causal --eval.max_len=1000 --output=longer.json
    python -m experiments.evaluate --baselines --config=ml100k_sasrec --output=experiments/results/baselines.json

The numbers of the test part equal those that training printed at its end (results.json), which stand beside them. With
--baselines nothing trained is measured: popularity and a Markov chain on an experiment's log, in the same way.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments import evaluate_baselines
from experiments.cli import OptionParser, parse_settings, run_program
from experiments.record import command_without_folders
from tim4rec_jax.config import EvalConfig
from tim4rec_jax.data.splits import describe, split_log
from tim4rec_jax.evaluation.full_sort import EvaluationResult, evaluate
from tim4rec_jax.evaluation.metrics import standard_errors
from tim4rec_jax.evaluation.seen_targets import describe_seen
from tim4rec_jax.files import write_atomically
from tim4rec_jax.run_dir import environment, read_config, read_environment, read_results, require_no_run_file
from tim4rec_jax.serving.stored_run import load_log, load_model


@dataclass(frozen=True)
class EvalOptions:
    """What may differ from the run's own evaluation; defaults are the run's.

    Attributes:
      batch_size: users scored at once.
      top_k: list lengths k of hit@k, ndcg@k and mrr@k.
      exclude_seen: leave items of the user's own history out of the ranking (never compare such numbers with others).
      seen_targets: with exclude_seen, "leave_out" the targets that their user has had before, or "rank" them as if new.
      max_len: events of a history that are read; None is the model's max_len. More than that needs a causal
        state-space model.
    """

    batch_size: int
    top_k: tuple[int, ...]
    exclude_seen: bool
    seen_targets: Literal["leave_out", "rank"]
    max_len: int | None


@dataclass(frozen=True)
class Arguments:
    """Measures the best model of a run by full ranking.

    Attributes:
      run: the run folder.
      eval: settings of the ranking.
      split: the part of the log to predict.
      output: JSON file to write the numbers to, with command, versions, device, settings and data fingerprint.
    """

    run: pathlib.Path
    eval: EvalOptions
    split: Literal["test", "valid"] = "test"
    output: pathlib.Path | None = None


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; the run's own settings are the defaults.

    Raises:
      FileNotFoundError, ValueError: the folder is no run that this program reads.
    """
    finder = OptionParser(add_help=False)
    finder.add_argument("--run", type=pathlib.Path)
    run = finder.parse_known_args(argv)[0].run
    stored = EvalConfig() if run is None else read_config(run).eval
    options = EvalOptions(
        stored.batch_size, tuple(stored.top_k), stored.exclude_seen, stored.seen_targets, stored.max_len
    )
    default = Arguments(run=tyro.MISSING if run is None else run, eval=options)
    return parse_settings(Arguments, argv, default, prog="experiments.evaluate")


def recorded_metrics(arguments: Arguments) -> Mapping[str, float]:
    """The numbers training wrote for the same measurement; empty where there are none to compare with."""
    stored = read_config(arguments.run).eval
    asked = arguments.eval
    names = ("exclude_seen", "seen_targets", "max_len")
    if arguments.split != "test" or any(getattr(asked, name) != getattr(stored, name) for name in names):
        return {}
    try:
        return read_results(arguments.run).get("test", {})
    except FileNotFoundError:
        return {}


def report(arguments: Arguments, result: EvaluationResult, recorded: Mapping[str, float]) -> Table:
    """The metrics with their standard errors, beside what training recorded."""
    seen = describe_seen(arguments.eval, result.measured.report().get("seen_target_share"))
    data = read_config(arguments.run).data
    temporal = data.split == "temporal"
    protocol = f"{describe(data)}, " if temporal else ""
    unit = "targets" if temporal and data.temporal_targets == "all" else "users"
    table = Table(
        title=f"{arguments.run} · {arguments.split} · {len(result.ranks):,} {unit} · {result.seconds:.1f} s",
        caption=f"{protocol}full ranking, padding excluded, items already seen {seen}; "
        "ties are read in the target's favour",
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    table.add_column("results.json", justify="right")
    errors = standard_errors(result.ranks, arguments.eval.top_k) if len(result.ranks) > 1 else {}
    for name, value in result.metrics.items():
        error = f"{errors[name]:.4f}" if name in errors else "–"
        table.add_row(name, f"{value:.4f}", error, f"{recorded[name]:.4f}" if name in recorded else "–")
    return table


def run(arguments: Arguments) -> EvaluationResult:
    """Evaluates as asked.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run cannot be read, or the settings do not fit it.
      FloatingPointError: the model's scores are not finite.
    """
    stored = load_model(arguments.run, report=lambda line: print(line, file=sys.stderr))
    log = load_log(arguments.run)
    options = arguments.eval
    settings = EvalConfig(
        batch_size=options.batch_size, top_k=options.top_k, monitor=f"ndcg@{options.top_k[0]}",
        exclude_seen=options.exclude_seen, seen_targets=options.seen_targets, max_len=options.max_len,
    )  # fmt: skip
    examples = getattr(split_log(log, stored.config.data), arguments.split)
    return evaluate(stored.model, stored.params, log, examples, dataclasses.replace(stored.config, eval=settings))


def evidence(arguments: Arguments, result: EvaluationResult) -> dict[str, Any]:
    """What an evaluation is remembered by; folders of the machine are left out."""
    stored, trained = read_config(arguments.run), read_environment(arguments.run)
    command = command_without_folders(sys.orig_argv)
    return {
        "environment": environment(trained["data_fingerprint"], command=command),
        "run": {"name": stored.name, "seed": stored.train.seed, "max_len": stored.model.max_len}
        | {"git_commit": trained["git_commit"]},
        "split": arguments.split,
        "eval": dataclasses.asdict(arguments.eval),
        "users": len(result.ranks),
        **result.measured.report(),
        "metrics": result.metrics,
        "standard_errors": standard_errors(result.ranks, arguments.eval.top_k) if len(result.ranks) > 1 else None,
        "seconds": result.seconds,
    }


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    if evaluate_baselines.is_asked_for(argv):
        Console().print(evaluate_baselines.measure(argv))
        return 0
    arguments = parse(argv)
    if arguments.output is not None:
        require_no_run_file(arguments.output)
    result = run(arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.output, (json.dumps(evidence(arguments, result), indent=1) + "\n").encode())
    Console().print(report(arguments, result, recorded_metrics(arguments)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
