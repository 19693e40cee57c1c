"""Ends of training that were asked for: Ctrl-C, SIGTERM, and with several processes the preemption of any of them."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """Training was asked to stop by a signal; its state is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopRequests:
    """Takes note of the first Ctrl-C or SIGTERM instead of dying of it; a second one acts as usual.

    With several processes a request to one of them reaches all through JAX's distributed runtime, which also lets them
    stop after the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        # With several processes the runtime itself listens to SIGTERM, and Ctrl-C is passed on to it.
        several = jax.process_count() > 1
        handlers = (
            {signal.SIGINT: self._pass_on} if several else {n: self._note for n in (signal.SIGINT, signal.SIGTERM)}
        )
        for number, handler in handlers.items():
            try:
                self._previous[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread: whoever runs us has the signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self._restore_handlers()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._note(number, None)
        os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> int | None:
        """Returns the signal that asks to stop after this step, or None; all processes must ask at every step."""
        if jax.process_count() == 1:
            return self._received
        if multihost_utils.reached_preemption_sync_point(step):
            return self._received or signal.SIGTERM
        return None
