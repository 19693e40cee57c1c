"""Logs are strict, survive a kill and a resume without duplicates, and can be drawn."""

import io
import json
import math
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from rich.console import Console

from tests.evaluation.logs import random_log
from tests.training.event_records import events_of
from tim4rec_jax import figures as figures_module
from tim4rec_jax import fit
from tim4rec_jax.training import logging as run_logging
from tim4rec_jax.training.logging import MetricLogger, TrainingProgress, plot_training_curves, read_metrics

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def _logger(folder, tensorboard=False):
    return MetricLogger(folder, tensorboard=tensorboard)


def _valid(epoch, step, ndcg):
    return {"epoch": epoch, "step": step, "hit@10": 2 * ndcg, "ndcg@10": ndcg, "mrr@10": ndcg / 2, "hit@20": 3 * ndcg}


def test_lines_are_strict_json_and_there_at_once(tmp_path):
    values = {"step": 3, "loss": jnp.float32(0.5), "epoch": np.int64(1), "learning_rate": 1e-3, "seconds": 2.0}
    with _logger(tmp_path / "new") as logger:
        logger.log("train", **values)
        text = (tmp_path / "new" / "metrics.jsonl").read_text()  # before closing
        logger.log("test", **{"hit@10": 0.1, "ks": (10, 20), "note": None, "ok": True, "name": "ü"})
    assert text == '{"kind": "train", "step": 3, "loss": 0.5, "epoch": 1, "learning_rate": 0.001, "seconds": 2.0}\n'
    assert read_metrics(tmp_path / "new")[1] == {
        "kind": "test",
        "hit@10": 0.1,
        "ks": [10, 20],
        "note": None,
        "ok": True,
        "name": "ü",
    }


def test_numbers_that_are_not_finite_come_back(tmp_path):
    with _logger(tmp_path, tensorboard=True) as logger:
        logger.log("train", step=1, loss=float("nan"), more={"a": [np.float32("inf"), -math.inf, 1.5]})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["more"]) == ("NaN", {"a": ["Infinity", "-Infinity", 1.5]})
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["loss"])
    assert read["more"] == {"a": [math.inf, -math.inf, 1.5]}


def test_bad_lines_are_refused(tmp_path):
    with _logger(tmp_path) as logger:
        with pytest.raises(ValueError, match="kind='trian' must be one of"):
            logger.log("trian", step=1, loss=1.0)
        with pytest.raises(ValueError, match=r"a train line needs \['loss'\] besides \['step'\]"):
            logger.log("train", step=1)
        with pytest.raises(ValueError, match=r"a.b=array\(\[1, 2\]\) of type ndarray has no place"):
            logger.log("event", a={"b": np.array([1, 2])})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_appends_and_truncates_to_the_resumed_step(tmp_path):
    with _logger(tmp_path) as logger:
        logger.log("event", message="start")
        for step in (10, 20, 30):
            logger.log("train", step=step, loss=step / 10)
            logger.log("event", message=f"after {step}")
        logger.log("valid", **_valid(1, 30, 0.1))
    with _logger(tmp_path) as logger:
        assert logger.truncate_after(20) == 3
        logger.log("train", step=30, loss=-1.0)
    lines = [(line["kind"], line.get("step", line.get("message"))) for line in read_metrics(tmp_path)]
    assert lines == [
        ("event", "start"),
        ("train", 10),
        ("event", "after 10"),
        ("train", 20),
        ("event", "after 20"),
        ("train", 30),
    ]
    assert read_metrics(tmp_path)[-1]["loss"] == -1.0
    with _logger(tmp_path) as logger:
        assert logger.truncate_after(30) == 0


def test_truncation_drops_the_test_that_will_be_run_again(tmp_path):
    with _logger(tmp_path) as logger:
        logger.log("train", step=30, loss=1.0)
        logger.log("test", step=10, epoch=1)
        logger.log("event", message="after the test")
        assert logger.truncate_after(30) == 1
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "event"]


def test_failed_truncation_loses_nothing(tmp_path, monkeypatch):
    with _logger(tmp_path) as logger:
        logger.log("train", step=5, loss=1.0)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tim4rec_jax.run_dir.os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            logger.truncate_after(0)
    assert len(read_metrics(tmp_path)) == 1


def test_half_written_last_line_is_dropped_and_told(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = '{"kind": "train", "step": 1, "loss": 0.5}\n'
    file.write_bytes(whole.encode() + b'{"kind": "train", "st')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": 0.5}]
    with _logger(tmp_path) as logger:
        logger.log("train", step=2, loss=0.25)
    _, told, last = read_metrics(tmp_path)
    assert told == {"kind": "event", "message": "dropped a half-written last line of 21 bytes"}
    assert last["step"] == 2


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "event"}\n{"kind": "tr\n{"kind": "event"}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2 is not JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="metrics.jsonl:1 is a list"):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing has been logged"):
        read_metrics(tmp_path / "absent")


