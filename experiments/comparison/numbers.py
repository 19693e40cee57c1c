"""The numbers of a comparison, from its run folders alone: spread over seeds, significance over users, costs."""

import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.cli import command_without_folders, settings_without_folders, without_folders
from experiments.comparison.plan import Plan
from experiments.comparison.published import PUBLISHED
from experiments.runs import is_finished
from tim4rec_jax.config import EvalConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.evaluation.baselines import baseline_ranks
from tim4rec_jax.evaluation.measures import (
    RankedLists,
    list_length,
    metrics_of_ranks,
    values_per_list,
)
from tim4rec_jax.evaluation.seen_targets import (
    ALL_ITEMS,
    PROTOCOLS,
    SEEN_EXCLUDED,
    Measured,
    Protocol,
    by_protocol,
    main_protocol,
    measured,
    other_protocol,
)
from tim4rec_jax.evaluation.significance import by_user, compare_with_best
from tim4rec_jax.run_dir import read_environment, read_results, read_test_ranks
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.stored_run import load_log

_RUN_FACTS = (
    "git_commit",
    "git_dirty",
    "backend",
    "device_kind",
    "device_count",
    "cpu_count",
    "cpus_allowed",
    "start_utc",
)
_RUN_RESULTS = (
    "seed",
    "test",
    "valid",
    *(f"{part}_{protocol}" for part in ("test", "valid") for protocol in PROTOCOLS),
    "best_epoch",
    "epochs",
    "steps",
    "parameters",
    "seconds_per_epoch",
    "peak_resident_bytes",
    "peak_device_bytes",
)
_VERSIONS = ("tim4rec_jax", "jax", "jaxlib", "flax", "optax", "orbax", "python", "platform")


def _run(folder: pathlib.Path) -> dict[str, Any]:
    """What one finished run says of itself."""
    results, environment = read_results(folder), read_environment(folder)
    epochs = [line for line in read_metrics(folder) if line["kind"] == "valid"]
    return (
        {name: results[name] for name in _RUN_RESULTS if name in results}
        | {f"{part}_seconds": sum(epoch[f"{part}_seconds"] for epoch in epochs) for part in ("train", "valid")}
        | {name: environment.get(name) for name in _RUN_FACTS}
        | {"versions": {name: environment.get(name) for name in _VERSIONS}}
        | {"command": command_without_folders(environment["command"])}
    )


def _ranks(
    folder: pathlib.Path, log: InteractionLog, part: Measured, evaluation: EvalConfig, of_ranks: Sequence[str]
) -> np.ndarray:
    """Reads the test ranks [targets] of a run under a part's protocol in the order of the log.

    Raises:
      ValueError: they are of other users, or do not give the metrics that the run recorded.
    """
    name = part.protocol_name
    frame = read_test_ranks(folder, None if name == main_protocol(evaluation) else name)
    if not frame["user_id"].equals(log.user_ids[part.examples.users]):
        raise ValueError(f"{folder}: the test ranks are not of the log's users; remove the run and train it again")
    ranks = frame["rank"].to_numpy()
    recorded = by_protocol(read_results(folder), "test", evaluation)[name]
    for name, value in metrics_of_ranks(ranks, of_ranks, part.lists).items():
        if abs(recorded[name] - value) > 1e-9:
            raise ValueError(
                f"{folder}: the test ranks give {name} {value}, results.json says {recorded[name]}; "
                "remove the run and train it again"
            )
    return ranks


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (None for one seed), and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "per_seed": list(values)}


def _against_best(ranks: Mapping[str, np.ndarray], part: Measured, best: str, metric: str) -> dict[str, dict[str, Any]]:
    """Differences of one metric to the best row, each list's metric averaged over seeds."""

    def of_row(row: np.ndarray) -> np.ndarray:
        lists = [RankedLists(of_seed, part.lists) for of_seed in row]
        return np.mean([values_per_list(one, [metric])[metric] for one in lists], axis=0)

    values = np.stack([of_row(row) for row in ranks.values()])
    users = part.examples.users[RankedLists(part.examples.users, part.lists).starts]
    found = compare_with_best(by_user(values, users), best=list(ranks).index(best))
    return {
        row: {
            "behind_by": float(found.difference[i]),
            "interval_95": [float(end) for end in found.interval[i]],
            "p": float(found.p[i]),
            "p_holm": float(found.p_holm[i]),
        }
        for i, row in enumerate(ranks)
        if row != best
    }


