"""What callbacks are told, what becomes of one that raises; MLflow and W&B by fakes, and MLflow itself."""

import importlib.util
import json
import sys
import types

import pytest

from experiments import train as train_program
from tim4rec_jax import Callback, DataConfig, SyntheticConfig, TrainConfig, fit, load_log
from tim4rec_jax.run_dir import read_results
from tim4rec_jax.training.logging import read_metrics

SYNTHETIC = DataConfig(synthetic=SyntheticConfig(num_users=40, num_items=15, min_events=6, max_events=9, noise=0.02))
SMALL = {"epochs": 2, "d_model": 8, "num_layers": 1, "inner_size": 8, "log_every": 3, "batch_size": 4, "patience": 9}
SMALL |= {"progress": False, "tensorboard": False}


class Recorder(Callback):
    """Keeps what it is told; raises in one method, if asked."""

    def __init__(self, bad=None):
        self.calls, self.bad = [], bad

    def _keep(self, name, *values):
        self.calls.append((name, *values))
        if name == self.bad:
            raise RuntimeError("the server\nis gone")

    def on_start(self, run_dir, settings, step):
        self._keep("start", run_dir, settings, step)

    def on_log(self, step, values):
        self._keep("log", step, values)

    def on_evaluation(self, part, step, metrics):
        self._keep("evaluation", part, step, metrics)

    def on_checkpoint(self, step, folder):
        self._keep("checkpoint", step, folder)

    def on_end(self, results, error):
        self._keep("end", results, error)

    @property
    def names(self):
        return [call[0] for call in self.calls]


@pytest.fixture(scope="module")
def log():
    return load_log(SYNTHETIC)


def test_what_is_told(log, tmp_path):
    recorder = Recorder()
    run = fit(log, "sasrec", run_dir=tmp_path / "run", callbacks=[recorder], **SMALL)
    (_, folder, settings, step), *middle = recorder.calls
    assert folder == run.run_dir and step == 0 and settings["train.epochs"] == 2 and settings["model.name"] == "sasrec"
    lines = read_metrics(run.run_dir)
    logged = [(line["step"], line["loss"], line["epoch"]) for line in lines if line["kind"] == "train"]
    assert [(call[1], call[2]["loss"], call[2]["epoch"]) for call in middle if call[0] == "log"] == logged
    parts = [call for call in middle if call[0] == "evaluation"]
    assert [call[1] for call in parts] == ["valid", "valid", "test"] and parts[-1][3] == run.metrics["test"]
    assert [call[1] for call in middle if call[0] == "checkpoint"] == [call[2] for call in parts[:2]]
    assert middle[-1] == ("end", middle[-1][1], None) and middle[-1][1]["test"] == run.metrics["test"]
    again = Recorder()
    fit(log, "sasrec", run_dir=run.run_dir, resume=True, callbacks=[again], **SMALL | {"epochs": 3})
    assert again.names[0] == "start" and again.calls[0][3] == parts[1][2] and again.names[-1] == "end"


@pytest.mark.parametrize("bad", ["log", "evaluation", "checkpoint", "end"])
def test_one_that_raises_is_named_and_left_out(log, tmp_path, capsys, bad):
    broken, sound = Recorder(bad), Recorder()
    run = fit(log, "sasrec", run_dir=tmp_path / "run", callbacks=[broken, sound], **SMALL)
    assert run.results["epochs"] == 2 and read_results(run.run_dir)["test"] == run.metrics["test"]
    assert broken.names[-1] == bad and broken.names.count(bad) == 1 and sound.names[-1] == "end"
    line = f"callback Recorder.on_{bad} failed: RuntimeError: the server is gone"
    assert line in " ".join(capsys.readouterr().out.split())
    [event] = [line["message"] for line in read_metrics(run.run_dir) if line["kind"] == "event"]
    assert event.startswith(line)


def test_one_that_does_not_start_refuses_the_run(log, tmp_path):
    first = Recorder()
    with pytest.raises(
        ValueError, match="callback Recorder.on_start failed: RuntimeError: the server is gone"
    ) as caught:
        fit(log, "sasrec", run_dir=tmp_path / "run", callbacks=[first, Recorder("start")], **SMALL)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    assert first.names == ["start", "end"] and "on_start failed" in first.calls[-1][2]
    run = fit(log, "sasrec", run_dir=tmp_path / "run", **SMALL)
    before = {file: file.read_bytes() for file in run.run_dir.glob("*.json*")}
    for callback in (Recorder("start"), first):
        with pytest.raises(ValueError, match="on_start failed"):
            more = {"resume": True, "callbacks": [callback, Recorder("start")]}
            fit(log, "sasrec", run_dir=run.run_dir, **more, **SMALL | {"epochs": 3})
        assert {file: file.read_bytes() for file in run.run_dir.glob("*.json*")} == before
    with pytest.raises(ValueError, match="callbacks: object must inherit from tim4rec_jax.Callback"):
        fit(log, "sasrec", run_dir=tmp_path / "run", callbacks=[object()], **SMALL)


