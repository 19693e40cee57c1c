"""A comparison of run folders that are already there, whatever their settings: one row a group of seeds."""

import glob
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.command_line import parse_settings
from experiments.comparison_plan import FREE, Plan, flat, require_metric
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.run_dir import CONFIG, SHOWN_DIFFERENCES, read_config, read_environment

# What is measured must be the same for all rows.
_PROTOCOL = (
    "eval.top_k", "eval.exclude_seen", "eval.seen_targets", "data.split", "data.valid_share", "data.test_share",
    "data.valid_from", "data.test_from", "data.temporal_targets",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Puts finished runs side by side, with their spread over seeds and their significance.

    Attributes:
      rows: each a name, an equals sign and the run folders of its seeds, as in "causal=runs/causal/seed_*".
      output: where the results go, without suffix.
      metric: decides which row is best; None is the eval.monitor of the first row.
      note: a sentence to keep with the numbers, for instance about the machine.
    """

    rows: tuple[str, ...] = ()
    output: pathlib.Path = pathlib.Path("runs") / "comparison"
    metric: str | None = None
    note: str = ""


def is_asked_for(argv: Sequence[str]) -> bool:
    """Tells whether a command line compares run folders."""
    return any(argument.partition("=")[0] == "--rows" for argument in argv)


def _split(text: str) -> tuple[str, list[pathlib.Path]]:
    """Reads "name=pattern".

    Raises:
      ValueError: it has no name or no pattern, or no run folder fits.
    """
    name, equals, pattern = text.partition("=")
    if not name.strip() or not equals or not pattern:
        raise ValueError(f"--rows {text!r}: expected a name and run folders, as in 'causal=runs/causal/seed_*'")
    # A folder that is called so is meant, whatever its name would be as a pattern.
    found = [pattern] if os.path.lexists(pattern) else glob.glob(pattern)
    folders = sorted(path for path in map(pathlib.Path, found) if (path / CONFIG).is_file())
    if not folders:
        raise ValueError(f"--rows {text!r}: {pattern} is no run folder; give one, or a pattern of several in quotes")
    return name.strip(), folders


def _without_seed(config: ExperimentConfig) -> dict[str, Any]:
    return {path: value for path, value in flat(config.to_dict()).items() if path not in FREE | {"train.seed"}}


def _row(name: str, folders: Sequence[pathlib.Path]) -> dict[int, pathlib.Path]:
    """Returns a row's folders by seed.

    Raises:
      ValueError: two runs have the same seed, or other settings than the first.
    """
    by_seed: dict[int, pathlib.Path] = {}
    first = _without_seed(read_config(folders[0]))
    for folder in folders:
        config = read_config(folder)
        seed, settings = config.train.seed, _without_seed(config)
        differences = [f"{key}: {first[key]!r} and {settings[key]!r}" for key in first if first[key] != settings[key]]
        if differences:
            raise ValueError(
                f"row {name}: {folders[0]} and {folder} differ in more than the seed: "
                + ", ".join(differences[:SHOWN_DIFFERENCES])
                + "; give each its own row"
            )
        if seed in by_seed:
            raise ValueError(f"row {name}: {by_seed[seed]} and {folder} both have seed {seed}; give one of them")
        by_seed[seed] = folder
    return dict(sorted(by_seed.items()))


def _require_same_test(folders: Mapping[tuple[str, int], pathlib.Path]) -> None:
    """Refuses runs whose test users, items or protocol differ: their numbers cannot be compared user by user.

    Raises:
      ValueError: listing every run that differs from the first.
    """
    facts = {}
    for folder in folders.values():
        settings = flat(read_config(folder).to_dict())
        facts[folder] = {"data fingerprint": read_environment(folder)["data_fingerprint"]}
        facts[folder] |= {path: settings[path] for path in _PROTOCOL}
    first, expected = next(iter(facts.items()))
    differences = [
        f"{key}: {expected[key]} in {first}, {found[key]} in {folder}"
        for folder, found in facts.items()
        for key in expected
        if found[key] != expected[key]
    ]
    if differences:
        raise ValueError(
            f"the runs were not tested alike: {differences[0]}; compare runs on one log, cleaned and ordered alike "
            "(data.timestamp_precision too)"
        )


def parse_rows(argv: Sequence[str]) -> tuple[Arguments, Plan]:
    """Reads the command line of a comparison of run folders.

    Raises:
      ValueError: for a row without runs, a name given twice, runs of a row that differ in more than the seed, rows that
        were not tested alike, or an unknown metric.
    """
    arguments = parse_settings(Arguments, argv, Arguments(), prog="experiments.compare")
    if not arguments.rows:
        raise ValueError("--rows names no row; give a name and run folders, as in 'causal=runs/causal/seed_*'")
    rows: dict[str, dict[int, pathlib.Path]] = {}
    for name, folders in map(_split, arguments.rows):
        if name in rows:
            raise ValueError(f"--rows: {name} is there twice; give each row its own name")
        rows[name] = _row(name, folders)
    folders = {(name, seed): folder for name, by_seed in rows.items() for seed, folder in by_seed.items()}
    _require_same_test(folders)
    configs = {name: read_config(next(iter(by_seed.values()))) for name, by_seed in rows.items()}
    first = next(iter(configs.values()))
    settings = {name: _without_seed(config) for name, config in configs.items()}
    own = {path: {name: values[path] for name, values in settings.items()} for path in _without_seed(first)}
    own = {path: values for path, values in own.items() if len(set(values.values())) > 1}
    metric = require_metric(arguments.metric or first.eval.monitor, first)
    seeds = tuple(sorted({seed for _, seed in folders}))
    plan = Plan(first.data.name, configs, {}, own, seeds, metric, pathlib.Path(), arguments.output, folders)
    return arguments, plan
