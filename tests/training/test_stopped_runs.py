"""Ctrl-C and SIGTERM end a run within 30 seconds whatever it is doing, and it goes on as if nothing had been."""

import json
import signal

import pytest

from tests.training.forked_runs import OPTIONS, require_same_runs, run_forking
from tests.training.stopped_runs import MOMENTS
from tim4rec_jax.training.signals import Interrupted, StopRequests


@pytest.mark.exhaustive
def test_stopped_at_any_moment_a_run_goes_on_with_the_same_bits(tmp_path):
    output = tmp_path / "found.json"
    options = [*OPTIONS, "--train.tensorboard=false"]
    run_forking("stopped_runs", str(output), str(tmp_path), *options, folder=tmp_path)
    found = json.loads(output.read_text())
    assert [run["moment"] for run in found] == list(MOMENTS)
    for run in found:
        assert run["code"] == (0 if run["signal"] == signal.SIGTERM else 130), run
        assert run["seconds"] < 30, run
        began = run["moment"] not in ("reading the log", "making the run folder", "compiling")
        said = "the state is saved in" if began else "stopped before training began"
        assert said in run["said"] and "--resume" in run["said"] and "Traceback" not in run["said"], run
    require_same_runs([tmp_path / run["folder"] for run in found], tmp_path / "reference")


def test_requests_wait_while_steps_are_taken():
    with StopRequests() as stops:
        stops.keep_going()
        signal.raise_signal(signal.SIGTERM)
        assert stops.after(3) == signal.SIGTERM
        with pytest.raises(Interrupted, match="saved") as stopped:
            stops.rest("saved")
    assert stopped.value.exit_code == 0


def test_at_rest_they_end_what_runs_at_once():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="stopped before training began") as stopped, StopRequests():
        signal.raise_signal(signal.SIGINT)
    assert stopped.value.exit_code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_save_that_failed_is_not_called_saved(capsys, monkeypatch):
    """Where the process has to end without Python's main thread."""
    codes = []
    monkeypatch.setattr("tim4rec_jax.training.signals.os._exit", codes.append)

    def fail():
        raise OSError("no room")

    stops = StopRequests()
    stops.rest("the state is saved", fail)
    stops._leave(signal.SIGTERM)
    assert codes == [2] and capsys.readouterr() == ("", "error: no room\n")
    stops.rest("the state is saved")
    stops._leave(signal.SIGTERM)
    assert codes == [2, 0] and "the state is saved\ncontinue" in capsys.readouterr().out
