"""What a comparison consists of: models to train alike, or run folders that are there; read from the command line."""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from experiments.cli import OptionParser, nearest, parse_settings
from experiments.configs import DATA_NAMES, MODEL_NAMES, load_config
from experiments.family import RECIPES, exact_order, file_name
from experiments.runs import FREE as FREE_BETWEEN_CALLS
from experiments.runs import differences, parse_seeds, require_comparable
from tim4rec_jax.checks import listed, require
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ParallelConfig, TrainConfig, flat
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import require_held_out
from tim4rec_jax.data_config import DATA_ALIASES
from tim4rec_jax.devices import require_kernels
from tim4rec_jax.evaluation.measures import list_length
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import MODELS, import_model_module
from tim4rec_jax.run_dir import CONFIG, read_config, read_environment
from tim4rec_jax.training.callbacks import trackers
from tim4rec_jax.training.setup import split_that_fits, with_data

# Settings that a model's numbers do not depend on, and those that the data answer for by their fingerprint.
FREE = FREE_BETWEEN_CALLS | {"name", "model.vocab_size", "eval.baselines"}
# What is measured must be the same for all rows.
_PROTOCOL = (
    "eval.top_k",
    "eval.metrics",
    "eval.lists",
    "eval.exclude_seen",
    "eval.seen_targets",
    "data.split",
    "data.valid_share",
    "data.test_share",
    "data.valid_from",
    "data.test_from",
    "data.temporal_targets",
)


@dataclass(frozen=True)
class Arguments:
    """Trains models on one log with several seeds each and compares them.

    Attributes:
      model, data, train, eval, parallel: settings for every model that reads them, each an option by its path.
      data_set: the data, one of `DATA_NAMES`.
      models: names, separated by commas; my_models:RNN4Rec names one that the module my_models registers.
      seeds: how many, counted up from 2020, or the seeds themselves, separated by commas ("7," is seed 7 alone).
      epochs: short for --train.epochs.
      metric: decides which model is best; None is eval.monitor.
      jobs: trainings at once, each with its own share of the processors, whose number decides a run's last digits: with
        another number of jobs the numbers are others, as each run's `cpus_allowed` tells. Leave it at 1 on a GPU, and
        for clean timings.
      runs: folder of the run folders; None is runs/compare/<data>.
      output: where the results go, without suffix; None is experiments/results/compare_<data>.
      report_only: train nothing, compare what is finished.
      own_settings: accept that models keep training settings of their own that differ.
      latex: file for a LaTeX table (booktabs), beside the others.
      note: a sentence to keep with the numbers, for instance about the machine.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    parallel: ParallelConfig
    data_set: Annotated[str, tyro.conf.arg(aliases=("--data",))]
    models: str = ",".join(MODEL_NAMES)
    seeds: str = "3"
    epochs: int | None = None
    metric: str | None = None
    jobs: int = 1
    runs: pathlib.Path | None = None
    output: pathlib.Path | None = None
    report_only: bool = False
    own_settings: bool = False
    latex: pathlib.Path | None = None
    note: str = ""


@dataclass(frozen=True)
class RowArguments:
    """Puts finished runs side by side, with their spread over seeds and their significance.

    Attributes:
      rows: each a name, an equals sign and the run folders of its seeds, as in "causal=runs/causal/seed_*".
      output: where the results go, without suffix.
      metric: decides which row is best; None is the eval.monitor of the first row.
      latex: file for a LaTeX table (booktabs), beside the others.
      note: a sentence to keep with the numbers, for instance about the machine.
    """

    rows: tuple[str, ...] = ()
    output: pathlib.Path = pathlib.Path("runs") / "comparison"
    metric: str | None = None
    latex: pathlib.Path | None = None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A comparison with every name resolved.

    Attributes:
      data_set: its name.
      configs: each model's settings; the seed in them is not used.
      overrides: settings from the command line, by path.
      own: training settings in which the models differ: the value of each model, by path.
      seeds: in order.
      metric: decides which is best.
      runs, output: where run folders are, where results go.
      latex: file for a LaTeX table, or None.
      folders: of runs that lie elsewhere, by (model, seed); if there are any, the comparison is of these alone.
    """

    data_set: str
    configs: dict[str, ExperimentConfig]
    overrides: dict[str, Any]
    own: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    metric: str
    runs: pathlib.Path
    output: pathlib.Path
    latex: pathlib.Path | None
    folders: Mapping[tuple[str, int], pathlib.Path] = field(default_factory=dict)

    def runs_in_order(self) -> Iterator[tuple[str, int]]:
        """Yields (model, seed), all models of one seed before the next seed."""
        every = ((model, seed) for seed in self.seeds for model in self.configs)
        return (run for run in every if not self.folders or run in self.folders)

    def folder(self, model: str, seed: int) -> pathlib.Path:
        return self.folders.get((model, seed), self.runs / model / f"seed_{seed}")

    def config(self, model: str, seed: int) -> ExperimentConfig:
        config = self.configs[model]
        return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def _require_known(kind: str, name: str, names: Sequence[str]) -> None:
    require(name in names, f"{kind} {name!r} is unknown; nearest: {nearest(name, names)}")


