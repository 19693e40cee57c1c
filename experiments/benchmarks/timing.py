"""Time on busy machines and on a budget: forms timed in turns, programs built side by side, what is left of a budget.

Machines are shared and noisy, so forms that are compared take turns, and only ratios within one run say much.
"""

import contextlib
import functools
import itertools
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np

_MOST_THREADS = 16
# On a GPU a form that takes longer than this is run once more and no oftener.
_SLOW_SECONDS = 2.0
# A job in which the process ended so often is not begun again.
_MOST_BEGINNINGS = 2

Name = TypeVar("Name")


@dataclass(frozen=True)
class Form:
    """Something to time.

    Attributes:
      launch: starts the work and returns what `wait` needs; launches run one after the other.
      wait: returns once per launch and all before it are done.
    """

    launch: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready

    def seconds(self, launches: int) -> float:
        """Times a chain of launches."""
        began = time.perf_counter()
        result = None
        for _ in range(launches):
            result = self.launch()
        self.wait(result)
        return time.perf_counter() - began


def compiled_form(function: Callable[..., Any], *arguments: Any) -> Form:
    """Returns a JAX function, compiled for its arguments, as a form."""
    call = jax.jit(function).lower(*arguments).compile()
    return Form(functools.partial(call, *arguments))


def step_form(step: Callable[[Any], Any], batches: Iterable[Any]) -> Form:
    """Returns a training step that waits for its loss as a form; every launch takes the next batch, round and round."""
    turn = itertools.cycle(batches)
    return Form(lambda: step(next(turn)), lambda _: None)


def require_finite(loss: float) -> float:
    """Returns the loss of a step, for which this waits; FloatingPointError if it is no finite number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    return loss


@dataclass
class Readings:
    """What was measured of a form.

    Attributes:
      launches: of one reading.
      seconds: of one launch, a number per reading.
      closed: there will be no more readings, for one takes too long.
    """

    launches: int
    seconds: list[float]
    closed: bool = False

    @property
    def median(self) -> float:
        """Median seconds of one launch."""
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """Returns the numbers for a record."""
        return {"median_seconds": self.median, "seconds": self.seconds, "launches_a_reading": self.launches}


def _warm_up(form: Form, least_seconds: float, slow_seconds: float, limit: float | None) -> Readings:
    """Runs a form for the first time and finds how many launches take long enough to be timed well."""
    with time_limit(limit):
        form.seconds(1)
        if not least_seconds and math.isinf(slow_seconds):
            return Readings(1, [])
        once = form.seconds(1)
    if once > slow_seconds:
        return Readings(1, [once], closed=True)
    launches = 1
    while once < least_seconds:
        launches = max(2 * launches, int(launches * least_seconds / max(once, 1e-7)))
        once = form.seconds(launches)
    return Readings(launches, [])


def time_in_turns(
    forms: Mapping[Name, Form],
    *,
    repeats: int,
    least_seconds: float = 0.0,
    slow_seconds: float = math.inf,
    limit: float | None = None,
    failed: dict[Name, str] | None = None,
) -> dict[Name, Readings]:
    """Times forms in turns, after warm-up.

    Args:
      forms: by name.
      repeats: readings of each form.
      least_seconds: of a reading, which takes as many launches as that needs; 0 is one launch.
      slow_seconds: a form that takes longer gets one reading.
      limit: seconds that the first launches of a form may take, tuning of its kernels included; None for any.
      failed: where to note why a form failed while it warmed up, instead of raising that.

    Returns:
      The readings by name, without forms that failed.
    """
    readings = {}
    for name, form in forms.items():
        try:
            readings[name] = _warm_up(form, least_seconds, slow_seconds, limit)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = reason(error)
    for _, (name, of_form) in itertools.product(range(repeats), readings.items()):
        if not of_form.closed:
            of_form.seconds.append(forms[name].seconds(of_form.launches) / of_form.launches)
    return readings


def over(readings: Mapping[Name, Readings], this: Name, base: Name) -> float | None:
    """Returns the ratio of two medians of one run; None where the base was not measured."""
    return readings[this].median / readings[base].median if base in readings else None


def build_all(builders: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Calls all builders in threads, for compilers use one core each; nothing is timed meanwhile.

    Returns:
      What came out by name, and why others failed.
    """

    def attempt(build: Callable[[], Any]) -> Any:
        # Whatever goes wrong in one program must not cost the others.
        try:
            return build()
        except Exception as error:
            return error

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        built = dict(zip(builders, pool.map(attempt, builders.values()), strict=True))
    failed = {name: reason(result) for name, result in built.items() if isinstance(result, Exception)}
    return {name: result for name, result in built.items() if name not in failed}, failed


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Ends the block by TimeoutError after so many seconds, between two steps of Python; main thread only."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: BaseException) -> str:
    """One line about an error, for the record."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


class Budget:
    """Seconds that may still be spent."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds left; negative once they are over."""
        return self._end - time.monotonic()

    def share(self, part: float) -> "Budget":
        """Returns a budget of this part of what is left."""
        return Budget(part * self.left())

    def refusal(self) -> str | None:
        """Says why nothing more is begun, or None."""
        return None if self.left() > 0 else f"skipped: the {self.seconds:.0f} s for this part are over"


@dataclass(frozen=True)
class Settings:
    """What the command line of the benchmark of a GPU says.

    Attributes:
      implementations: backends that are checked and timed; empty is all that an operator has.
      tiny: sizes for trying the program out.
      repeats: readings of each form.
      only: what is checked or measured has one of these in its label; empty is everything.
    """

    implementations: tuple[str, ...]
    tiny: bool
    repeats: int
    only: tuple[str, ...] = ()

    def time(self, forms: Mapping[str, Form]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Times forms in turns; returns their records by name, and why others failed."""
        failed: dict[str, str] = {}
        readings = time_in_turns(
            forms,
            repeats=self.repeats,
            least_seconds=0.0 if self.tiny else 0.02,
            slow_seconds=_SLOW_SECONDS,
            limit=60.0,
            failed=failed,
        )
        return {name: of_form.record() for name, of_form in readings.items()}, failed


@dataclass(frozen=True)
class Part:
    """One part of the benchmark of a GPU.

    Attributes:
      settings: what the command line says.
      rng: of all inputs.
      budget: for this part.
      record: what it has found so far, in this process or in one before it.
      save: called with a label after every step; keeps the whole record.
      whole: the record of all parts.
    """

    settings: Settings
    rng: np.random.Generator
    budget: Budget
    record: dict[str, Any]
    save: Callable[[str], None]
    whole: dict[str, Any] = field(default_factory=dict)

    def do_all(self, jobs: Iterable[tuple[str, Callable[[], None]]]) -> None:
        """Does the labelled jobs that are asked for, while there is time; the record says why others are missing.

        Jobs that the record has as done are left out, and those in which the process has ended twice.
        """
        skipped = self.record["skipped"] = {}
        done, begun = self.record.setdefault("done", []), self.record.setdefault("begun", {})
        for label, do in jobs:
            if label in done or (self.settings.only and not any(wanted in label for wanted in self.settings.only)):
                continue
            if begun.get(label, 0) >= _MOST_BEGINNINGS:
                skipped[label] = f"skipped: begun {begun[label]} times, and the process ended each time"
                continue
            if refusal := self.budget.refusal():
                skipped[label] = refusal
                continue
            begun[label] = begun.get(label, 0) + 1
            self.save(f"begin {label}")
            try:
                do()
                done.append(label)
            except Exception as error:  # What cannot be done must not stop the rest.
                skipped[label] = reason(error)
            del begun[label]
            self.save(label)
