"""What a sweep consists of: the settings it varies, their values, seeds and folder, read from the command line."""

import dataclasses
import difflib
import itertools
import json
import math
import pathlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.command_line import parse_settings, read_value
from experiments.comparison_plan import flat, parse_seeds, require_one_process
from experiments.configs import chosen, config_names
from tim4rec_jax.checks import listed
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ParallelConfig, TrainConfig
from tim4rec_jax.files import write_atomically
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.run_dir import CHANGEABLE_ON_RESUME

PLAN = "sweep_plan.json"
FORMAT_VERSION = 1
_PARTS = ("model", "train")
# May change between two calls for the same sweep: no trial's numbers depend on them.
_FREE = {name for name in CHANGEABLE_ON_RESUME if name not in ("train.epochs", "train.max_steps", "train.patience")}


@dataclass(frozen=True)
class Arguments:
    """Trains an experiment with several values of some settings; give --grid, or --space and --trials.

    Attributes:
      model, data, train, eval, parallel: settings of every trial, each an option by its path.
      config: the experiment to start from.
      grid: settings and all their values, as in train.learning_rate=1e-3,3e-3: every combination is a trial.
      space: settings and where to look: low:high, log:low:high, or a|b|c; the setting's own type decides what a number
        is.
      trials: how many trials of the space; a larger number goes on.
      seeds: of every trial: how many, counted up from train.seed, or the seeds themselves, separated by commas.
      sampler_seed: of the search.
      folder: of the sweep; None is runs/sweep/<name of the experiment>.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    parallel: ParallelConfig
    config: str
    grid: tuple[str, ...] = ()
    space: tuple[str, ...] = ()
    trials: int | None = None
    seeds: str = "1"
    sampler_seed: int = 0
    folder: pathlib.Path | None = None


@dataclass(frozen=True)
class Range:
    """Numbers to search.

    Attributes:
      low, high: both may be drawn.
      log: evenly in the logarithm.
      whole: whole numbers only.
    """

    low: float
    high: float
    log: bool
    whole: bool


@dataclass(frozen=True)
class Plan:
    """A sweep with every name resolved.

    Attributes:
      name: the experiment.
      base: its settings with those of the command line.
      grid: values of each varied setting; empty for a search.
      space: a range or the choices of each searched setting; empty for a grid.
      trials: how many.
      seeds: of every trial.
      sampler_seed: of the search.
      folder: of the sweep.
    """

    name: str
    base: ExperimentConfig
    grid: dict[str, tuple[Any, ...]]
    space: dict[str, "Range | tuple[Any, ...]"]
    trials: int
    seeds: tuple[int, ...]
    sampler_seed: int
    folder: pathlib.Path

    @property
    def varied(self) -> list[str]:
        """Paths of the settings that differ between trials."""
        return list(self.grid or self.space)

    def combinations(self) -> list[dict[str, Any]]:
        """Returns the trials of a grid, the last setting changing fastest."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def trial_folder(self, number: int) -> pathlib.Path:
        return self.folder / f"trial_{number:04d}"

    def run_folder(self, number: int, seed: int) -> pathlib.Path:
        return self.trial_folder(number) / f"seed_{seed}"

    def config(self, values: Mapping[str, Any], seed: int) -> ExperimentConfig:
        """Returns the settings of one training.

        Raises:
          ValueError: the settings refuse the values.
        """
        parts = {"model": {}, "train": {"seed": seed}}
        for path, value in values.items():
            part, _, name = path.partition(".")
            parts[part][name] = value
        changed = {part: dataclasses.replace(getattr(self.base, part), **new) for part, new in parts.items()}
        return dataclasses.replace(self.base, **changed)


def _hint(path: str, base: ExperimentConfig) -> Any:
    """The type of a setting."""
    part, _, name = path.partition(".")
    return typing.get_type_hints(type(getattr(base, part)))[name]


def _split(option: str, terms: Sequence[str], base: ExperimentConfig) -> dict[str, str]:
    """Splits "train.learning_rate=..." terms and refuses settings that cannot be varied."""
    values = flat(base.to_dict())
    known = [path for path in values if path.partition(".")[0] in _PARTS]
    found: dict[str, str] = {}
    for term in terms:
        path, equals, text = term.partition("=")
        if not equals:
            raise ValueError(f"--{option} {term}: expected a setting, = and its values")
        if path not in known:
            near = difflib.get_close_matches(path, known, n=3, cutoff=0.4) or ["model.*", "train.*"]
            raise ValueError(f"--{option} {path} is no setting that can be varied; nearest: {', '.join(near)}")
        if path == "train.seed":
            raise ValueError(f"--{option} train.seed: seeds are given by --seeds, and a trial is their mean")
        if path == "model.vocab_size":
            raise ValueError(f"--{option} model.vocab_size: the data decide it")
        if path in ("model.name", "model.module"):
            raise ValueError(f"--{option} {path}: every model has settings of its own; sweep one, or compare them")
        if path in found:
            raise ValueError(f"--{option} {path} is there twice; give all its values at once")
        found[path] = text
    return found


def read_grid(terms: Sequence[str], base: ExperimentConfig) -> dict[str, tuple[Any, ...]]:
    """Reads terms such as "model.dropout=0.2,0.4".

    Raises:
      ValueError: for an unknown setting (the nearest are shown), a value of a wrong type, a repeated one, or none.
    """
    grid = {}
    for path, text in _split("grid", terms, base).items():
        values = tuple(read_value(path, _hint(path, base), part.strip()) for part in text.split(",") if part.strip())
        if not values:
            raise ValueError(f"--grid {path}={text} names no value; give at least one")
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"--grid {path}={text}: {repeated[0]} is there {values.count(repeated[0])} times")
        grid[path] = values
    return grid


