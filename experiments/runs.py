"""Several runs: their settings as options of `experiments.train`, their seeds, and the queue that trains them.

Each is trained in a process of its own, a few at a time; they are stopped together and taken up again.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import train
from experiments.configs import load_config
from tim4rec_jax.checks import require
from tim4rec_jax.config import ExperimentConfig, flat
from tim4rec_jax.data.splits import require_held_out
from tim4rec_jax.run_dir import CHANGEABLE_ON_RESUME, METRICS, RESULTS, TEST_RANKS, read_results
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.signals import handled

ROOT = pathlib.Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2
# May change between two calls for the same runs: no run's numbers depend on them.
FREE = {name for name in CHANGEABLE_ON_RESUME if name not in ("train.epochs", "train.max_steps", "train.patience")}


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Says of each setting, by path, that is not the same what it is there and what is asked for."""
    return [
        f"{path}: {there.get(path, 'absent')!r} there, {asked.get(path, 'absent')!r} asked for"
        for path in sorted({*there, *asked})
        if there.get(path) != asked.get(path)
    ]


def options(config: ExperimentConfig, name: str) -> tuple[str, ...]:
    """Returns the options of `experiments.train` that make an experiment's settings into `config`.

    Args:
      config: the settings wanted.
      name: the experiment to start from.
    """
    before, given = flat(load_config(name).to_dict()), [f"--config={name}"]
    for path, value in flat(config.to_dict()).items():
        needed = path == "model.module" and value is not None  # Without it the name is not known.
        if path == "name" or (path in before and before[path] == value and not needed):
            continue
        given += [f"--{path}", *map(str, value)] if isinstance(value, tuple) else [f"--{path}={value}"]
    if train.parse(given)[0] != config:
        raise ValueError(f"the settings of {name} cannot be given as options: {' '.join(given)}")
    return tuple(given)


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


def require_comparable(config: ExperimentConfig, program: str) -> None:
    """Raises ValueError where a program's many runs could not be started, or could not be measured against each other.

    Args:
      config: settings of the runs.
      program: what wants to train them; errors name it.
    """
    if config.parallel.several_processes:
        raise ValueError(
            "--parallel.coordinator and --parallel.distributed are for experiments.train: here each run is one process "
            "on this machine, on all its devices; train the runs one by one to spread them over machines"
        )
    require_held_out(config.data, program)
    require(
        config.train.init_from is None,
        f"--train.init_from={config.train.init_from} is for experiments.train: {program} compares what becomes of "
        "initial values",
    )


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
      label: what the lines printed about it begin with.
      folder: run folder; what it prints goes to a file beside it, `<folder>.log`.
      options: of `experiments.train`, the run folder and --resume excepted.
    """

    label: str
    folder: pathlib.Path
    options: tuple[str, ...]

    @property
    def output(self) -> pathlib.Path:
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class QueueResult:
    """What became of the jobs.

    Attributes:
      failures: the error of each job that failed, by its label.
      stopped_by: number of the signal that asked to stop; None if every job had its turn.
    """

    failures: dict[str, str]
    stopped_by: int | None


def is_finished(folder: pathlib.Path) -> bool:
    """Tells whether a run was trained to its end and tested, and not begun again since."""
    if not all((folder / name).is_file() for name in (METRICS, RESULTS, TEST_RANKS)):
        return False
    lines = [line["kind"] for line in read_metrics(folder) if line["kind"] != "event"]
    return bool(lines) and lines[-1] == "test"


def processor_shares(jobs: int) -> list[frozenset[int]]:
    """Splits the processors this process may use into a share per job; where the system cannot pin, all share all.

    Raises:
      ValueError: there are fewer processors than jobs.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return [frozenset()] * jobs
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < jobs:
        raise ValueError(f"jobs={jobs} is more than the {len(usable)} processors at hand; set --jobs={len(usable)}")
    return [frozenset(usable[i * len(usable) // jobs : (i + 1) * len(usable) // jobs]) for i in range(jobs)]


@contextlib.contextmanager
def _pinned(processors: frozenset[int]) -> Iterator[None]:
    """Confines this thread, and so a process it starts, to some processors; an empty set leaves it as it is."""
    before = os.sched_getaffinity(0) if processors else set()
    if processors:
        os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        if processors:
            os.sched_setaffinity(0, before)


def command(job: Job) -> list[str]:
    """The command line of a job's training."""
    # -P here and the path below: the training runs the code of this very program, whatever the current folder holds.
    return [sys.executable, "-P", "-m", "experiments.train", *job.options, f"--run_dir={job.folder}", "--resume"]


class _Training:
    """A job under way, on its share of the processors (empty is all)."""

    def __init__(self, job: Job, processors: frozenset[int]) -> None:
        self.job, self.processors, self.told, self.started = job, processors, 0, time.perf_counter()
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with job.output.open("ab") as output, _pinned(processors):
            self.printed_before = output.tell()
            self.process = subprocess.Popen(
                command(job),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A Ctrl-C reaches it once, from us, and not a second time from the terminal.
                start_new_session=True,
            )

    def pass_on(self, requests: Sequence[int]) -> None:
        for number in requests[self.told :]:
            self.process.send_signal(number)
        self.told = len(requests)

    def outcome(self) -> tuple[str, bool]:
        """Says in a line how it ended, and whether it succeeded."""
        status = self.process.returncode
        if status == 0 and is_finished(self.job.folder):
            results = read_results(self.job.folder)
            scores = "  ".join(f"{name} {value:.4f}" for name, value in list(results["test"].items())[:3])
            seconds = time.perf_counter() - self.started
            return f"{scores}  best epoch {results['best_epoch']} of {results['epochs']}  {seconds:.0f} s", True
        lines = self.job.output.read_bytes()[self.printed_before :].decode(errors="replace").splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        reason = "\n  ".join(lines[starts[-1] :] if starts else lines[-3:]).removeprefix("error: ")
        ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{reason or 'it printed nothing'}\n  ({ended}; all it printed: {self.job.output})", False


def train_all(jobs: Sequence[Job], *, at_once: int = 1, report: Callable[[str], None] = print) -> QueueResult:
    """Trains the jobs in order and goes on past one that fails.

    Ctrl-C and SIGTERM are passed to the trainings, which save their state; no further one is started.

    Args:
      jobs: what to train; a run that was begun is resumed, one that another process is training fails.
      at_once: trainings at a time; on Linux each then has its own share of the processors.
      report: receives a line when a training starts and when it ends.

    Raises:
      ValueError: more trainings at once than processors.
    """
    free = processor_shares(at_once)
    waiting, running, failures = list(jobs), [], {}
    requests: list[int] = []
    with handled(requests.append):
        try:
            while running or (waiting and not requests):
                while waiting and free and not requests:
                    job = waiting.pop(0)
                    report(f"{job.label}: training, see {job.output}")
                    running.append(_Training(job, free.pop()))
                time.sleep(POLL_SECONDS)
                for one in running:
                    one.pass_on(requests)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.processors)
                    line, succeeded = one.outcome()
                    if succeeded or not requests:
                        report(f"{one.job.label}: {'' if succeeded else 'failed: '}{line}")
                    else:
                        report(f"{one.job.label}: stopped")
                    if not succeeded and not requests:
                        failures[one.job.label] = line
        finally:
            for one in running:  # an error here must not leave trainings behind
                one.process.terminate()
                one.process.wait()
    return QueueResult(failures, requests[0] if requests else None)
