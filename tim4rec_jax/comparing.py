"""Runs side by side in Python: `tim4rec_jax.compare`."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from tim4rec_jax.checks import require, shortened
from tim4rec_jax.config import ExperimentConfig, flat
from tim4rec_jax.evaluation.measures import RankedLists, list_length, metrics_of_ranks, values_per_list
from tim4rec_jax.evaluation.significance import by_user, compare_with_best
from tim4rec_jax.fitting import FittedRun
from tim4rec_jax.notebook import html_table
from tim4rec_jax.run_dir import read_config, read_environment, read_test_ranks

Run = FittedRun | str | pathlib.Path
# Settings in which runs must agree to be measured on the same lists.
_ALIKE = ("eval.lists", "eval.exclude_seen", "eval.seen_targets")
_SPLIT = ("data.split", "data.valid_", "data.test_", "data.temporal_targets")


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Runs side by side, the best first.

    Attributes:
      table: a row per name: name, runs, then of each metric its mean over the runs and, with several of them, its
        deviation (`ndcg@10 ±`), and of `metric` how far the row lies behind the best (behind_by), the 95 % interval of
        that (from, to) and its p-value (p_holm): a paired sign-flip test over users, corrected for the rows.
      metric: by which the rows are ordered and tested.
    """

    table: pl.DataFrame
    metric: str

    @property
    def best(self) -> str:
        """Name of the first row."""
        return self.table["name"][0]

    def _rows(self) -> list[list[str]]:
        shown = self.table.drop("from", "to")
        return [
            [value if isinstance(value, str) else "–" if value is None else f"{value:.4g}" for value in row]
            for row in shown.rows()
        ]

    def _header(self) -> list[str]:
        return self.table.drop("from", "to").columns

    def __repr__(self) -> str:
        lines = [self._header(), *self._rows()]
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([f"Comparison: best by {self.metric}: {self.best}", *(row.rstrip() for row in rows)])

    def _repr_html_(self) -> str:
        below = "p_holm: two-sided paired sign-flip test against the best over users, Holm-corrected"
        return html_table(f"by {self.metric}", self._header(), self._rows(), below)


def compare(runs: Mapping[str, Run | Sequence[Run]], metric: str | None = None) -> Comparison:
    """Puts finished runs side by side that were tested on the same targets.

    Args:
      runs: by the name that the table shows, each a run from `fit`, its folder, or several that differ in their seed.
      metric: that decides, of those that follow from ranks, measured or not; None is eval.monitor of the first run.

    Raises:
      FileNotFoundError: a folder is no run, or not finished.
      ValueError: there are none, they were not tested on the same targets, or the metric is unknown or reads lists.
    """
    folders = {name: _folders(name, given) for name, given in runs.items()}
    require(bool(folders), "compare was given no run; give them by name, as in {'causal': run, 'sasrec': other}")
    configs = {folder: read_config(folder) for of_name in folders.values() for folder in of_name}
    first = next(iter(configs))
    config = configs[first]
    metric = metric or config.eval.monitor
    require(not list_length([metric]), f"metric={metric!r} reads lists, and runs keep ranks: choose another")
    users = read_test_ranks(first)["user_id"]
    for folder in configs:
        _require_same_test(first, folder, configs, users)
    index = users.rle_id().to_numpy()
    lists = index if config.eval.lists == "user" else None
    names = list(dict.fromkeys([*(m for m in config.eval.measures if not list_length([m])), metric]))
    ranks = {name: [read_test_ranks(f)["rank"].to_numpy() for f in of_name] for name, of_name in folders.items()}
    measured = {name: [metrics_of_ranks(of_run, names, lists) for of_run in of_name] for name, of_name in ranks.items()}
    of_lists = [
        np.mean([values_per_list(RankedLists(of_run, lists), [metric])[metric] for of_run in of_name], axis=0)
        for of_name in ranks.values()
    ]
    starts = RankedLists(index, lists).starts
    found = compare_with_best(by_user(np.stack(of_lists), index[starts]))
    rows = []
    for place, (name, of_runs) in enumerate(measured.items()):
        row: dict[str, str | float | None] = {"name": name, "runs": len(of_runs)}
        for one in names:
            values = [of_run[one] for of_run in of_runs]
            row |= {one: float(np.mean(values))}
            if any(len(others) > 1 for others in measured.values()):
                row |= {f"{one} ±": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        low, high = found.interval[place]
        best = place == found.best
        row |= {"behind_by": float(found.difference[place]), "from": float(low), "to": float(high)}
        rows.append(row | {"p_holm": None if best else float(found.p_holm[place])})
    table = pl.DataFrame(rows, infer_schema_length=None).sort(metric, descending=True, maintain_order=True)
    return Comparison(table, metric)


def _folders(name: str, given: Run | Sequence[Run]) -> list[pathlib.Path]:
    several = [given] if isinstance(given, FittedRun | str | pathlib.Path) else list(given)
    require(bool(several), f"compare: {name!r} has no run")
    return [run.run_dir if isinstance(run, FittedRun) else pathlib.Path(run) for run in several]


def _require_same_test(
    first: pathlib.Path, folder: pathlib.Path, configs: Mapping[pathlib.Path, ExperimentConfig], users: pl.Series
) -> None:
    """Refuses runs whose test targets differ."""
    ours, theirs = (
        {"data fingerprint": read_environment(one)["data_fingerprint"][:12]}
        | {path: value for path, value in flat(configs[one].to_dict()).items() if path.startswith((*_ALIKE, *_SPLIT))}
        for one in (first, folder)
    )
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"the runs were not tested alike: {name}: {value} in {shortened(str(first), 60)}, {theirs[name]} in "
                f"{shortened(str(folder), 60)}; compare runs on one log, split and measured alike"
            )
    require(read_test_ranks(folder)["user_id"].equals(users), f"{folder}: its test targets are not those of {first}")
