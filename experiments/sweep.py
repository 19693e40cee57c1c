"""Trains an experiment with many values of some settings, and puts the trials in the order of validation.

    python -m experiments.sweep --config=ml100k_tim4rec --grid train.learning_rate=1e-3,3e-3 model.dropout=0.2,0.4
    python -m experiments.sweep --config=ml100k_tim4rec --trials=20 --train.epochs=30 --space \
        train.learning_rate=log:1e-4:1e-2 model.num_layers=1:3 model.time_dropout=0.0:0.5 train.loss=ce|bpr --seeds=2

(Quote a term with | in it for the shell.) A grid takes every combination; a space is searched by Optuna's TPE or at
random. Optuna keeps the trials: pip install 'tim4rec_jax[sweep]'. Any other setting is an option by its path and holds
for all trials. A trial trains a run folder for each seed under runs/sweep/<config>/ and counts by the mean validation
metric (eval.monitor) of their best epochs. The test part decides nothing: it is shown for the best trial alone.
The same command goes on after Ctrl-C, SIGTERM, a crash or a kill; more --trials go on from a finished search. A trial
that fails is kept as failed, its error in error.txt; remove that file to have it tried again. Writes sweep.md and
sweep.json into the folder. Exit codes: 0 done, 2 an error or no trial that worked, 130 stopped by Ctrl-C, 0 by SIGTERM.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import signal
import statistics
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from rich.console import Console

from experiments import cli, train
from experiments.configs import chosen, config_names
from experiments.runs import (
    FREE,
    Job,
    differences,
    is_finished,
    options,
    parse_seeds,
    require_comparable,
    train_all,
)
from tim4rec_jax.checks import listed, require
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ParallelConfig, TrainConfig, flat
from tim4rec_jax.data.interactions import load_log, with_precision
from tim4rec_jax.files import locked, write_atomically
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.run_dir import environment, read_results
from tim4rec_jax.training.signals import Interrupted

ERROR, MARKDOWN, RECORD, JOURNAL = "error.txt", "sweep.md", "sweep.json", "optuna.journal"
WHY_ONE_TEST = (
    "Validation chose the best trial. Test numbers are shown for it alone: choosing among trials by their test numbers "
    "would fit the settings to the test part, and the number shown would no longer measure unseen data."
)
STOPPED = "stopped; the same command goes on from here"


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
      sampler: what draws from the space.
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
    sampler: Literal["tpe", "random"] = "tpe"
    sampler_seed: int = 0
    folder: pathlib.Path | None = None


@dataclass(frozen=True)
class Plan:
    """A sweep with every name resolved.

    Attributes:
      name: the experiment.
      base: its settings with those of the command line.
      space: Optuna's distribution of each varied setting, by path; of a grid its choices.
      trials: how many.
      seeds: of every trial.
      sampler, sampler_seed: of a search; None for a grid, which takes every combination.
      folder: of the sweep.
    """

    name: str
    base: ExperimentConfig
    space: dict[str, Any]
    trials: int
    seeds: tuple[int, ...]
    sampler: str | None
    sampler_seed: int
    folder: pathlib.Path

    def trial_folder(self, number: int) -> pathlib.Path:
        return self.folder / f"trial_{number:04d}"

    def run_folder(self, number: int, seed: int) -> pathlib.Path:
        return self.trial_folder(number) / f"seed_{seed}"

    def options(self, values: Mapping[str, Any], seed: int) -> tuple[str, ...]:
        """Returns the options of one training; raises ValueError where the settings refuse the values."""
        varied = {**values, "train.seed": seed}.items()
        given = *options(self.base, self.name), *(f"--{path}={value}" for path, value in varied)
        train.parse(given)
        return given


@dataclass(frozen=True)
class Trial:
    """One choice of values and what became of it.

    Attributes:
      number: from 0, in the order they were begun.
      values: by path of the setting.
      valid_by_seed: the monitored metric of each seed's best epoch; empty unless all are trained.
      best_epochs: likewise.
      seconds: of training, all seeds.
      error: why it failed.
    """

    number: int
    values: Mapping[str, Any]
    valid_by_seed: tuple[float, ...] = ()
    best_epochs: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    @property
    def valid(self) -> float | None:
        """What counts: the mean over the seeds; None where it failed."""
        return statistics.fmean(self.valid_by_seed) if self.error is None else None

    @property
    def label(self) -> str:
        return ", ".join(f"{path}={_short(value)}" for path, value in self.values.items())


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError("sweeps are kept by Optuna, which is not installed: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _read_terms(option: str, terms: Sequence[str], base: ExperimentConfig) -> dict[str, Any]:
    """Reads "model.dropout=0.2,0.4" of a grid; "model.num_layers=1:3", "train.loss=ce|bpr" of a space.

    Raises:
      ValueError: for a setting that is unknown (the nearest are shown) or cannot be varied, or values that are none.
    """
    parts = {"model": base.model, "train": base.train}
    hints = {f"{part}.{n}": hint for part, of in parts.items() for n, hint in typing.get_type_hints(type(of)).items()}
    known = [path for path in flat(base.to_dict()) if path in hints]
    refused = {
        "train.seed": "seeds are given by --seeds, and a trial is their mean",
        "model.vocab_size": "the data decide it",
        "model.name": "every model has settings of its own; sweep one, or compare them",
        "model.module": "every model has settings of its own; sweep one, or compare them",
    }
    found: dict[str, Any] = {}
    for term in terms:
        path, equals, text = term.partition("=")
        require(equals != "", f"--{option} {term}: expected a setting, = and its values")
        near = cli.nearest(path, known)
        require(path in known, f"--{option} {path} is no setting that can be varied; nearest: {near}")
        require(path not in refused, f"--{option} {path}: {refused.get(path)}")
        require(path not in found, f"--{option} {path} is there twice; give all its values at once")
        try:
            found[path] = _distribution(option, path, text, hints[path])
        except ValueError as error:
            raise ValueError(f"--{option} {path}={text}: {error}") from None
    return found


def _distribution(option: str, path: str, text: str, hint: Any) -> Any:
    distributions = _optuna().distributions
    if option == "space" and ":" in text:
        *words, low, high = text.split(":")
        whole = hint in (int, int | None)
        if words not in ([], ["log"], ["int"]) or (words == ["int"] and not whole):
            raise ValueError("expected low:high, or log:low:high for even steps in the logarithm")
        ends = cli.read_value(path, hint, low), cli.read_value(path, hint, high)
        if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
            raise ValueError("it is not a number; give choices as in a|b")
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        return kind(*ends, log=words == ["log"])
    separator, least = {"grid": (",", 1), "space": ("|", 2)}[option]
    values = [cli.read_value(path, hint, part.strip()) for part in text.split(separator) if part.strip()]
    if repeated := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{repeated[0]} is there {values.count(repeated[0])} times")
    require(len(values) >= least, f"give at least {least} of its values with {separator} between them, or low:high")
    return distributions.CategoricalDistribution(values)


def parse(argv: Sequence[str]) -> Plan:
    """Reads the command line.

    Raises:
      ValueError: for an unknown experiment, setting or option (the nearest are shown), a value of a wrong type, a
        setting both varied and fixed, or options that do not go together.
      ModuleNotFoundError: Optuna is not installed.
    """
    file, model = chosen(argv)
    name = file.name
    default = Arguments(model, file.data, file.train, file.eval, file.parallel, name)
    given = cli.parse_settings(
        Arguments, argv, default, prog="experiments.sweep", description=f"Experiments: {', '.join(config_names())}"
    )
    if given.eval.baselines != file.eval.baselines:
        raise ValueError("--eval.baselines is not for sweeps: trials are compared with each other")
    # What costs a training of its own is no part of a trial.
    measured = dataclasses.replace(given.eval, baselines=("popularity",))
    base = ExperimentConfig(file.name, given.model, given.data, given.train, measured, given.parallel)
    require_comparable(base, "experiments.sweep")
    if bool(given.grid) == bool(given.space):
        raise ValueError(
            "give --grid, as in --grid train.learning_rate=1e-3,3e-3, or --space and --trials; one of them"
        )
    if bool(given.space) != (given.trials is not None):
        raise ValueError("--space and --trials belong together: where to look, and how often")
    require(given.trials is None or given.trials >= 1, f"--trials={given.trials} must be at least 1")
    space = _read_terms("grid", given.grid, base) | _read_terms("space", given.space, base)
    before, now = flat(file.to_dict()), flat(base.to_dict())
    if both := [path for path in space if before.get(path, now[path]) != now[path]]:
        raise ValueError(f"--{both[0]} is given and varied; give it once")
    trials = given.trials or math.prod(len(values.choices) for values in space.values())
    seeds = parse_seeds(given.seeds, base.train.seed)
    folder = given.folder or pathlib.Path("runs") / "sweep" / base.name
    sampler = given.sampler if given.space else None
    return Plan(name, base, space, trials, seeds, sampler, given.sampler_seed, folder)


def open_study(plan: Plan, fingerprint: str) -> Any:
    """Opens Optuna's journal of the sweep, or begins it.

    Raises:
      ValueError: the folder holds another sweep; the first differences are listed.
    """
    optuna = _optuna()
    settings = {path: value for path, value in flat(plan.base.to_dict()).items() if path not in FREE}
    # The seeds stand for the one of the settings.
    settings.pop("train.seed")
    asked = {"config": plan.name, "settings": settings, "seeds": plan.seeds, "data_fingerprint": fingerprint}
    asked |= {"space": {path: str(values) for path, values in plan.space.items()}}
    asked |= {"sampler": plan.sampler, "sampler_seed": plan.sampler_seed if plan.sampler else None}
    asked = json.loads(json.dumps(asked))
    begun = any(plan.folder.glob("trial_*"))
    plan.folder.mkdir(parents=True, exist_ok=True)
    journal = plan.folder / JOURNAL
    if journal.exists() and not (written := journal.read_bytes()).endswith(b"\n"):
        # Optuna goes on in the middle of a line that was cut short, and cannot read it again.
        write_atomically(journal, written[: written.rfind(b"\n") + 1])
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend), study_name="sweep", direction="maximize", load_if_exists=True
    )
    there = study.user_attrs.get("plan")
    if there is None:
        require(not begun, f"{plan.folder} has trials and no {JOURNAL} of them; choose another --folder")
        study.set_user_attr("plan", asked)
    elif found := differences(flat(there), flat(asked)):
        raise ValueError(
            f"{plan.folder} holds another sweep: {listed(found, 130)}; choose another --folder, or give the settings "
            "of that sweep"
        )
    if plan.sampler is None:
        combinations = list(itertools.product(*(values.choices for values in plan.space.values())))
        for combination in combinations[len(study.get_trials(deepcopy=False)) :]:
            study.enqueue_trial(dict(zip(plan.space, combination, strict=True)))
    return study


def run_trials(plan: Plan, study: Any, console: Console) -> Iterator[Trial]:
    """Yields the trials as they are done; those of earlier calls first.

    What is drawn follows from the seed, the trial's number and the results before it, so that a search that was
    interrupted draws what an uninterrupted one would have.
    """
    optuna = _optuna()
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    waiting = optuna.trial.TrialState.WAITING
    for number in range(plan.trials):
        if sum(trial.state != waiting for trial in study.get_trials(deepcopy=False)) <= number:
            seed = int(np.random.SeedSequence([plan.sampler_seed, number]).generate_state(1)[0])
            study.sampler = samplers[plan.sampler or "random"](seed=seed)
            study.ask(fixed_distributions=plan.space)
        begun = study.get_trials(deepcopy=False)[number]
        values = begun.system_attrs.get("fixed_params", begun.params)
        if values.keys() == plan.space.keys():
            trial = run_trial(plan, number, {path: values[path] for path in plan.space}, console)
        else:  # A kill while Optuna wrote the draw.
            trial = Trial(number, {}, error="interrupted before its values were drawn")
        if begun.state.is_finished():
            pass
        elif trial.error is None:
            study.tell(number, trial.valid)
        else:
            study.tell(number, state=optuna.trial.TrialState.FAIL)
        yield trial


def read_trial(plan: Plan, number: int, values: Mapping[str, Any]) -> Trial | None:
    """Returns what the trial's folder says, or None while it is not done."""
    error = plan.trial_folder(number) / ERROR
    if error.is_file():
        return Trial(number, values, error=error.read_text(encoding="utf-8").strip())
    folders = [plan.run_folder(number, seed) for seed in plan.seeds]
    if not all(map(is_finished, folders)):
        return None
    found = [read_results(folder) for folder in folders]
    valid = tuple(one["valid"][plan.base.eval.monitor] for one in found)
    seconds = sum(one["seconds_per_epoch"] * one["epochs"] for one in found)
    return Trial(number, values, valid, tuple(one["best_epoch"] for one in found), seconds)


