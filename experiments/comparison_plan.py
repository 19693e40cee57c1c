"""What a comparison of models consists of: names, settings, seeds and folders, read from the command line."""

import dataclasses
import difflib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from experiments import train
from experiments.command_line import OptionParser, parse_settings
from experiments.configs import DATA_NAMES, MODEL_NAMES, load_config
from experiments.family import RECIPES, exact_order, file_name
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ParallelConfig, TrainConfig
from tim4rec_jax.data_config import DATA_ALIASES
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.run_dir import CHANGEABLE_ON_RESUME, CONFIG, SHOWN_DIFFERENCES, read_config, read_environment

# Settings that a model's numbers do not depend on, and those that the data answer for by their fingerprint.
FREE = {name for name in CHANGEABLE_ON_RESUME if name not in ("train.epochs", "train.max_steps", "train.patience")}
FREE |= {"name", "model.vocab_size", "eval.baselines"}


@dataclass(frozen=True)
class Arguments:
    """Trains models on one log with several seeds each and compares them.

    Attributes:
      model, data, train, eval, parallel: settings for every model that reads them, each an option by its path.
      data_set: the data, one of `DATA_NAMES`.
      models: names, separated by commas.
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


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns nested settings by path, as in "train.learning_rate"; lists become tuples."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{key}.")
        else:
            found[path + key] = tuple(value) if isinstance(value, list) else value
    return found


def _nearest(kind: str, name: str, names: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names)
    return ValueError(f"{kind} {name!r} is unknown; nearest: {', '.join(near)}")


def parse_models(text: str) -> tuple[str, ...]:
    """Reads "tim4rec,sasrec".

    Raises:
      ValueError: for an unknown name (the nearest are shown), a repeated one, or none.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError(f"--models={text!r} names no model; choose of {', '.join(MODEL_NAMES)}")
    for name in names:
        if name not in MODEL_NAMES:
            raise _nearest("model", name, MODEL_NAMES)
        if names.count(name) > 1:
            raise ValueError(f"--models={text}: {name} is there {names.count(name)} times; name each model once")
    return names


def parse_seeds(text: str, first: int = 2020) -> tuple[int, ...]:
    """Reads "3", a count, or "2020,7,11", the seeds.

    Raises:
      ValueError: for what is no number, a count under 1, a seed under 0, or a repeated seed.
    """
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--seeds={text}: expected a count as in 3, or seeds as in 2020,7,11") from None
    if "," not in text:
        if not numbers or numbers[0] < 1:
            raise ValueError(f"--seeds={text}: a count must be at least 1")
        return tuple(range(first, first + numbers[0]))
    for seed in numbers:
        if seed < 0:
            raise ValueError(f"--seeds={text}: seed {seed} must be at least 0")
        if numbers.count(seed) > 1:
            raise ValueError(
                f"--seeds={text}: {seed} is there {numbers.count(seed)} times; the same seed gives the same run again"
            )
    if not numbers:
        raise ValueError(f"--seeds={text} names no seed")
    return numbers


