"""The plan on paper: its formulas by hand, and that its limits are where the predictions cross."""

import dataclasses
import json

import pytest

from experiments import benchmark
from experiments.benchmarks.scaling import Gpu, Workload, all_reduce_seconds, limits, predict
from experiments.benchmarks.scaling_measured import read_measured
from experiments.configs import load_config

GPU = Gpu()
LOAD = Workload(12_800, 9_600, 64, 60_000, position_bytes=20_000.0, position_operations=1e6, kept_bytes=8_000.0)


def test_an_all_reduce_by_hand():
    assert all_reduce_seconds(GPU, 1, 1e9) == 0
    latency = 3 * GPU.latency
    assert all_reduce_seconds(GPU, 8, 8e9) == pytest.approx(2 * 7e9 / GPU.inside + latency)
    # Two nodes: the ring inside, then half of a GPU's eighth there and back.
    two = 2 * 7e9 / GPU.inside + 2 * 0.5 * 1e9 / GPU.between + 4 * GPU.latency
    assert all_reduce_seconds(GPU, 16, 8e9) == pytest.approx(two)


def test_a_step_by_hand():
    step = predict(GPU, LOAD, 1, 1_000_000, "whole")
    assert step.encoder == pytest.approx(12_800 * 20_000 / GPU.bandwidth)
    assert step.loss == pytest.approx(10 * 9_600 * 1e6 * 64 / GPU.rate)
    assert step.optimiser == pytest.approx(28 * (64e6 + 60_000) / GPU.bandwidth)
    assert step.exchange == 0
    assert step.memory == pytest.approx(16 * (64e6 + 60_000) + 12_800 * 8_000 + 256 * 22_400)
    assert step.seconds == step.encoder + step.loss + step.optimiser and step.slowest == "loss"


def test_what_each_way_saves():
    whole, sharded, sampled = (predict(GPU, LOAD, 8, 100_000_000, way) for way in ("whole", "sharded", "sampled"))
    assert whole.memory > GPU.memory > sharded.memory > sampled.memory
    assert sharded.loss == whole.loss and sharded.optimiser < whole.optimiser / 7
    larger = predict(GPU, LOAD, 8, 1_000_000_000, "sampled")
    assert (larger.loss, larger.optimiser, larger.exchange) == (sampled.loss, sampled.optimiser, sampled.exchange)
    assert larger.memory > GPU.memory and larger.shards == 8
    # With more GPUs the table is cut finer, and shards that lie on other nodes cost more to reach.
    wider = predict(GPU, LOAD, 64, 1_000_000_000, "sampled")
    assert wider.memory < GPU.memory and wider.shards == 16 and wider.exchange > 5 * sampled.exchange


def test_limits_are_where_predictions_cross():
    load = dataclasses.replace(LOAD, positions=128_000, targets=96_000)
    found = limits(GPU, load)
    at = {name: int(found[name]) for name in found}
    step = predict(GPU, load, 1, at["loss"], "whole")
    assert step.loss == pytest.approx(step.encoder, rel=1e-3)
    optimiser = predict(GPU, load, 1, at["optimiser"], "whole")
    assert optimiser.optimiser == pytest.approx(optimiser.encoder, rel=1e-3)
    for devices in (8, 512):
        step = predict(GPU, load, devices, at[f"exchange {devices}"], "whole")
        assert step.exchange == pytest.approx(step.encoder, rel=1e-3)
    for devices, way in ((1, "whole"), (8, "sharded"), (8, "sampled")):
        assert predict(GPU, load, devices, at[f"memory {way}"], way).memory == pytest.approx(GPU.memory, rel=1e-3)
    # Small steps: what an exchange over 512 takes at least is longer than the encoder.
    assert limits(GPU, LOAD)["exchange 512"] == 0 < limits(GPU, LOAD)["exchange 8"]