def run_trial(plan: Plan, number: int, values: Mapping[str, Any], console: Console) -> Trial:
    """Trains what is missing of a trial; its error, if any, is kept in its folder.

    Raises:
      Interrupted: a signal asked to stop.
    """
    if (done := read_trial(plan, number, values)) is not None:
        return done

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    label, error = f"trial {number + 1} of {plan.trials}: {Trial(number, values).label}", None
    for seed in plan.seeds:  # One by one: after a failure the other seeds are not worth their time.
        folder = plan.run_folder(number, seed)
        if error is not None or is_finished(folder):
            continue
        try:
            job = Job(f"{label}, seed {seed}", folder, plan.options(values, seed))
        except ValueError as refusal:
            error = f"the settings are refused: {refusal}"
            continue
        say(f"{job.label}: training, see {job.output}")
        # What the queue reports has test numbers in it.
        result = train_all([job], report=lambda _: None)
        if result.stopped_by is not None:
            raise Interrupted(STOPPED, result.stopped_by)
        error = result.failures.get(job.label)
    if error is not None:
        plan.trial_folder(number).mkdir(parents=True, exist_ok=True)
        write_atomically(plan.trial_folder(number) / ERROR, (error + "\n").encode())
    trial = read_trial(plan, number, values)
    outcome = f"failed: {trial.error}" if trial.error else f"valid {plan.base.eval.monitor} {trial.valid:.4f}"
    say(f"{label}: {outcome}")
    return trial


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    """Sorts by validation, best first, the earlier one first among equals; failed trials last."""
    return sorted(trials, key=lambda trial: (trial.error is not None, -(trial.valid or 0.0)))