def parse_models(text: str) -> tuple[str, ...]:
    """Reads "tim4rec,sasrec,my_models:RNN4Rec"; the last is imported, and stands for the name it is registered by.

    Raises:
      ValueError: for an unknown name (the nearest are shown), a repeated one, or none.
    """
    given = [name.strip() for name in text.split(",") if name.strip()]
    names = tuple(import_model_module(name) or name if ":" in name else name for name in given)
    if not names:
        raise ValueError(f"--models={text!r} names no model; choose of {', '.join(MODEL_NAMES)}")
    for name in names:
        _require_known("model", name, tuple(MODELS))
        if names.count(name) > 1:
            raise ValueError(f"--models={text}: {name} is there {names.count(name)} times; name each model once")
    return names


def require_metric(metric: str, config: ExperimentConfig) -> str:
    """Returns the name of a metric that an experiment measures, of those that follow from ranks.

    Raises:
      ValueError: it is none; the nearest are shown.
    """
    of_ranks = [name for name in config.eval.measures if not list_length([name])]
    _require_known("metric", metric, of_ranks)
    return metric


def parse(argv: Sequence[str]) -> tuple[Arguments, Plan]:
    """Reads the command line.

    Raises:
      ValueError: for an unknown name or option (the nearest are shown), a value out of range, a repeated model or seed,
        or models that would be trained with different settings.
    """
    finder = OptionParser(add_help=False)
    finder.add_argument("--data", "--data_set", "--data-set", default=DATA_NAMES[0])
    finder.add_argument("--models", default=Arguments.models)
    found, others = finder.parse_known_args(argv)
    found.data = DATA_ALIASES.get(found.data, found.data)
    _require_known("data", found.data, DATA_NAMES)
    configs, overrides = {}, {}
    # One order of events for all models: exact seconds, also where a paper's own experiment has another.
    bases = {
        model: exact_order(load_config(f"{file_name(found.data)}_{model}")) for model in parse_models(found.models)
    }
    defaults = {
        model: Arguments(base.model, base.data, base.train, base.eval, base.parallel, found.data, found.models)
        for model, base in bases.items()
    }
    for model, base in bases.items():
        arguments = parse_settings(
            Arguments,
            others,
            defaults[model],
            list(defaults.values()),
            prog="experiments.compare",
            description=f"Data: {', '.join(DATA_NAMES)}. Models: {', '.join(MODEL_NAMES)}.",
        )
        configs[model] = _resolved(base, arguments)
        before = flat(base.to_dict())
        overrides |= {key: value for key, value in flat(configs[model].to_dict()).items() if before[key] != value}
    overrides.pop("eval.baselines", None)
    seeds = parse_seeds(arguments.seeds, base.train.seed)
    metric = require_metric(arguments.metric or configs[model].eval.monitor, configs[model])
    own = _own_settings(configs, arguments.own_settings)
    runs = arguments.runs or pathlib.Path("runs") / "compare" / file_name(found.data)
    output = arguments.output or pathlib.Path("experiments") / "results" / f"compare_{file_name(found.data)}"
    return arguments, Plan(found.data, configs, overrides, own, seeds, metric, runs, output, _tex(arguments.latex))


