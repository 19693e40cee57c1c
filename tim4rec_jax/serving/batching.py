"""Requests that come one by one, answered together by one thread that owns the device and what is kept."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple


class Overloaded(Exception):
    """More waits than is taken in, or nothing more is taken in."""


class Job(NamedTuple):
    """One request: what is asked for, how many rows it is, and where its answer goes."""

    asked: Any
    rows: int
    answer: Future


class Batcher:
    """Collects jobs and hands them over in the order in which they came.

    What came while others were answered goes together. Only while several come at a time does the first of them wait
    for more: a job alone would wait for nobody.

    Attributes:
      waiting: rows taken in and not yet answered.
    """

    def __init__(
        self, answer: Callable[[Sequence[Any]], list[Any]], *, rows: int, seconds: float, most_waiting: int
    ) -> None:
        """Names what answers; `start` begins.

        Args:
          answer: called in the one thread with what is asked for; returns an answer or an exception for each.
          rows: as many are handed over at once without waiting for more.
          seconds: the first waits at most so long for others, after a batch of several.
          most_waiting: rows; beyond them jobs are refused.
        """
        self._answer, self._rows, self._seconds, self._most = answer, rows, seconds, most_waiting
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock, self._ended, self._several = threading.Lock(), False, False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.waiting = 0

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def submit(self, asked: Any, rows: int = 1) -> Future:
        """Takes a job in; returns where its answer will be.

        Raises:
          Overloaded: it is not taken in.
        """
        job = Job(asked, rows, Future())
        with self._lock:
            if self._ended:
                raise Overloaded("the service is stopping; ask another one")
            if self.waiting and self.waiting + rows > self._most:
                raise Overloaded(f"{self.waiting} rows are waiting, and at most {self._most} may; ask again later")
            self.waiting += rows
            self._queue.put(job)
        return job.answer

    def stop(self) -> None:
        """Answers what was taken in, and ends."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            jobs, going = self._collect()
            if not jobs:
                continue
            try:
                answers = self._answer([job.asked for job in jobs])
            except Exception as error:  # The thread must outlive whatever one batch does.
                answers = [error] * len(jobs)
            with self._lock:
                self.waiting -= sum(job.rows for job in jobs)
            for job, answer in zip(jobs, answers, strict=True):
                if not job.answer.set_running_or_notify_cancel():
                    continue
                if isinstance(answer, BaseException):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

    def _collect(self) -> tuple[list[Job], bool]:
        """Returns the next jobs, and whether others may follow."""
        first = self._queue.get()
        if first is None:
            return [], False
        jobs, rows, until = [first], first.rows, time.monotonic() + self._seconds * self._several
        while rows < self._rows:
            left = until - time.monotonic()
            try:
                job = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return jobs, False
            jobs.append(job)
            rows += job.rows
        self._several = len(jobs) > 1
        return jobs, True
