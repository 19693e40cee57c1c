"""Trains an experiment with many values of some settings, and puts the trials in the order of validation.

    python -m experiments.sweep --config=ml100k_tim4rec --grid train.learning_rate=1e-3,3e-3 model.dropout=0.2,0.4
    python -m experiments.sweep --config=ml100k_tim4rec --trials=20 --train.epochs=30 --space \
        train.learning_rate=log:1e-4:1e-2 model.num_layers=1:3 model.time_dropout=0.0:0.5 train.loss=ce|bpr --seeds=2

(Quote a term with | in it for the shell.) A grid takes every combination; a space is searched by Optuna's TPE (pip
install 'tim4rec_jax[sweep]'). Any other setting is an option by its path and holds for all trials. A trial trains a
run folder for each seed under runs/sweep/<config>/ and counts by the mean validation metric (eval.monitor) of their
best epochs. The test part decides nothing: it is shown for the best trial alone.
The same command goes on after Ctrl-C, SIGTERM, a crash or a kill; more --trials go on from a finished search. A trial
that fails is kept as failed, its error in error.txt; remove that file to have it tried again. Writes sweep.md and
sweep.json into the folder. Exit codes: 0 done, 2 an error or no trial that worked, 130 stopped by Ctrl-C, 0 by SIGTERM.
"""

import dataclasses
import json
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.command_line import run_program
from experiments.comparison_plan import options
from experiments.record import command_without_folders, settings_without_folders
from experiments.run_queue import Job, is_finished, train_all
from experiments.sweep_plan import Plan, Range, parse, record_plan
from tim4rec_jax.data.interactions import load_log, with_precision
from tim4rec_jax.files import locked, write_atomically
from tim4rec_jax.run_dir import environment, read_results
from tim4rec_jax.training.signals import exit_code

ERROR, MARKDOWN, RECORD, JOURNAL = "error.txt", "sweep.md", "sweep.json", "optuna.journal"
WHY_ONE_TEST = (
    "Validation chose the best trial. Test numbers are shown for it alone: choosing among trials by their test numbers "
    "would fit the settings to the test part, and the number shown would no longer measure unseen data."
)


class Stopped(Exception):
    """A signal asked to stop; the state of the training is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass(frozen=True)
class Trial:
    """One choice of values and what became of it.

    Attributes:
      number: from 0, in the order they were begun.
      values: by path of the setting.
      valid: the monitored metric of each seed's best epoch; empty unless all are trained.
      best_epochs: likewise.
      seconds: of training, all seeds.
      error: why it failed.
    """

    number: int
    values: Mapping[str, Any]
    valid: tuple[float, ...] = ()
    best_epochs: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    @property
    def score(self) -> float:
        """What counts: the mean over the seeds."""
        return statistics.fmean(self.valid)


def describe(values: Mapping[str, Any]) -> str:
    """Returns values in a line."""
    return ", ".join(f"{path}={_short(value)}" for path, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_trial(plan: Plan, number: int, values: Mapping[str, Any]) -> Trial | None:
    """Returns what the trial's folder says, or None while it is not done."""
    error = plan.trial_folder(number) / ERROR
    if error.is_file():
        return Trial(number, values, error=error.read_text(encoding="utf-8").strip())
    folders = [plan.run_folder(number, seed) for seed in plan.seeds]
    if not all(map(is_finished, folders)):
        return None
    found = [read_results(folder) for folder in folders]
    return Trial(
        number, values, valid=tuple(one["valid"][plan.base.eval.monitor] for one in found),
        best_epochs=tuple(one["best_epoch"] for one in found),
        seconds=sum(one["seconds_per_epoch"] * one["epochs"] for one in found),
    )  # fmt: skip