def _tex(file: pathlib.Path | None) -> pathlib.Path | None:
    require(file is None or file.suffix == ".tex", f"--latex={file}: give a file that ends in .tex")
    require(file is None or not file.is_dir(), f"--latex={file} is a folder; give a file")
    return file


def _resolved(base: ExperimentConfig, arguments: Arguments) -> ExperimentConfig:
    """The settings of one model: the experiment's, with those of the command line."""
    settings = arguments.train
    if arguments.data.timestamp_precision == "published":
        raise ValueError("--data.timestamp_precision=published is no order to compare by: give int64 or float32")
    if settings.seed != base.train.seed:
        raise ValueError(f"--train.seed={settings.seed}: give the seeds by --seeds, as in --seeds={settings.seed},")
    if arguments.model.name != base.model.name:
        raise ValueError(f"--model.name={arguments.model.name}: give the models by --models")
    if arguments.epochs is not None:
        if settings.epochs not in (base.train.epochs, arguments.epochs):
            raise ValueError(f"--epochs={arguments.epochs} and --train.epochs={settings.epochs} differ; give one")
        settings = dataclasses.replace(settings, epochs=arguments.epochs)
    if arguments.eval.baselines != base.eval.baselines:
        raise ValueError("--eval.baselines is not for comparisons: popularity and Markov stand beside all models")
    # Measured once for all runs; what costs a training of its own is a model of the comparison.
    measured = dataclasses.replace(arguments.eval, baselines=("popularity",))
    config = ExperimentConfig(base.name, arguments.model, arguments.data, settings, measured, arguments.parallel)
    require_comparable(config, "experiments.compare")
    return config


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the settings that are not the same everywhere: the value of each name, by path."""
    paths = dict.fromkeys(path for values in settings.values() for path in values)
    every = {path: {name: values.get(path, "absent") for name, values in settings.items()} for path in paths}
    return {path: values for path, values in every.items() if len(set(values.values())) > 1}


def _own_settings(configs: Mapping[str, ExperimentConfig], accepted: bool) -> dict[str, dict[str, Any]]:
    """Finds settings of data, training and evaluation in which the models differ.

    Raises:
      ValueError: there are some that are no model's recipe, and they are not accepted.
    """
    settings = {model: flat(config.to_dict()) for model, config in configs.items()}
    own = {
        path: values
        for path, values in _differing(settings).items()
        if not path.startswith("model.") and path not in FREE
    }
    unlike = {
        path: alike
        for path, values in own.items()
        if len(set((alike := {m: v for m, v in values.items() if path not in RECIPES.get(m, ())}).values())) > 1
    }
    if unlike and not accepted:
        lines = (
            f"{path}: " + ", ".join(f"{m} {value}" for m, value in values.items()) for path, values in unlike.items()
        )
        options = " ".join(f"--{path}={next(iter(values.values()))}" for path, values in unlike.items())
        raise ValueError(
            "the models would not be trained alike:\n  " + "\n  ".join(lines) + f"\ngive one value for all, as in "
            f"{options}; or accept the differences with --own-settings, and the table will say so"
        )
    return own


def require_same_settings(plan: Plan, fingerprint: str | None) -> None:
    """Refuses runs that were made with other settings or on other data.

    Args:
      plan: the comparison.
      fingerprint: of the log; None is that of the first run there is.

    Raises:
      ValueError: naming the first differences with both values.
    """
    found: dict[str, pathlib.Path] = {}
    for model, seed in plan.runs_in_order():
        folder = plan.folder(model, seed)
        if not (folder / CONFIG).exists():
            continue
        data = read_environment(folder)["data_fingerprint"]
        fingerprint = fingerprint or data
        there, asked = (
            {key: value for key, value in flat(config.to_dict()).items() if key not in FREE}
            | {"data fingerprint": f"{of_log[:12]}…"}
            for config, of_log in ((read_config(folder), data), (plan.config(model, seed), fingerprint))
        )
        for line in differences(there, asked):
            found.setdefault(line, folder)
    if found:
        raise ValueError(
            f"runs are there with other settings or data: {listed(list(found), 130)} ({next(iter(found.values()))}); "
            "give the settings of those runs, choose another folder with --runs, or remove them"
        )


def require_fit(plan: Plan, log: InteractionLog) -> None:
    """Refuses models that could not be trained or measured on a log, before any of them is trained.

    Raises:
      ValueError: naming what is wrong, each with the models that it is true of.
    """
    wrong: dict[str, list[str]] = {}
    for model, config in plan.configs.items():
        try:
            require_kernels(config.model)
            trackers(config.train.trackers)
            split_that_fits(with_data(config, log), log)
        except ValueError as error:
            wrong.setdefault(str(error), []).append(model)
    if wrong:
        raise ValueError(
            "; ".join(
                what if len(models) == len(plan.configs) else f"{', '.join(models)}: {what}"
                for what, models in wrong.items()
            )
        )


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
        others = [f"{key}: {first[key]!r} and {settings[key]!r}" for key in first if first[key] != settings[key]]
        if others:
            raise ValueError(
                f"row {name}: {folders[0]} and {folder} differ in more than the seed: {listed(others, 100, ', ')}; "
                "give each its own row"
            )
        if seed in by_seed:
            raise ValueError(f"row {name}: {by_seed[seed]} and {folder} both have seed {seed}; give one of them")
        by_seed[seed] = folder
    return dict(sorted(by_seed.items()))


def _require_same_test(folders: Sequence[pathlib.Path]) -> None:
    """Refuses runs whose test users, items or protocol differ: their numbers cannot be compared user by user.

    Raises:
      ValueError: naming the first difference.
    """
    facts = []
    for folder in folders:
        settings = flat(read_config(folder).to_dict())
        fingerprint = {"data fingerprint": read_environment(folder)["data_fingerprint"]}
        facts.append(fingerprint | {path: settings[path] for path in _PROTOCOL})
    for folder, found in zip(folders, facts, strict=True):
        for key, value in facts[0].items():
            if found[key] != value:
                raise ValueError(
                    f"the runs were not tested alike: {key}: {value} in {folders[0]}, {found[key]} in {folder}; "
                    "compare runs on one log, cleaned and ordered alike (data.timestamp_precision too)"
                )


def parse_rows(argv: Sequence[str]) -> tuple[RowArguments, Plan]:
    """Reads the command line of a comparison of run folders.

    Raises:
      ValueError: for a row without runs, a name given twice, runs of a row that differ in more than the seed, rows that
        were not tested alike, or an unknown metric.
    """
    arguments = parse_settings(RowArguments, argv, RowArguments(), prog="experiments.compare")
    require(bool(arguments.rows), "--rows names no row; give a name and run folders, as in 'causal=runs/causal/seed_*'")
    rows: dict[str, dict[int, pathlib.Path]] = {}
    for name, folders in map(_split, arguments.rows):
        require(name not in rows, f"--rows: {name} is there twice; give each row its own name")
        rows[name] = _row(name, folders)
    folders = {(name, seed): folder for name, by_seed in rows.items() for seed, folder in by_seed.items()}
    _require_same_test(list(folders.values()))
    configs = {name: read_config(next(iter(by_seed.values()))) for name, by_seed in rows.items()}
    first = next(iter(configs.values()))
    require_held_out(first.data, "experiments.compare --rows")
    own = _differing({name: _without_seed(config) for name, config in configs.items()})
    metric = require_metric(arguments.metric or first.eval.monitor, first)
    seeds = tuple(sorted({seed for _, seed in folders}))
    output, latex = arguments.output, _tex(arguments.latex)
    plan = Plan(first.data.name, configs, {}, own, seeds, metric, pathlib.Path(), output, latex, folders)
    return arguments, plan
