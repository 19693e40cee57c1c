"""How a training starts and goes on: refused starts leave nothing, one writer at a time, no epoch is told twice."""

import json

import pytest

from experiments import train
from tests.experiments.test_run_folder_fuzz import OPTIONS
from tim4rec_jax.files import locked
from tim4rec_jax.run_dir import read_config, read_results
from tim4rec_jax.training import loop
from tim4rec_jax.training.logging import read_metrics


def _epochs(run):
    return [(line["step"], line["epoch"]) for line in read_metrics(run) if line["kind"] == "valid"]


def _train(run, *options):
    return train.main([*OPTIONS, f"--run_dir={run}", *options])


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "three"
    assert _train(run, "--train.epochs=3") == 0
    return run


def test_a_refused_start_leaves_no_folder(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert _train(run, "--eval.top_k", "10", "500") == 2
    assert "k=500 is larger than the catalogue" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(loop.Setup, "compile_steps", lambda *_: (_ for _ in ()).throw(ValueError("no such step")))
        assert _train(run) == 2
    assert "error: no such step" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kernels", "interpreted"), [("pallas_triton", True), ("xla", False)])
def test_kernels_that_are_interpreted_are_said_to_be(tmp_path, capsys, kernels, interpreted):
    tiny = ["--model.num_layers=1", "--model.max_len=4", "--train.batch_size=8", "--train.max_steps=1"]
    assert _train(tmp_path / "run", *tiny, f"--model.kernels={kernels}") == 0
    assert ("there is no GPU here, so the kernels are interpreted" in capsys.readouterr().out) == interpreted


def test_times_beyond_2038_are_refused_without_a_run_folder(tmp_path, capsys):
    log, runs = tmp_path / "log.csv", tmp_path / "runs"
    times = [1_500_000_000 + 60 * step for step in range(39)] + [2_309_729_734]
    rows = [f"u{step % 4},i{step % 5},{second}" for step, second in enumerate(times)]
    log.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    assert train.main([f"--data.path={log}", f"--run_dir={runs / 'late'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: timestamp 2309729734 does not fit into the int32 seconds")
    assert len(line) < 300 and "2038-01-19" in line and not list(runs.iterdir())


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path, three_epochs, capsys):
    run = tmp_path / "run[0]\\*"
    assert _train(run) == 0
    assert _train(run, "--resume") == 0  # as it is: nothing to train
    assert _train(run, "--resume", "--train.epochs=3") == 0
    assert "loss 0.0000" not in capsys.readouterr().out
    assert _epochs(run) == _epochs(three_epochs) and len(_epochs(run)) == 3
    assert read_results(run)["test"] == read_results(three_epochs)["test"]
    assert [line["kind"] for line in read_metrics(run)].count("test") == 1


def test_an_end_inside_an_epoch_is_gone_on_from(tmp_path, three_epochs):
    steps = _epochs(three_epochs)[0][0]
    run = tmp_path / "run"
    assert _train(run, "--train.epochs=3", f"--train.max_steps={steps + 1}") == 0
    assert _epochs(run) == [(steps, 1), (steps + 1, 2)]
    assert _train(run, "--train.epochs=3", "--resume") == 0
    assert _epochs(run) == _epochs(three_epochs)


def test_an_end_that_lies_behind_is_refused_and_changes_nothing(three_epochs, capsys):
    before = {file: file.read_bytes() for file in three_epochs.glob("*.json*")}
    assert _train(three_epochs, "--train.epochs=2", "--resume") == 2
    error = capsys.readouterr().err
    assert "train.epochs=2 is less than the 3 that this run has behind it" in error and error.count("\n") == 1
    assert read_config(three_epochs).train.epochs == 3
    assert {file: file.read_bytes() for file in three_epochs.glob("*.json*")} == before


def test_a_run_has_one_writer(three_epochs, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(three_epochs)
    with locked(three_epochs):
        for run in (three_epochs, link):
            assert _train(run, "--train.epochs=3", "--resume") == 2
            error = capsys.readouterr().err
            assert "is being written by another process" in error and error.count("\n") == 1


def test_another_number_of_processors_is_said(three_epochs, monkeypatch, capsys):
    began = json.loads((three_epochs / "environment.json").read_text())["cpus_allowed"]
    monkeypatch.setattr(loop, "processors_allowed", lambda: began + 1)
    assert _train(three_epochs, "--train.epochs=3", "--resume") == 0
    said = f"this run began with {began} processors and goes on with {began + 1}: its numbers may differ"
    assert said in capsys.readouterr().out
    assert any(said in line.get("message", "") for line in read_metrics(three_epochs))