def run_trial(plan: Plan, number: int, values: Mapping[str, Any], console: Console) -> Trial:
    """Trains what is missing of a trial; its error, if any, is kept in its folder.

    Raises:
      Stopped: a signal asked to stop.
    """
    if (done := read_trial(plan, number, values)) is not None:
        return done
    label = f"trial {number + 1} of {plan.trials}: {describe(values)}"
    error = None
    try:
        jobs = [
            Job(f"{label}, seed {seed}", plan.run_folder(number, seed), options(plan.config(values, seed), plan.name))
            for seed in plan.seeds
            if not is_finished(plan.run_folder(number, seed))
        ]
    except ValueError as refusal:
        jobs, error = [], f"the settings are refused: {refusal}"
    for job in jobs:  # One by one: after a failure the other seeds are not worth their time.
        console.print(f"{job.label}: training, see {job.output}", markup=False, highlight=False, soft_wrap=True)
        # What the queue reports has test numbers in it.
        result = train_all([job], report=lambda _: None)
        if result.stopped_by is not None:
            raise Stopped(result.stopped_by)
        error = result.failures.get(job.label)
        if error is not None:
            break
    if error is not None:
        plan.trial_folder(number).mkdir(parents=True, exist_ok=True)
        write_atomically(plan.trial_folder(number) / ERROR, (error + "\n").encode())
    trial = read_trial(plan, number, values)
    outcome = f"failed: {trial.error}" if trial.error else f"valid {plan.base.eval.monitor} {trial.score:.4f}"
    console.print(f"{label}: {outcome}", markup=False, highlight=False, soft_wrap=True)
    return trial


def run_grid(plan: Plan, console: Console) -> Iterator[Trial]:
    """Yields the trials of a grid as they are done."""
    for number, values in enumerate(plan.combinations()):
        yield run_trial(plan, number, values, console)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--space is searched by Optuna, which is not installed: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def run_search(plan: Plan, console: Console) -> Iterator[Trial]:
    """Yields the trials of a search as they are done; those of earlier calls first.

    A trial's values follow from the seed, its number and the results before it, so that a search that was interrupted
    draws what an uninterrupted one would have.
    """
    optuna = _optuna()
    journal = optuna.storages.journal.JournalFileBackend(str(plan.folder / JOURNAL))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal), study_name="sweep", direction="maximize", load_if_exists=True
    )
    where = {path: _distribution(optuna, space) for path, space in plan.space.items()}
    for number in range(plan.trials):
        begun = study.get_trials(deepcopy=False)
        if number < len(begun):
            # A kill while Optuna wrote the draw leaves it without values.
            values = begun[number].params if set(begun[number].params) == set(where) else None
            running = not begun[number].state.is_finished()
        else:
            seed = np.random.SeedSequence([plan.sampler_seed, number]).generate_state(1)[0]
            study.sampler = optuna.samplers.TPESampler(seed=int(seed))
            values, running = study.ask(fixed_distributions=where).params, True
        if values is None:
            trial = Trial(number, {}, error="interrupted before its values were drawn")
        else:
            trial = run_trial(plan, number, {path: values[path] for path in where}, console)
        if running and trial.error is None:
            study.tell(number, trial.score)
        elif running:
            study.tell(number, state=optuna.trial.TrialState.FAIL)
        yield trial


def _distribution(optuna: ModuleType, space: "Range | tuple[Any, ...]") -> Any:
    if isinstance(space, tuple):
        return optuna.distributions.CategoricalDistribution(space)
    kind = optuna.distributions.IntDistribution if space.whole else optuna.distributions.FloatDistribution
    return kind(space.low, space.high, log=space.log)


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    """Sorts by validation, best first, the earlier one first among equals; failed trials last."""
    return sorted(trials, key=lambda trial: (trial.error is not None, -trial.score if trial.error is None else 0))


def test_of_best(plan: Plan, best: Trial) -> dict[str, float]:
    """Returns the best trial's test numbers, means over its seeds."""
    found = [read_results(plan.run_folder(best.number, seed))["test"] for seed in plan.seeds]
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def _cells(plan: Plan, trial: Trial) -> list[str]:
    values = [_short(trial.values[path]) if path in trial.values else "–" for path in plan.varied]
    if trial.error is not None:
        return [str(trial.number + 1), *values, "failed", "–", "–"]
    spread = f" ± {statistics.stdev(trial.valid):.4f}" if len(trial.valid) > 1 else ""
    epochs = ", ".join(map(str, trial.best_epochs))
    return [str(trial.number + 1), *values, f"{trial.score:.4f}{spread}", epochs, f"{trial.seconds:.0f}"]


def _header(plan: Plan) -> list[str]:
    return ["trial", *plan.varied, f"valid {plan.base.eval.monitor}", "best epoch", "seconds"]