def read_space(terms: Sequence[str], base: ExperimentConfig) -> dict[str, Range | tuple[Any, ...]]:
    """Reads terms such as "train.learning_rate=log:1e-4:1e-2", "model.num_layers=1:3" or "train.loss=ce|bpr".

    Raises:
      ValueError: for an unknown setting (the nearest are shown), a value of a wrong type, or an empty range.
    """
    space: dict[str, Range | tuple[Any, ...]] = {}
    for path, text in _split("space", terms, base).items():
        if ":" in text:
            space[path] = _read_range(path, text, base)
            continue
        choices = tuple(read_value(path, _hint(path, base), part.strip()) for part in text.split("|") if part.strip())
        if len(set(choices)) < 2 or len(set(choices)) < len(choices):
            raise ValueError(
                f"--space {path}={text}: give two or more different choices as in a|b, or a range low:high"
            )
        space[path] = choices
    return space


def _read_range(path: str, text: str, base: ExperimentConfig) -> Range:
    *words, low, high = text.split(":")
    whole = _hint(path, base) in (int, int | None)
    if words not in ([], ["log"], ["int"]) or (words == ["int"] and not whole):
        raise ValueError(f"--space {path}={text}: expected low:high, or log:low:high for even steps in the logarithm")
    ends = read_value(path, _hint(path, base), low), read_value(path, _hint(path, base), high)
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ValueError(f"--space {path}={text}: it is not a number; give choices as in a|b")
    if not ends[0] < ends[1]:
        raise ValueError(f"--space {path}={text} is empty: {ends[0]} is not below {ends[1]}")
    if words == ["log"] and ends[0] <= 0:
        raise ValueError(f"--space {path}={text}: a logarithmic range must begin above 0")
    return Range(*ends, log=words == ["log"], whole=whole)


def parse(argv: Sequence[str]) -> Plan:
    """Reads the command line.

    Raises:
      ValueError: for an unknown experiment, setting or option (the nearest are shown), a value of a wrong type, a
        setting both varied and fixed, or options that do not go together.
    """
    file, model = chosen(argv)
    name = file.name
    default = Arguments(model, file.data, file.train, file.eval, file.parallel, name)
    given = parse_settings(
        Arguments, argv, default, prog="experiments.sweep", description=f"Experiments: {', '.join(config_names())}"
    )
    if given.eval.baselines != file.eval.baselines:
        raise ValueError("--eval.baselines is not for sweeps: trials are compared with each other")
    # What costs a training of its own is no part of a trial.
    measured = dataclasses.replace(given.eval, baselines=("popularity",))
    require_one_process(given.parallel)
    base = ExperimentConfig(file.name, given.model, given.data, given.train, measured, given.parallel)
    if bool(given.grid) == bool(given.space):
        raise ValueError(
            "give --grid, as in --grid train.learning_rate=1e-3,3e-3, or --space and --trials; one of them"
        )
    if bool(given.space) != (given.trials is not None):
        raise ValueError("--space and --trials belong together: where to look, and how often")
    if given.trials is not None and given.trials < 1:
        raise ValueError(f"--trials={given.trials} must be at least 1")
    grid, space = read_grid(given.grid, base), read_space(given.space, base)
    before, now = flat(file.to_dict()), flat(base.to_dict())
    if both := [path for path in (grid or space) if before.get(path, now[path]) != now[path]]:
        raise ValueError(f"--{both[0]} is given and varied; give it once")
    trials = given.trials or math.prod(map(len, grid.values()))
    seeds = parse_seeds(given.seeds, base.train.seed)
    folder = given.folder or pathlib.Path("runs") / "sweep" / base.name
    return Plan(name, base, grid, space, trials, seeds, given.sampler_seed, folder)


def _recorded(plan: Plan, fingerprint: str) -> dict[str, Any]:
    """What must stay the same for a sweep to go on, by path, as JSON gives it back."""
    settings = {path: value for path, value in flat(plan.base.to_dict()).items() if path not in _FREE}
    # The seeds stand for the one of the settings.
    settings.pop("train.seed")
    space = {path: dataclasses.asdict(r) if isinstance(r, Range) else r for path, r in plan.space.items()}
    record = {"config": plan.name, "settings": settings, "grid": plan.grid, "space": space, "seeds": plan.seeds}
    if plan.space:
        record["sampler_seed"] = plan.sampler_seed
    return json.loads(json.dumps(record | {"data_fingerprint": fingerprint}))


def record_plan(plan: Plan, fingerprint: str) -> None:
    """Writes what the sweep consists of into its folder, or compares it with what is there.

    Args:
      plan: the sweep.
      fingerprint: of the cleaned log.

    Raises:
      ValueError: the folder holds another sweep; the first differences are listed.
    """
    file, new = plan.folder / PLAN, _recorded(plan, fingerprint) | {"format_version": FORMAT_VERSION}
    if not file.exists():
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(new, indent=2) + "\n").encode())
        return
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from error
    ours, theirs = _by_path(new), _by_path(old)
    differences = [
        f"{path}: {theirs.get(path, 'absent')!r} there, {ours.get(path, 'absent')!r} asked for"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]
    if differences:
        raise ValueError(
            f"{plan.folder} holds another sweep: {listed(differences, 130)}; choose another --folder, or give the "
            "settings of that sweep"
        )


def _by_path(record: Mapping[str, Any]) -> dict[str, Any]:
    return {path: list(value) if isinstance(value, tuple) else value for path, value in flat(record).items()}