def test_tensorboard_scalars_and_purge_on_resume(tmp_path):
    with _logger(tmp_path, tensorboard=True) as logger:
        logger.log("train", step=1, loss=0.5, epoch=1, note="text")
        logger.log("event", message="no step")
        assert logger.truncate_after(0) == 2
        logger.log("valid", **{"step": 1, "epoch": 1, "ndcg@10": 0.25})
    events = events_of(tmp_path)
    scalars = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    expected = {("train/loss", 1): 0.5, ("train/epoch", 1): 1.0, ("valid/epoch", 1): 1.0, ("valid/ndcg_10", 1): 0.25}
    assert scalars == expected
    assert [event.step for event in events if event.session_log.status] == [1]


def test_no_tensorboard_folder_unless_asked(tmp_path):
    with _logger(tmp_path) as logger:
        logger.log("train", step=1, loss=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def _drawn(monkeypatch, folder, **options):
    """The figure that was drawn, with the path it was written to."""
    figures = []

    def kept(*sizes):
        figures.append(figures_module.new_figure(*sizes))
        return figures[-1]

    monkeypatch.setattr(run_logging, "new_figure", kept)
    return figures, plot_training_curves(folder, **options)


def test_curves_show_loss_metrics_and_the_best_epoch(tmp_path, monkeypatch):
    with _logger(tmp_path) as logger:
        for step, loss in ((10, 3.0), (20, math.nan), (30, 1.0)):
            logger.log("train", step=step, loss=loss)
        for epoch, ndcg in ((1, 0.1), (2, 0.20004), (3, 0.20001), (4, 0.15)):  # 2 and 3 tie at 4 decimals
            logger.log("valid", **_valid(epoch, 10 * epoch, ndcg))
    (figure,), path = _drawn(monkeypatch, tmp_path)
    assert path == tmp_path / "curves.png"
    assert matplotlib.image.imread(path).shape[:2] == (400, 1600)
    loss, hit, ndcg, mrr = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [(10, 3), (20, math.nan), (30, 1)])
    assert [line.get_label() for line in hit.lines] == ["hit@10", "hit@20", "best ndcg@10: epoch 3"]
    np.testing.assert_array_equal(ndcg.lines[0].get_xydata(), [(1, 0.1), (2, 0.20004), (3, 0.20001), (4, 0.15)])
    for panel in (hit, ndcg, mrr):
        assert list(panel.lines[-1].get_xdata()) == [3, 3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_curves_need_something_to_draw(tmp_path):
    with _logger(tmp_path) as logger:
        logger.log("event", message="start")
        with pytest.raises(ValueError, match="no train or valid line"):
            plot_training_curves(tmp_path)
        logger.log("train", step=1, loss=1.0)
        assert plot_training_curves(tmp_path).stat().st_size > 1000
        logger.log("valid", **_valid(1, 1, 0.1))
        with pytest.raises(ValueError, match="epoch 1 lacks ndcg@5; it has .*'ndcg@10'"):
            plot_training_curves(tmp_path, monitor="ndcg@5")


def test_drawing_leaves_pyplot_alone():
    program = "import sys, tim4rec_jax.training.logging; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def _run_epoch(progress):
    with progress:
        progress.start_epoch(1, done=50)
        progress.advance(25, loss=2.5)
        progress.advance(25)
        assert progress.examples_per_second == pytest.approx(50 / progress.seconds, rel=0.5)
        progress.report("[note] kept as it is")
        progress.end_epoch(1, loss=2.25, seconds=1.5, rate=12345.6, metrics={"ndcg@10": 0.0369})


LINES = ["[note] kept as it is", "epoch 1/3  loss 2.2500  1.5 s  12,346 examples/s  ndcg@10 0.0369"]


@pytest.mark.parametrize(("terminal", "enabled"), [(False, True), (False, False), (True, False)])
def test_without_a_bar_one_plain_line_an_epoch(terminal, enabled):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=40)
    _run_epoch(TrainingProgress(epochs=3, examples=100, enabled=enabled, console=console))
    assert out.getvalue().splitlines() == LINES


def test_bar_shows_epoch_rate_loss_and_time_left():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, color_system=None)
    progress = TrainingProgress(epochs=3, examples=100, console=console)
    with progress:
        progress.start_epoch(2)
        progress.advance(40, loss=2.5)
        progress._bar.refresh()
        shown = out.getvalue()
        progress.report(LINES[0])
    for text in ("epoch 2/3", "40/100", "examples/s", "loss 2.5000", ":"):
        assert text in shown
    assert LINES[0] in out.getvalue()


def test_without_matplotlib_runs_are_trained_and_no_figure_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log = random_log(num_users=20, num_items=12, min_events=5, max_events=8, seed=0)
    sizes = {"epochs": 1, "d_model": 8, "num_layers": 1, "d_state": 4, "head_dim": 8}
    run = fit(log, "ssd4rec", run_dir=tmp_path / "run", progress=False, tensorboard=False, **sizes)
    assert "curves.png is not drawn: matplotlib is not installed" in " ".join(capsys.readouterr().out.split())
    assert run.metrics["test"] and not (tmp_path / "run" / "curves.png").exists()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tim4rec_jax\[plots\]'"):
        plot_training_curves(tmp_path / "run")
