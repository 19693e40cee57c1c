"""Ends that are asked for: Ctrl-C, SIGTERM, and with several processes the preemption of any of them.

A run that trains is at rest while every step taken is saved, or being saved: before the first step, while it compiles,
validates and tests. There it ends at once. Elsewhere it ends after the step that is running, with a save.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# Compilation and evaluation run outside Python, where no handler is called: after so long a thread ends the process.
GRACE_SECONDS = 5.0


@contextlib.contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Hands the number of every Ctrl-C and SIGTERM to a function while the body runs."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda number, _: handler(number)) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def exit_code(number: int) -> int:
    """Returns 0 for SIGTERM, by which schedulers ask for the place, and 130 for Ctrl-C, as shells say it."""
    return 0 if number == signal.SIGTERM else 128 + signal.SIGINT


class Interrupted(Exception):
    """Training was asked to stop by a signal; its state is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def exit_code(self) -> int:
        return exit_code(self.signal)


def explain(stopped: Interrupted) -> str:
    """Returns what a program says of it."""
    return f"{stopped}\ncontinue with the same command and --resume"


class StopRequests:
    """Ends a run on the first Ctrl-C or SIGTERM, in order; a second one acts as usual.

    A run that is at rest gets `Interrupted` at once, also in the middle of a call. If the call does not come back, the
    process ends without it: nothing is lost. With several processes a request to one of them reaches all through JAX's
    distributed runtime, which also lets them stop after the same step, at rest or not.

    Args:
      message: said when the run ends before it was ever told to `keep_going`.
      grace_seconds: how long a call at rest may take to come back.
    """

    def __init__(self, message: str = "stopped before training began", *, grace_seconds: float = GRACE_SECONDS) -> None:
        self._message, self._grace = message, grace_seconds
        self._settle: Callable[[], None] = lambda: None
        self._at_rest = True
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._wake_up: tuple[int, int] | None = None

    def __enter__(self) -> "StopRequests":
        # With several processes the runtime itself listens to SIGTERM, and Ctrl-C is passed on to it.
        several = jax.process_count() > 1
        numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            return self  # whoever runs us has the signals
        for number in numbers:
            self._previous[number] = signal.signal(number, self._pass_on if several else self._note)
        if not several:
            self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._restore_handlers()
        if self._wake_up is not None:
            signal.set_wakeup_fd(self._wake_up_before)
            os.close(self._wake_up[1])
            self._thread.join()
            self._wake_up = None

    def keep_going(self) -> None:
        """Says that a step is about to be taken: from now on requests wait for `after`."""
        with self._lock:
            self._at_rest = False

    def rest(self, message: str, settle: Callable[[], None] = lambda: None) -> None:
        """Says that every step taken is saved or being saved.

        Args:
          message: said when the run ends here.
          settle: returns when it is saved; may be called from another thread.

        Raises:
          Interrupted: there was a request already.
        """
        with self._lock:
            self._message, self._settle, self._at_rest = message, settle, True
        if self._received is not None and jax.process_count() == 1:
            raise Interrupted(message, self._received)

    def after(self, step: int) -> int | None:
        """Returns the signal that asks to stop after this step, or None; all processes must ask at every step."""
        if jax.process_count() == 1:
            return self._received
        if multihost_utils.reached_preemption_sync_point(step):
            return self._received or signal.SIGTERM
        return None

    def _restore_handlers(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self._restore_handlers()
        if self._at_rest:
            raise Interrupted(self._message, number)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self._restore_handlers()
        os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        """Starts a thread that hears of signals from the system, whatever Python's main thread is doing."""
        self._wake_up = os.pipe()
        os.set_blocking(self._wake_up[1], False)
        self._wake_up_before = signal.set_wakeup_fd(self._wake_up[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(self._wake_up[0],), daemon=True)
        self._thread.start()

    def _listen(self, pipe: int) -> None:
        # Open to the end: Python complains of a signal that it cannot write there.
        with os.fdopen(pipe, "rb", buffering=0) as stream:
            number = 0
            while number not in (signal.SIGINT, signal.SIGTERM):
                heard = stream.read(1)
                if not heard:
                    return
                number = heard[0]
            while not self._ended.wait(self._grace):
                with self._lock:  # `keep_going` waits for it, so that no step is taken meanwhile
                    if self._at_rest and not self._ended.is_set():
                        self._leave(number)

    def _leave(self, number: int) -> None:
        stopped = Interrupted(self._message, number)
        code, stream, text = stopped.exit_code, sys.stdout, explain(stopped)
        try:
            self._settle()
        except Exception as error:
            code, stream, text = 2, sys.stderr, f"error: {error}"
        print(text, file=stream, flush=True)
        os._exit(code)