def _of_protocol(
    ranks: Mapping[str, np.ndarray],
    part: Measured,
    metrics: Sequence[str],
    others: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    """What one protocol found: the best row of each metric, and of each row its spreads and distances to the best.

    Args:
      ranks: [seeds, targets] of each row.
      part: what was ranked.
      metrics: names of those that follow from ranks.
      others: further metrics of rows, one value per seed.
    """
    per_seed = {row: [metrics_of_ranks(one, metrics, part.lists) for one in values] for row, values in ranks.items()}
    spreads = {row: {m: _spread([one[m] for one in values]) for m in metrics} for row, values in per_seed.items()}
    best = {metric: max(spreads, key=lambda row: spreads[row][metric]["mean"]) for metric in metrics}
    against = {metric: _against_best(ranks, part, best[metric], metric) for metric in metrics}
    rows = {
        row: {
            "name": row,
            "metrics": spreads[row] | {m: _spread(values) for m, values in others.get(row, {}).items()},
            "against_best": {metric: against[metric].get(row) for metric in metrics},
        }
        for row in ranks
    }
    return {"best": best, "rows": rows}


def both_protocols(numbers: Mapping[str, Any]) -> dict[Protocol, Mapping[str, Any]]:
    """Returns protocol, best and rows of `collect` under either protocol, all items first; what is there of them."""
    main = numbers.get("main_protocol", SEEN_EXCLUDED if "seen items excluded" in numbers["protocol"] else ALL_ITEMS)
    return {name: numbers if name == main else numbers[name] for name in PROTOCOLS if name == main or name in numbers}


def protocols_told(numbers: Mapping[str, Any]) -> str:
    """Says how the lists were ranked that a table of `collect` shows."""
    return "; beside that, ".join(found["protocol"] for found in both_protocols(numbers).values())


def significance_level(row: Mapping[str, Any], metric: str) -> int:
    """Returns how clearly a row of `collect` lies behind the best: 2 for p < 0.001, 1 for p < 0.05, else 0."""
    against = row["against_best"].get(metric)
    return 0 if against is None else sum(against["p_holm"] < limit for limit in (0.05, 0.001))


def _about(log: InteractionLog, name: str) -> dict[str, Any]:
    sizes = {"users": log.num_users, "items": log.num_items, "rows": log.num_rows}
    return {"name": name} | sizes | {"fingerprint": log.fingerprint}


def _settings(plan: Plan) -> dict[str, Any]:
    """Settings of every model, without folders of the machine and the seed."""
    settings = {model: settings_without_folders(config) for model, config in plan.configs.items()}
    for values in settings.values():
        values["train"].pop("seed")
    overrides = {path: without_folders(v) if isinstance(v, str) else v for path, v in plan.overrides.items()}
    return {"given": overrides, "differ_by_model": plan.own, "by_model": settings}


def _finished(plan: Plan) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """Returns the seeds of each model that are trained, and the runs that are not.

    Raises:
      FileNotFoundError: none is.
    """
    finished: dict[str, list[int]] = {}
    missing = []
    for m, s in plan.runs_in_order():
        if is_finished(plan.folder(m, s)):
            finished.setdefault(m, []).append(s)
        else:
            missing.append({"model": m, "seed": s})
    if not finished:
        raise FileNotFoundError(f"no run of this comparison is finished in {plan.runs}; leave out --report-only")
    return finished, missing


def collect(plan: Plan, note: str) -> dict[str, Any]:
    """Gathers all numbers of the finished runs, ready for JSON; rows are ordered by the plan's metric, best first.

    Raises:
      FileNotFoundError: no run is finished.
      ValueError: a run's files do not belong together.
    """
    finished, missing = _finished(plan)
    first = next(iter(plan.configs.values()))
    evaluation, data = first.eval, first.data
    folders = {m: [plan.folder(m, seed) for seed in seeds] for m, seeds in finished.items()}
    log = load_log(next(iter(folders.values()))[0])
    split = split_log(log, data)
    parts = measured(log, split.test, evaluation)
    runs = {m: [_run(folder) for folder in of_model] for m, of_model in folders.items()}
    counted, knn = baseline_ranks(log, split, parts[ALL_ITEMS].examples, evaluation)
    metrics = [name for name in evaluation.measures if not list_length([name])]
    main, other = main_protocol(evaluation), other_protocol(evaluation)
    # Runs of earlier versions were measured under one protocol.
    with_one = sorted(
        m for m, of_model in runs.items() if any(other not in by_protocol(run, "test", evaluation) for run in of_model)
    )
    found = {}
    for name in [main] if with_one or other not in parts else [main, other]:
        part = parts[name]
        ranks = {
            m: np.stack([_ranks(folder, log, part, evaluation, metrics) for folder in of_model])
            for m, of_model in folders.items()
        } | {row: own[name][part.kept][None] for row, own in counted.items()}
        # What reads lists is of the runs' own results: the baselines have ranks alone, and no test is made of it.
        tested = {m: [by_protocol(run, "test", evaluation)[name] for run in of_model] for m, of_model in runs.items()}
        asked = [metric for metric in evaluation.measures if metric not in metrics]
        others = {m: {metric: [one[metric] for one in of_model] for metric in asked} for m, of_model in tested.items()}
        found[name] = _of_protocol(ranks, part, metrics, others)
    # Equals stay in the order of the plan.
    rows = found[main]["rows"]
    order = sorted(rows, key=lambda row: -rows[row]["metrics"][plan.metric]["mean"])
    published = PUBLISHED.get(data.name, []) if data.split == "leave_one_out" else []
    every = [run for of_model in runs.values() for run in of_model]
    return {
        "note": note,
        "command": command_without_folders(sys.orig_argv),
        "data": _about(log, data.name),
        "protocol": parts[main].protocol(first),
        **parts[main].report(),
        "metric": plan.metric,
        "seeds": list(plan.seeds),
        "missing": missing,
        "commits": sorted({run["git_commit"] or "unknown" for run in every}),
        "git_dirty": any(run["git_dirty"] for run in every),
        "wall_seconds": sum(run["train_seconds"] + run["valid_seconds"] for run in every),
        "settings": _settings(plan),
        "best": found[main]["best"],
        "rows": [
            {"name": row, "trained": row in runs, "seeds": finished.get(row, [])}
            | rows[row]
            | {"runs": runs.get(row, [])}
            for row in order
        ],
        "main_protocol": main,
        **knn.report(),
        "measured_under_one_protocol": with_one,
        # The same rows under the other protocol, if all were measured under it.
        **{
            name: {"protocol": parts[name].protocol(first), **of_one, "rows": [of_one["rows"][row] for row in order]}
            for name, of_one in found.items()
            if name != main
        },
        "published": [{"model": row.model, "metrics": row.metrics, "source": row.source} for row in published],
    }
