"""`--profile=N`: the trace is there, its path printed, it holds the steps asked for; bad numbers are one line."""

import gzip
import json

import pytest

from experiments import train
from tim4rec_jax.run_dir import read_config, read_results

OPTIONS = [
    "--config=quickstart",
    "--model.name=ssd4rec",
    "--data.synthetic.num_users=60",
    "--data.synthetic.num_items=30",
    "--model.max_len=8",
    "--model.d_model=8",
    "--model.d_state=4",
    "--model.head_dim=8",
    "--train.batch_size=64",
    "--train.epochs=2",
    "--eval.baselines=popularity",
    "--train.progress=false",
    "--train.tensorboard=false",
    "--parallel.strategy=single",
]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run of two epochs with a trace of two steps, and what it printed."""
    run = tmp_path_factory.mktemp("traced") / "run"
    assert train.main([*OPTIONS, f"--run_dir={run}", "--profile=2"]) == 0
    return run


def _traces(run):
    return sorted((run / "profile").rglob("perfetto_trace.json.gz"))


def test_the_trace_is_there(traced):
    [trace] = _traces(traced)
    events = json.loads(gzip.decompress(trace.read_bytes()))
    assert len(events["traceEvents"] if isinstance(events, dict) else events) > 50
    assert list(trace.parent.glob("*.xplane.pb"))
    assert read_results(traced)["epochs"] == 2 and "profile" not in json.dumps(read_config(traced).to_dict())


def test_another_on_resuming_stands_beside_it_and_is_printed(traced, capsys):
    assert train.main([*OPTIONS, f"--run_dir={traced}", "--resume", "--train.epochs=3", "--profile=1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    [first, second] = _traces(traced)
    assert "profile of 1 steps: " in shown and (str(first) in shown) != (str(second) in shown)


def test_the_trace_holds_the_steps_asked_for(monkeypatch, tmp_path):
    from tim4rec_jax.training.profiling import WARM_UP, StepProfile

    calls, told = [], []
    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    for dispatch in (1, 2):
        profile = StepProfile(3, tmp_path, told.append)
        for _ in range(6 + WARM_UP):
            profile.before_steps()
            calls.append("step")
            profile.after_steps(dispatch, ())
        profile.close()
    inside = [part.partition("stop")[0].count("step") for part in " ".join(calls).split("start")[1:]]
    assert inside == [3, 2] and calls.count("start") == calls.count("stop") == 2  # Two dispatches of two.
    assert told[0].startswith("profile of 3 steps: ") and told[1].startswith("profile of 4 steps: ")
    stopped = StepProfile(30, tmp_path, told.append)
    for _ in range(5):
        stopped.before_steps()
        stopped.after_steps(1, ())
    stopped.close()
    assert told[-1].startswith("profile of 2 steps: ") and calls[-1] == "stop"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "--profile=0 must be at least 1"),
        ("-4", "--profile=-4 must be at least 1"),
        ("many", "--profile=many: expected a whole number or None"),
        ("1000", "profile=1000: the run has 42 steps to take, 3 of them for warming up; give at most 39"),
    ],
)
def test_bad_numbers_are_one_line_and_leave_nothing(tmp_path, capsys, value, message):
    assert train.main([*OPTIONS, f"--run_dir={tmp_path / 'run'}", f"--profile={value}"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_run_that_is_there_stays_as_it_was(traced, capsys):
    before = {file: file.read_bytes() for file in traced.glob("*.json*")}
    assert train.main([*OPTIONS, f"--run_dir={traced}", "--resume", "--train.epochs=4", "--profile=99"]) == 2
    assert "profile=99: the run has 21 steps to take" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in traced.glob("*.json*")} == before