def _summary(plan: Plan, trials: Sequence[Trial]) -> str:
    failed = sum(trial.error is not None for trial in trials)
    seeds = f"seed {plan.seeds[0]}" if len(plan.seeds) == 1 else f"mean and deviation of seeds {plan.seeds}"
    return f"{len(trials)} of {plan.trials} trials, {failed} failed; {seeds}; seconds of training"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def markdown(plan: Plan, trials: Sequence[Trial], test: Mapping[str, float] | None) -> str:
    """Returns the table of the trials, best first, the failures, and the test numbers of the best."""
    lines = [f"# Sweep of {plan.name}", "", _summary(plan, trials), ""]
    rows = [_header(plan), ["---"] * len(_header(plan)), *(_cells(plan, trial) for trial in in_order(trials))]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    failed = [trial for trial in trials if trial.error is not None]
    if failed:
        lines += ["", *(f"- trial {trial.number + 1} failed: {_first_line(trial.error)}" for trial in failed)]
    if test is not None:
        best = in_order(trials)[0]
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in test.items())
        lines += ["", f"Best: trial {best.number + 1}, {describe(best.values)}. Test: {numbers}. {WHY_ONE_TEST}"]
    return "\n".join(lines) + "\n"


def table(plan: Plan, trials: Sequence[Trial]) -> Table:
    """The same table for the terminal."""
    shown = Table(title=f"{plan.name}: {_summary(plan, trials)}")
    for name in _header(plan):
        shown.add_column(name, justify="right")
    for trial in in_order(trials):
        shown.add_row(*_cells(plan, trial))
    return shown


def write_report(plan: Plan, trials: Sequence[Trial], about: Mapping[str, Any]) -> dict[str, float] | None:
    """Writes sweep.md and sweep.json; returns the best trial's test numbers, or None before every trial is done."""
    ordered = in_order(trials)
    done = len(trials) == plan.trials and ordered[0].error is None
    test = test_of_best(plan, ordered[0]) if done else None
    record = {
        "environment": {**about, "command": command_without_folders(about["command"])},
        "config": plan.name,
        "settings": settings_without_folders(plan.base),
        "varied": plan.varied,
        "seeds": plan.seeds,
        "monitor": plan.base.eval.monitor,
        "trials": [
            {
                "number": trial.number, "values": dict(trial.values), "error": trial.error,
                "valid": trial.score if trial.valid else None, "valid_by_seed": trial.valid,
                "best_epochs": trial.best_epochs, "seconds": trial.seconds,
                "folder": plan.trial_folder(trial.number).name,
            }
            for trial in ordered
        ],
        "best": None if test is None else {"number": ordered[0].number, "test": test, "note": WHY_ONE_TEST},
    }  # fmt: skip
    write_atomically(plan.folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    write_atomically(plan.folder / MARKDOWN, markdown(plan, trials, test).encode())
    return test


def run(plan: Plan, console: Console) -> int:
    """Runs the trials that are missing and reports all; returns the exit code."""
    if plan.space:
        _optuna()  # Missing, it is missed before anything is trained or written.
    log = load_log(plan.base.data)
    console.print(log.statistics.table(plan.base.data.name))
    base = dataclasses.replace(plan.base, data=with_precision(plan.base.data, log))
    plan = dataclasses.replace(plan, base=base)
    record_plan(plan, log.fingerprint)
    about = environment(log.fingerprint)
    del log
    console.print(f"{plan.trials} trials of {len(plan.seeds)} trainings each, in {plan.folder}", soft_wrap=True)
    trials: list[Trial] = []
    test, stopped = None, None
    try:
        for trial in run_grid(plan, console) if plan.grid else run_search(plan, console):
            trials.append(trial)
            test = write_report(plan, trials, about)
    except Stopped as stop:
        stopped = stop.signal
    except KeyboardInterrupt:  # Between two trainings.
        stopped = signal.SIGINT
    if trials:
        console.print(table(plan, trials))
    if stopped is not None:
        console.print("stopped; the same command goes on from here")
        return exit_code(stopped)
    if test is None:
        errors = {f"trial {trial.number + 1}: {_first_line(trial.error)}" for trial in trials if trial.error}
        raise ValueError("every trial failed:\n  " + "\n  ".join(sorted(errors)))
    best = in_order(trials)[0]
    console.print(f"best: trial {best.number + 1}, {describe(best.values)}", markup=False, soft_wrap=True)
    console.print("test: " + ", ".join(f"{name} {value:.4f}" for name, value in test.items()), soft_wrap=True)
    console.print(f"{WHY_ONE_TEST}\nwritten: {plan.folder / MARKDOWN}, {plan.folder / RECORD}", soft_wrap=True)
    return 0


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    plan = parse(argv)
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder.resolve()):
        return run(plan, Console())


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
