"""Ctrl-C in the middle of training."""

import contextlib
import signal
from collections.abc import Iterator

import pytest

from tim4rec_jax.training.loop import Session


@contextlib.contextmanager
def ctrl_c_at(step: int) -> Iterator[None]:
    """Runs trained in the body get SIGINT when the line of this step is logged."""
    log_line = Session.log_line

    def stop(session, progress):
        log_line(session, progress)
        if progress.step == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "log_line", stop)
        yield
