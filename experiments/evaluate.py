"""Measures the best model of a run by full ranking, from the run folder alone.

    python -m experiments.evaluate --run=runs/quickstart
    python -m experiments.evaluate --run=runs/quickstart --split=valid
    python -m experiments.evaluate --run=runs/ml1m_tim4rec_causal --eval.max_len=1000 --output=longer.json
    python -m experiments.evaluate --baselines --config=ml100k_sasrec --output=experiments/results/baselines.json

Ranked are all items, and beside that those that the user's history lacks. The numbers of the test part equal those that
training wrote at its end (results.json), which stand beside them. With
--baselines nothing trained is measured: popularity, a Markov chain and item-kNN on an experiment's log, alike.
"""

import contextlib
import dataclasses
import pathlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments import cli, evaluate_baselines
from tim4rec_jax.config import EvalConfig, ParallelConfig
from tim4rec_jax.evaluation.full_sort import EvaluationResult
from tim4rec_jax.evaluation.seen_targets import TITLES, Protocol, by_protocol
from tim4rec_jax.run_dir import environment, read_config, read_environment, read_results, require_no_run_file
from tim4rec_jax.training.stored_run import evaluate_run


@dataclass(frozen=True)
class EvalOptions:
    """What may differ from the run's own evaluation; defaults are the run's.

    Attributes:
      batch_size: users scored at once.
      top_k: list lengths k of hit@k, ndcg@k and mrr@k.
      metrics: further ones, as in recall@10,precision@10,map@10,coverage@20,novelty@10,diversity@10 or of your own.
      module: imported first, for it registers metrics of your own.
      lists: "target", a list before each target; or "user", one list per user for all its targets of the part.
      users: table with a column user_id and others, for `groups`.
      groups: column of that table; users are also measured by its values.
      time_buckets: day, week, month or quantiles:4; targets are also measured by their time.
      exclude_seen: what the output file calls "metrics" is the ranking without items of the user's own history; either
        way the other stands beside it.
      seen_targets: seen items excluded, "leave_out" targets that their user has had before, or "rank" them as if new.
      max_len: events of a history that are read; None is the model's max_len. More than that needs a causal
        state-space model.
    """

    batch_size: int
    top_k: tuple[int, ...]
    metrics: tuple[str, ...]
    module: str | None
    lists: Literal["target", "user"]
    users: str | None
    groups: str | None
    time_buckets: str | None
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


def parse(argv: list[str]) -> Arguments:
    """Reads the command line; the run's own settings are the defaults.

    Raises:
      FileNotFoundError, ValueError: the folder is no run that this program reads.
    """
    run = cli.peek(argv, "--run")
    stored = EvalConfig() if run is None else read_config(pathlib.Path(run)).eval
    options = EvalOptions(**{field.name: getattr(stored, field.name) for field in dataclasses.fields(EvalOptions)})
    default = Arguments(tyro.MISSING if run is None else pathlib.Path(run), options)
    return cli.parse_settings(Arguments, argv, default, prog="experiments.evaluate")


def recorded_metrics(arguments: Arguments) -> dict[Protocol, dict[str, float]]:
    """The numbers training wrote for the same measurements; empty where there are none to compare with."""
    stored, asked = read_config(arguments.run).eval, arguments.eval
    alike = all(getattr(asked, name) == getattr(stored, name) for name in ("lists", "seen_targets", "max_len"))
    with contextlib.suppress(FileNotFoundError):
        return by_protocol(read_results(arguments.run), "test", stored) if alike and arguments.split == "test" else {}
    return {}


def evidence(arguments: Arguments) -> dict[str, Any]:
    """What an evaluation is remembered by beside its numbers; folders of the machine are left out."""
    stored, trained = read_config(arguments.run), read_environment(arguments.run)
    about = environment(trained["data_fingerprint"], command=cli.command_without_folders(sys.orig_argv))
    run = {"name": stored.name, "seed": stored.train.seed, "max_len": stored.model.max_len}
    run |= {"git_commit": trained["git_commit"]}
    asked = dataclasses.asdict(arguments.eval)
    asked |= {"users": asked["users"] and cli.without_folders(asked["users"])}
    return {"environment": about, "run": run, "split": arguments.split, "eval": asked}


def record(result: EvaluationResult) -> dict[str, Any]:
    """What the output file says of one protocol."""
    numbers = {"users": len(result.ranks), **result.measured.report(), "metrics": result.metrics}
    numbers |= {"standard_errors": result.standard_errors or None}
    return numbers | ({"parts": result.parts} if result.parts else {})


def parts_table(name: str, parts: dict[str, dict[str, float]]) -> Table:
    """Returns the metrics of parts of the lists, a row per part."""
    measures = [metric for metric in next(iter(parts.values())) if metric != "lists"]
    rows = [
        (part, f"{of['lists']:,}", *(f"{of[metric]:.4f}" for metric in measures)) for part, of in sorted(parts.items())
    ]
    return cli.table((name, "lists", *measures), rows, title=f"by {name}")


@cli.program
def main(argv: list[str]) -> int:
    """Measures a run, or baselines."""
    if cli.has_option(argv, "--baselines"):
        Console().print(evaluate_baselines.measure(argv))
        return 0
    arguments = parse(argv)
    if arguments.output is not None:
        require_no_run_file(arguments.output)
    asked = arguments.eval
    settings = EvalConfig(**dataclasses.asdict(asked), monitor=f"ndcg@{asked.top_k[0]}")
    result = evaluate_run(arguments.run, settings, split=arguments.split, report=cli.note)
    if arguments.output is not None:
        numbers = record(result)
        if result.other is not None:
            numbers |= {result.other.measured.protocol_name: record(result.other)}
        cli.write_json(arguments.output, evidence(arguments) | numbers | {"seconds": result.seconds})
    config = dataclasses.replace(read_config(arguments.run), eval=settings, parallel=ParallelConfig())
    recorded, both, rows = recorded_metrics(arguments), result.by_protocol, []
    for name in result.metrics:
        for protocol, one in both.items():
            columns = one.metrics, one.standard_errors, recorded.get(protocol, {})
            rows.append((name, TITLES[protocol], *(f"{of[name]:.4f}" if name in of else "–" for of in columns)))
    captions = [f"{TITLES[p]}: {one.measured.protocol(config, arguments.split)}" for p, one in both.items()]
    title = f"{arguments.run} · {arguments.split} · {result.measured.total:,} targets · {result.seconds:.1f} s"
    caption = f"{'; '.join(captions)}; padding excluded; equals share their mean rank"
    header = ("metric", "ranked", "value", "standard error", "results.json")
    Console().print(cli.table(header, rows, title=title, caption=caption, left=(0, 1)))
    for protocol, one in both.items():
        for name, parts in one.parts.items():
            Console().print(parts_table(f"{name}, {TITLES[protocol]}", parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