def _cells(plan: Plan, trial: Trial) -> list[str]:
    values = [_short(trial.values.get(path, "–")) for path in plan.space]
    found = ["failed", "–", "–"]
    if trial.valid is not None:
        spread = f" ± {statistics.stdev(trial.valid_by_seed):.4f}" if len(plan.seeds) > 1 else ""
        found = [f"{trial.valid:.4f}{spread}", ", ".join(map(str, trial.best_epochs)), f"{trial.seconds:.0f}"]
    return [str(trial.number + 1), *values, *found]


def markdown(plan: Plan, trials: Sequence[Trial], test: Mapping[str, float] | None) -> str:
    """Returns the table of the trials, best first, the failures, and the test numbers of the best."""
    failed = [f"- trial {trial.number + 1} failed: {_first_line(trial.error)}" for trial in trials if trial.error]
    seeds = f"seed {plan.seeds[0]}" if len(plan.seeds) == 1 else f"mean and deviation of seeds {plan.seeds}"
    lines = [f"# Sweep of {plan.name}", ""]
    lines += [f"{len(trials)} of {plan.trials} trials, {len(failed)} failed; {seeds}; seconds of training", ""]
    header = ["trial", *plan.space, f"valid {plan.base.eval.monitor}", "best epoch", "seconds"]
    lines += cli.markdown_table(header, [_cells(plan, trial) for trial in in_order(trials)], left=len(header))
    lines += [*failed, ""] if failed else []
    if test is not None:
        best = in_order(trials)[0]
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in test.items())
        lines += [f"Best: trial {best.number + 1}, {best.label}. Test: {numbers}. {WHY_ONE_TEST}", ""]
    return "\n".join(lines)