def test_an_error_in_training_is_told(log, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("tim4rec_jax.training.loop.FullSortEvaluator.__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(log, "sasrec", run_dir=tmp_path / "run", callbacks=[recorder], **SMALL)
    assert recorder.calls[-1] == ("end", None, "ZeroDivisionError: division by zero")


class FakeClient:
    """Of MLflow, as far as it is used; names are checked as MLflow does."""

    runs: dict = {}

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"id of {name}"

    def create_run(self, experiment_id, run_name):
        FakeClient.runs["r1"] = {
            "name": run_name,
            "experiment": experiment_id,
            "params": {},
            "metrics": [],
            "status": [],
        }
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def update_run(self, run_id, status):
        FakeClient.runs[run_id]["status"].append(status)

    def log_param(self, run_id, key, value):
        FakeClient.runs[run_id]["params"][key] = value

    def log_metric(self, run_id, key, value, step):
        assert "@" not in key and isinstance(value, float)
        FakeClient.runs[run_id]["metrics"].append((key, value, step))

    def set_terminated(self, run_id, status):
        FakeClient.runs[run_id]["status"].append(status)


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.made = []

    def init(self, **given):
        made = types.SimpleNamespace(given=given, id=given["id"] or "w1", logged=[], summary={}, codes=[])
        made.log = lambda values, step: made.logged.append((step, values))
        made.finish = lambda exit_code: made.codes.append(exit_code)
        self.made.append(made)
        return made


def test_trackers_are_told_and_a_resumed_run_goes_on_with_them(log, tmp_path, monkeypatch):
    mlflow, wandb = types.ModuleType("mlflow"), FakeWandb()
    mlflow.MlflowClient = FakeClient
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run = fit(log, "sasrec", run_dir=tmp_path / "run", trackers=("mlflow", "wandb"), **SMALL)
    kept = FakeClient.runs["r1"]
    assert kept["name"] == "run" and kept["experiment"] == "id of tim4rec_jax" and kept["status"] == ["FINISHED"]
    assert kept["params"]["train.epochs"] == "2"
    assert ("test/ndcg_at_10", run.metrics["test"]["ndcg@10"]) in [metric[:2] for metric in kept["metrics"]]
    [made] = wandb.made
    assert made.given["project"] == "mine" and made.given["config"]["model.d_model"] == 8 and made.codes == [0]
    steps = [step for step, _ in made.logged]
    assert steps == sorted(steps) and made.summary["test/ndcg@10"] == run.metrics["test"]["ndcg@10"]
    assert json.loads((run.run_dir / "trackers.json").read_text()) == {"mlflow": "r1", "wandb": "w1"}
    fit(log, "sasrec", run_dir=run.run_dir, resume=True, trackers=("mlflow", "wandb"), **SMALL | {"epochs": 3})
    assert list(FakeClient.runs) == ["r1"] and kept["status"] == ["FINISHED", "RUNNING", "FINISHED"]
    assert wandb.made[1].given["id"] == "w1"


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_one_line(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    assert train_program.main(["--config=quickstart", f"--train.trackers={name}", f"--run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert f"train.trackers={name} needs the package {name}" in error and len(error.strip().splitlines()) == 1
    assert f"pip install 'tim4rec_jax[{name}]'" in error and not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_one_line(capsys):
    assert train_program.main(["--config=quickstart", "--train.trackers=neptune"]) == 2
    assert "expected one of mlflow, wandb" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trackers='neptune' must be of"):
        TrainConfig(trackers=("neptune",))


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="MLflow is not installed")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself(log, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    run = fit(log, "sasrec", run_dir=tmp_path / "run", trackers=("mlflow",), **SMALL)
    client = mlflow.MlflowClient()
    number = json.loads((run.run_dir / "trackers.json").read_text())["mlflow"]
    stored = client.get_run(number)
    assert stored.info.status == "FINISHED" and stored.data.params["train.epochs"] == "2"
    assert stored.data.metrics["test/ndcg_at_10"] == run.metrics["test"]["ndcg@10"]
    history = client.get_metric_history(number, "valid/ndcg_at_10")
    assert [point.step for point in history] == [
        line["step"] for line in read_metrics(run.run_dir) if line["kind"] == "valid"
    ]
