"""The queue of trainings, with short programs in their place: order, failures, stop requests, locks, processors."""

import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from experiments import runs
from experiments.runs import Job, is_finished, processor_shares, train_all

FINISH = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
(folder / "processors").write_text(" ".join(map(str, sorted(os.sched_getaffinity(0)))))
(folder / "metrics.jsonl").write_text('{"kind": "test"}\\n')
(folder / "test_ranks.parquet").write_text("")
(folder / "results.json").write_text(json.dumps({"test": {"hit@10": 0.5}, "best_epoch": 1, "epochs": 2}))
"""
FAIL = "print('one line'); print('error: the loss is nan\\n  at step 3'); raise SystemExit(2)"
CRASH = "raise KeyError('no such thing')"
QUIET = "import os; os.kill(os.getpid(), 9)"
# What is waited for by sigwait must be blocked, or it acts as usual.
WAIT = """
import pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
(folder / "ready").touch()
number = signal.sigwait([signal.SIGINT, signal.SIGTERM])
(folder / "saved").write_text(str(int(number)))
raise SystemExit(0 if number == signal.SIGTERM else 130)
"""


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """A job's only option is the program to run."""
    monkeypatch.setattr(runs, "command", lambda job: [sys.executable, "-c", *job.options, str(job.folder)])
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)


def _job(tmp_path: pathlib.Path, name: str, program: str = FINISH) -> Job:
    return Job(name, tmp_path / "runs" / name, (program,))


def _when_there(file: pathlib.Path, action) -> threading.Thread:
    """Does something once a file is there."""

    def wait():
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_jobs_are_trained_in_order(tmp_path):
    lines = []
    jobs = [_job(tmp_path, name) for name in "bac"]
    result = train_all(jobs, report=lines.append)
    assert (result.failures, result.stopped_by) == ({}, None)
    assert [line.split(":")[0] for line in lines] == ["b", "b", "a", "a", "c", "c"]
    assert "hit@10 0.5000  best epoch 1 of 2" in lines[1]
    assert all(is_finished(job.folder) for job in jobs)


def test_a_failure_is_told_and_the_others_go_on(tmp_path):
    jobs = [_job(tmp_path, *pair) for pair in [("fails", FAIL), ("crashes", CRASH), ("dies", QUIET), ("works", FINISH)]]
    failures = train_all(jobs, report=lambda _: None).failures
    assert list(failures) == ["fails", "crashes", "dies"]
    assert failures["fails"].startswith("the loss is nan\n    at step 3\n  (exit status 2; all it printed:")
    assert "one line" not in failures["fails"] and str(jobs[0].output) in failures["fails"]
    assert "KeyError: 'no such thing'" in failures["crashes"] and "exit status 1" in failures["crashes"]
    assert failures["dies"].startswith("it printed nothing\n  (killed by signal 9")
    assert is_finished(jobs[3].folder)


def test_an_earlier_error_is_not_told_again(tmp_path):
    train_all([_job(tmp_path, "run", FAIL)], report=lambda _: None)
    failures = train_all([_job(tmp_path, "run", "print('something else'); raise SystemExit(3)")]).failures
    assert failures["run"].startswith("something else\n  (exit status 3")


def test_success_without_results_is_a_failure(tmp_path):
    assert (
        "exit status 0" in train_all([_job(tmp_path, "run", "print('hello')")], report=lambda _: None).failures["run"]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_is_passed_on_and_nothing_else_starts(tmp_path, number):
    jobs = [_job(tmp_path, name, WAIT) for name in ("one", "two")]
    before = signal.getsignal(number)
    thread = _when_there(jobs[0].folder / "ready", lambda: os.kill(os.getpid(), number))
    result = train_all(jobs, report=lambda _: None)
    thread.join()
    assert (result.failures, result.stopped_by) == ({}, number)
    assert (jobs[0].folder / "saved").read_text() == str(int(number))
    assert not jobs[1].folder.exists()
    assert signal.getsignal(number) == before


REPORTS_LATE = """
import pathlib, sys, time
ready = pathlib.Path(sys.argv[1]).parent / "waits" / "ready"
while not ready.exists():
    time.sleep(0.01)
"""


def test_an_error_leaves_no_training_behind(tmp_path):
    jobs = [_job(tmp_path, "waits", WAIT), _job(tmp_path, "ends", REPORTS_LATE)]

    def report(line: str) -> None:
        if line.startswith("ends: failed"):
            raise OSError("nobody listens")

    with pytest.raises(OSError, match="nobody listens"):
        train_all(jobs, at_once=2, report=report)
    assert (jobs[0].folder / "saved").read_text() == str(int(signal.SIGTERM))


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors to share"
)
def test_two_at_once_share_the_processors(tmp_path):
    usable = sorted(os.sched_getaffinity(0))
    jobs = [_job(tmp_path, name) for name in ("one", "two")]
    assert train_all(jobs, at_once=2, report=lambda _: None).failures == {}
    shares = [[int(n) for n in (job.folder / "processors").read_text().split()] for job in jobs]
    assert sorted(shares[0] + shares[1]) == usable and not set(shares[0]) & set(shares[1])
    assert sorted(os.sched_getaffinity(0)) == usable


def test_more_jobs_than_processors_are_refused():
    with pytest.raises(ValueError, match=r"jobs=1000 is more than the \d+ processors at hand; set --jobs="):
        processor_shares(1000)
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        processor_shares(0)


def test_a_run_that_was_begun_again_is_not_finished(tmp_path):
    job = _job(tmp_path, "run")
    assert not is_finished(job.folder)
    train_all([job], report=lambda _: None)
    assert is_finished(job.folder)
    with (job.folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "event", "message": "a note"}\n')
        lines.flush()
        assert is_finished(job.folder)
        lines.write('{"kind": "train", "step": 9, "loss": 1.0}\n')
    assert not is_finished(job.folder)
