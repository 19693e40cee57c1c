"""The plan on paper: its formulas by hand, and that its limits are where the predictions cross."""

import dataclasses
import json

import pytest

from experiments import benchmark
from experiments.benchmarks.scaling import Gpu, Workload, all_reduce_seconds, limits, predict

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
    assert benchmark.main(["scaling", "--rows=0"]) == 2
    assert "--rows, --negatives, --devices and --items must be at least 1" in capsys.readouterr().err
    assert benchmark.main(["scaling", "--config=ml1m_tim4rec"]) == 2
    assert "--config=ml1m_tim4rec is not causal" in capsys.readouterr().err
