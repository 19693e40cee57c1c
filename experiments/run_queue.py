"""Trains several runs, each in a process of its own, a few at a time; stops them together and takes them up again."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tim4rec_jax.run_dir import METRICS, RESULTS, TEST_RANKS, read_results
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.signals import handled

ROOT = pathlib.Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2


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


@dataclass
class _Running:
    """A job under way.

    Attributes:
      job: which.
      process: its training.
      processors: its share; empty is all.
      started: when, by time.perf_counter.
      printed_before: bytes in its output file from earlier processes.
      told: stop requests it was sent.
    """

    job: Job
    process: subprocess.Popen
    processors: frozenset[int]
    started: float
    printed_before: int
    told: int = 0


def is_finished(folder: pathlib.Path) -> bool:
    """Tells whether a run was trained to its end and tested, and not begun again since."""
    if not all((folder / name).is_file() for name in (METRICS, RESULTS, TEST_RANKS)):
        return False
    lines = [line["kind"] for line in read_metrics(folder) if line["kind"] != "event"]
    return bool(lines) and lines[-1] == "test"


def processor_shares(jobs: int) -> list[frozenset[int]]:
    """Splits the processors this process may use into a share a job; where the system cannot pin, all share all.

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
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def command(job: Job) -> list[str]:
    """The command line of a job's training."""
    # -P here and the path below: the training runs the code of this very program, whatever the current folder holds.
    return [sys.executable, "-P", "-m", "experiments.train", *job.options, f"--run_dir={job.folder}", "--resume"]


def _start(job: Job, processors: frozenset[int]) -> _Running:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with job.output.open("ab") as output, _pinned(processors):
        printed_before = output.tell()
        process = subprocess.Popen(
            command(job), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it once, from us, and not a second time from the terminal
        )  # fmt: skip
    return _Running(job, process, processors, time.perf_counter(), printed_before)


def _error(running: _Running) -> str:
    """Says why a training failed: its error line, or the end of what it printed."""
    job, status = running.job, running.process.returncode
    lines = job.output.read_bytes()[running.printed_before :].decode(errors="replace").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    shown = lines[starts[-1] :] if starts else lines[-3:]
    reason = "\n  ".join(shown).removeprefix("error: ") or "it printed nothing"
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{reason}\n  ({ended}; all it printed: {job.output})"


def _end(running: _Running, stopped: bool, report: Callable[[str], None]) -> str | None:
    """Notes the end of a training; returns its error if it failed."""
    job, status = running.job, running.process.returncode
    seconds = time.perf_counter() - running.started
    if status == 0 and is_finished(job.folder):
        results = read_results(job.folder)
        scores = "  ".join(f"{name} {value:.4f}" for name, value in list(results["test"].items())[:3])
        report(f"{job.label}: {scores}  best epoch {results['best_epoch']} of {results['epochs']}  {seconds:.0f} s")
        return None
    if stopped:
        report(f"{job.label}: stopped")
        return None
    error = _error(running)
    report(f"{job.label}: failed: {error}")
    return error


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
                    running.append(_start(job, free.pop()))
                time.sleep(POLL_SECONDS)
                for one in running:
                    for number in requests[one.told :]:
                        one.process.send_signal(number)
                    one.told = len(requests)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.processors)
                    error = _end(one, bool(requests), report)
                    if error is not None:
                        failures[one.job.label] = error
        finally:
            for one in running:  # an error here must not leave trainings behind
                one.process.terminate()
                one.process.wait()
    return QueueResult(failures, requests[0] if requests else None)
