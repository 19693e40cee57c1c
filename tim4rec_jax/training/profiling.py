"""A trace of some training steps, for Perfetto and XProf."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from tim4rec_jax.checks import require

# Steps before the trace: the first compiles, and the next find caches and pools of memory cold.
WARM_UP = 3


class StepProfile:
    """Traces N steps after the warm-up, once.

    With several steps per dispatch the trace begins and ends with a dispatch, so it holds a few steps more. What lies
    between two of them, as a validation, is in it too.

    Args:
      steps: N, at least 1; None traces nothing.
      folder: where the trace goes: plugins/profile/<time>/ with *.xplane.pb for XProf and perfetto_trace.json.gz.
      report: receives the path.

    Raises:
      ValueError: for an N under 1.
    """

    def __init__(self, steps: int | None, folder: pathlib.Path, report: Callable[[str], None]) -> None:
        require(steps is None or steps >= 1, f"profile={steps} must be at least 1, the steps to trace; or leave it out")
        self._steps, self._folder, self._report = steps, folder, report
        self._done = self._traced = 0
        self._running = False

    def require_within(self, left: int) -> None:
        """Raises ValueError where a run has fewer steps left than the warm-up and the trace take."""
        require(
            self._steps is None or self._steps + WARM_UP <= left,
            f"profile={self._steps}: the run has {left} steps to take, {WARM_UP} of them for warming up; give at most "
            f"{max(left - WARM_UP, 0)}, or more epochs",
        )

    def before_steps(self) -> None:
        """Begins the trace where it is time."""
        if self._steps is not None and not self._running and self._traced == 0 and self._done >= WARM_UP:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def after_steps(self, count: int, losses: Any) -> None:
        """Counts steps, and ends the trace when it holds enough.

        Args:
          count: steps that were asked for.
          losses: what they give, waited for before the trace ends.
        """
        self._done += count
        if self._running:
            self._traced += count
            if self._steps is not None and self._traced >= self._steps:
                jax.block_until_ready(losses)
                self.close()

    def close(self) -> None:
        """Ends a trace that is running, also one that holds fewer steps because the run was stopped."""
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        files = sorted(self._folder.rglob("perfetto_trace.json.gz"), key=lambda file: file.stat().st_mtime_ns)
        where = f"{files[-1]} (ui.perfetto.dev); XProf reads {self._folder}" if files else str(self._folder)
        self._report(f"profile of {self._traced} steps: {where}")