def require_metric(metric: str, config: ExperimentConfig) -> str:
    """Returns the name of a metric that an experiment measures.

    Raises:
      ValueError: it is none; the nearest are shown.
    """
    known = [f"{name}@{k}" for k in config.eval.top_k for name in ("hit", "ndcg", "mrr")]
    if metric not in known:
        raise _nearest("metric", metric, known)
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
    if found.data not in DATA_NAMES:
        raise _nearest("data", found.data, DATA_NAMES)
    configs, overrides = {}, {}
    # One order of events for all models: exact seconds, also where a paper's own experiment has another.
    data = file_name(found.data)
    bases = {model: exact_order(load_config(f"{data}_{model}")) for model in parse_models(found.models)}
    defaults = {
        model: Arguments(base.model, base.data, base.train, base.eval, base.parallel, found.data, found.models)
        for model, base in bases.items()
    }
    for model, base in bases.items():
        arguments = parse_settings(
            Arguments, others, defaults[model], list(defaults.values()), prog="experiments.compare",
            description=f"Data: {', '.join(DATA_NAMES)}. Models: {', '.join(MODEL_NAMES)}.",
        )  # fmt: skip
        configs[model] = _resolved(base, arguments)
        before = flat(base.to_dict())
        overrides |= {key: value for key, value in flat(configs[model].to_dict()).items() if before[key] != value}
    overrides.pop("eval.baselines", None)
    seeds = parse_seeds(arguments.seeds, base.train.seed)
    metric = require_metric(arguments.metric or configs[model].eval.monitor, configs[model])
    own = _own_settings(configs, arguments.own_settings)
    runs = arguments.runs or pathlib.Path("runs") / "compare" / file_name(found.data)
    output = arguments.output or pathlib.Path("experiments") / "results" / f"compare_{file_name(found.data)}"
    return arguments, Plan(found.data, configs, overrides, own, seeds, metric, runs, output)


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
    require_one_process(arguments.parallel)
    return ExperimentConfig(base.name, arguments.model, arguments.data, settings, measured, arguments.parallel)


def require_one_process(parallel: ParallelConfig) -> None:
    """Raises ValueError where each of many runs would have to be started on several machines."""
    if parallel.several_processes:
        raise ValueError(
            "--parallel.coordinator and --parallel.distributed are for experiments.train: here each run is one process "
            "on this machine, on all its devices; train the runs one by one to spread them over machines"
        )


def _own_settings(configs: Mapping[str, ExperimentConfig], accepted: bool) -> dict[str, dict[str, Any]]:
    """Finds settings of data, training and evaluation in which the models differ.

    Raises:
      ValueError: there are some that are no model's recipe, and they are not accepted.
    """
    settings = {model: flat(config.to_dict()) for model, config in configs.items()}
    paths = [path for path in next(iter(settings.values())) if not path.startswith("model.") and path not in FREE]
    own = {path: {model: values[path] for model, values in settings.items()} for path in paths}
    own = {path: values for path, values in own.items() if len(set(values.values())) > 1}
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


def options(config: ExperimentConfig, name: str) -> tuple[str, ...]:
    """Returns the options of `experiments.train` that make an experiment's settings into `config`.

    Args:
      config: the settings wanted.
      name: the experiment to start from.
    """
    before, given = flat(load_config(name).to_dict()), [f"--config={name}"]
    for path, value in flat(config.to_dict()).items():
        if path == "name" or before[path] == value:
            continue
        given += [f"--{path}", *map(str, value)] if isinstance(value, tuple) else [f"--{path}={value}"]
    if train.parse(given)[0] != config:
        raise ValueError(f"the settings of {name} cannot be given as options: {' '.join(given)}")
    return tuple(given)


def require_same_settings(plan: Plan, fingerprint: str | None) -> None:
    """Refuses runs that were made with other settings or on other data.

    Args:
      plan: the comparison.
      fingerprint: of the log; None is that of the first run there is.

    Raises:
      ValueError: naming the first differences with both values.
    """
    differences: dict[str, list[pathlib.Path]] = {}
    for model, seed in plan.runs_in_order():
        folder = plan.folder(model, seed)
        if not (folder / CONFIG).exists():
            continue
        old, new = flat(read_config(folder).to_dict()), flat(plan.config(model, seed).to_dict())
        for key in sorted(new):
            if key not in FREE and old.get(key) != new[key]:
                differences.setdefault(f"{key}: {old.get(key)!r} there, {new[key]!r} asked for", []).append(folder)
        data = read_environment(folder)["data_fingerprint"]
        fingerprint = fingerprint or data
        if data != fingerprint:
            line = f"data fingerprint: {data[:12]}… there, {fingerprint[:12]}… asked for"
            differences.setdefault(line, []).append(folder)
    if differences:
        shown = ", ".join(list(differences)[:SHOWN_DIFFERENCES])
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise ValueError(
            f"runs are there with other settings or data: {shown}{more} ({next(iter(differences.values()))[0]}); give "
            "the settings of those runs, choose another folder with --runs, or remove them"
        )