def write_report(plan: Plan, trials: Sequence[Trial], about: Mapping[str, Any]) -> str:
    """Writes sweep.json and sweep.md, and returns the latter; test numbers are there once every trial is done."""
    ordered, test = in_order(trials), None
    if len(trials) == plan.trials and ordered[0].error is None:
        found = [read_results(plan.run_folder(ordered[0].number, seed))["test"] for seed in plan.seeds]
        test = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
    record = {
        "environment": {**about, "command": cli.command_without_folders(about["command"])},
        "config": plan.name,
        "settings": cli.settings_without_folders(plan.base),
        "varied": list(plan.space),
        "seeds": plan.seeds,
        "monitor": plan.base.eval.monitor,
        "trials": [
            {**dataclasses.asdict(trial), "valid": trial.valid, "folder": plan.trial_folder(trial.number).name}
            for trial in ordered
        ],
        "best": None if test is None else {"number": ordered[0].number, "test": test, "note": WHY_ONE_TEST},
    }
    text = markdown(plan, trials, test)
    cli.write_json(plan.folder / RECORD, record)
    write_atomically(plan.folder / MARKDOWN, text.encode())
    return text


def run(plan: Plan, console: Console) -> int:
    """Runs the trials that are missing and reports all; returns the exit code."""
    log = load_log(plan.base.data)
    console.print(log.statistics.table(plan.base.data.name))
    base = dataclasses.replace(plan.base, data=with_precision(plan.base.data, log))
    plan = dataclasses.replace(plan, base=base)
    study = open_study(plan, log.fingerprint)
    about = environment(log.fingerprint)
    del log
    console.print(f"{plan.trials} trials of {len(plan.seeds)} trainings each, in {plan.folder}", soft_wrap=True)
    trials: list[Trial] = []
    text, stopped = "", None
    try:
        for trial in run_trials(plan, study, console):
            trials.append(trial)
            text = write_report(plan, trials, about)
    except Interrupted as interrupted:
        stopped = interrupted
    except KeyboardInterrupt:  # Between two trainings.
        stopped = Interrupted(STOPPED, signal.SIGINT)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if stopped is not None:
        console.print(str(stopped))
        return stopped.exit_code
    if all(trial.error for trial in trials):
        errors = sorted(f"trial {trial.number + 1}: {_first_line(trial.error)}" for trial in trials)
        raise ValueError("every trial failed:\n  " + "\n  ".join(errors))
    console.print(f"written: {plan.folder / MARKDOWN}, {plan.folder / RECORD}", soft_wrap=True)
    return 0


@cli.program
def main(argv: list[str]) -> int:
    """Reads the command line and runs the sweep as the only one in its folder."""
    plan = parse(argv)
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder.resolve()):
        return run(plan, Console())


if __name__ == "__main__":
    raise SystemExit(main())
