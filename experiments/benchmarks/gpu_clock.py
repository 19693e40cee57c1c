"""Time on a lent machine: what is left of a budget, programs built side by side, forms timed in turns."""

import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

# A form that takes longer than this is run once more and no oftener.
_SLOW_SECONDS = 2.0
_MOST_THREADS = 16


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


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the block by TimeoutError after so many seconds, between two steps of Python; main thread only."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread():
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


@dataclass(frozen=True)
class Form:
    """Something to time.

    Attributes:
      launch: starts the work and returns what `wait` needs; launches run one after the other.
      wait: returns once a launch and all before it are done.
    """

    launch: Callable[[], Any]
    wait: Callable[[Any], Any]

    def seconds(self, launches: int) -> float:
        """Times a chain of launches."""
        began = time.perf_counter()
        result = None
        for _ in range(launches):
            result = self.launch()
        self.wait(result)
        return time.perf_counter() - began


@dataclass
class _Clocked:
    """A form under measurement: how many launches make one reading, and the readings, in seconds a launch."""

    form: Form
    launches: int
    slow: bool
    seconds: list[float]


def _prepare(form: Form, least_seconds: float, limit: float) -> _Clocked:
    """Warms a form up and finds how many launches take long enough to be timed well."""
    with time_limit(limit):
        form.seconds(1)
        once = form.seconds(1)
    if once > _SLOW_SECONDS:
        return _Clocked(form, 1, True, [once])
    launches = 1
    while once < least_seconds:
        launches = max(2 * launches, int(launches * least_seconds / max(once, 1e-7)))
        once = form.seconds(launches)
    return _Clocked(form, launches, False, [])


def time_in_turns(
    forms: Mapping[str, Form], *, repeats: int, least_seconds: float, limit: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Times forms in turns, each reading over enough launches to last `least_seconds`, after warm-up.

    Args:
      forms: by name.
      repeats: readings of each form; a form of more than two seconds gets one.
      least_seconds: of a reading.
      limit: seconds that the first two launches of a form may take, tuning of its kernels included.

    Returns:
      By name median_seconds and all readings, in seconds a launch; and why other forms failed.
    """
    clocked, failed = {}, {}
    for name, form in forms.items():
        try:
            clocked[name] = _prepare(form, least_seconds, limit)
        except Exception as error:
            failed[name] = reason(error)
    for _ in range(repeats):
        for entry in clocked.values():
            if not entry.slow:
                entry.seconds.append(entry.form.seconds(entry.launches) / entry.launches)
    records = {
        name: {
            "median_seconds": statistics.median(entry.seconds),
            "seconds": entry.seconds,
            "launches_a_reading": entry.launches,
        }
        for name, entry in clocked.items()
    }
    return records, failed


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
      implementation: of our kernels.
      tiny: sizes for trying the program out.
      repeats: readings of each form.
      only: what is checked or measured has one of these in its label; empty is everything.
    """

    implementation: str
    tiny: bool
    repeats: int
    only: tuple[str, ...] = ()

    def wants(self, label: str) -> bool:
        """Whether something of this label is checked or measured."""
        return not self.only or any(part in label for part in self.only)

    @property
    def least_seconds(self) -> float:
        """How long a reading lasts."""
        return 0.0 if self.tiny else 0.02

    def time(self, forms: dict[str, Form], limit: float = 60.0) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Times forms in turns."""
        return time_in_turns(forms, repeats=self.repeats, least_seconds=self.least_seconds, limit=limit)