def records(folder, **changes):
    """Three records of a GPU with a loss of 1e12 operations a second, 1e-7 s a position and 0.01 s a step."""
    about = {"environment": {"device_kind": "a GPU"}}
    loss = {"t": 100, "v": 1000, "d": 10}
    forms = {"pallas_triton: forward_backward": {"median_seconds": 1e-5}}
    cases = [{"op": "softmax_cross_entropy", "precision": "tfloat32", "sizes": loss, "forms": forms}]
    ops = about | {"ops": {"comparisons": cases, "ceilings": {"bytes_a_second_of": {"copy": 2e12}}}}
    seconds = 0.01 + 1e-7 * 50_000 + 10 * 1000 * 100 * 64 / 1e12
    large = {"batch_size": 1000, "mean_length": 50.0, "vocab_size": 100}
    large["forms"] = {"kernels on": {"median_seconds": seconds}}
    step = about | {"train_step": {"comparisons": [large]}}
    model = dataclasses.asdict(load_config("ml1m_tim4rec_causal").model) | {"vocab_size": 100, "max_len": 200}
    small = changes.get("small", 0.01 + 1e-7 * 2000 + 10 * 1500 * 100 * 64 / 1e12)
    # The first line has the compilation in it, and one stretch had other work beside it.
    times = [20.0, 20.0 + 50 * small, 20.0 + 100 * small, 30.0, 30.0 + 50 * small]
    lines = [{"kind": "train", "step": 50 * (i + 1), "seconds": second} for i, second in enumerate(times)]
    model |= changes.get("model", {})
    run = about | changes.get("about", {}) | {"config": {"model": model, "train": {"batch_size": 10}}}
    run["lines"] = [{"kind": "event"}, *lines[: changes.get("lines", 5)]]
    files = [folder / name for name in ("ops.json", "step.json", "run.json")]
    for file, record in zip(files, (ops, step, run), strict=True):
        file.write_text(json.dumps(record))
    return files


def test_what_a_gpu_was_measured_to_do(tmp_path):
    found = read_measured(*records(tmp_path), load_config("ml1m_tim4rec_causal").model, 0.75)
    assert (found.device, found.bandwidth, found.loss_rate) == ("a GPU", 2e12, pytest.approx(1e12))
    assert found.position_seconds == pytest.approx(1e-7) and found.step_seconds == pytest.approx(0.01)
    gpu = dataclasses.replace(GPU, loss_rate=found.loss_rate, fixed=found.step_seconds)
    load = dataclasses.replace(LOAD, position_seconds=found.position_seconds)
    step = predict(gpu, load, 1, 1000, "whole")
    assert (step.fixed, step.encoder, step.loss) == pytest.approx((0.01, 12_800e-7, 10 * 9_600 * 1000 * 64 / 1e12))
    assert step.slowest == "fixed" and step.seconds > 0.01
    few = dataclasses.replace(load, positions=int(limits(gpu, load)["fixed"]))
    assert predict(gpu, few, 1, 1000, "whole").encoder == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"about": {"environment": {"device_kind": "another"}}}, "different devices, a GPU, a GPU and another"),
        ({"model": {"d_state": 8}}, "is of a model with {'d_state': 8}, which --config is not"),
        ({"small": 0.5}, "no line with a positive time a position and a step goes through them"),
        ({"lines": 1}, "run.json is not the record that is needed .* fewer than two lines of training"),
        ({"model": {"max_len": None}}, "run.json is not the record that is needed"),
    ],
)
def test_records_that_tell_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_measured(*records(tmp_path, **changes), load_config("ml1m_tim4rec_causal").model, 0.75)


def test_the_program_writes_both_files(tmp_path, capsys):
    output, text = tmp_path / "scaling.json", tmp_path / "scaling.md"
    options = ["--config=beauty_tim4rec_causal", "--rows=2", "--devices=1,8", "--items=1e4,1e10"]
    assert benchmark.main(["scaling", *options, f"--output={output}", f"--markdown={text}"]) == 0
    record = json.loads(output.read_text())
    assert record["prediction"] is True and len(record["rows"]) == 2 * 2 * 3
    assert 1_000 < record["counted"]["bytes a position"] < 1_000_000
    assert record["counted"]["measured seconds a position"] > 0
    written = text.read_text()
    assert "is a prediction; no GPU was used" in written and "does not fit" in capsys.readouterr().out
    assert written.count("| 10,000,000,000 | –") == 3
    measured = [*options, f"--markdown={text}", "--measured", *map(str, records(tmp_path))]
    assert benchmark.main(["scaling", *measured, f"--output={output}"]) == 0
    assert json.loads(output.read_text())["measured"]["records"] == ["ops.json", "step.json", "run.json"]
    assert "On one a GPU ([ops.json](ops.json), " in text.read_text() and "**Launches**" in text.read_text()
    capsys.readouterr()
    assert benchmark.main(["scaling", "--rows=0"]) == 2
    assert "--rows, --negatives, --devices and --items must be at least 1" in capsys.readouterr().err
    assert benchmark.main(["scaling", "--config=ml1m_tim4rec"]) == 2
    assert "--config=ml1m_tim4rec is not causal" in capsys.readouterr().err
