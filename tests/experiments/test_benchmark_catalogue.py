"""experiments.benchmark catalogue and sampled: tiny runs, and options that do not fit."""

import json

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks.catalogue import largest_array

SAMPLED = ["sampled", "--tiny", "--batch_rows=2", "--length=8", "--negatives=16", "--repeats=2"]
TINY = ["catalogue", "--tiny", "--devices=2", "--batch_rows=2", "--length=8", "--run_rows=2", "--run_length=8"]


@pytest.mark.exhaustive
def test_bytes_and_losses_of_a_tiny_catalogue(tmp_path, capsys):
    output = tmp_path / "catalogue.json"
    options = ["--items=5003", "--shards=2", "--run_up_to=5003", "--steps=2"]
    assert benchmark.main([*TINY, *options, f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    assert record["benchmark"] == "catalogue" and record["environment"]["device_count"] == 2
    assert record["settings"]["items"] == [5003] and record["settings"]["shards"] == [2]
    [parts] = record["results"]
    embedding = 4 * 16 * 5056  # 5,004 rows, filled up to a multiple of 64
    assert parts["embedding_bytes"] == embedding > parts["largest_array_bytes"] >= embedding // 2
    # Parameters and two moments of Adam, half of them, and little else.
    assert 3 * embedding // 2 < parts["argument_bytes"] < 3 * embedding // 2 + embedding // 4
    assert parts["bytes"] == parts["argument_bytes"] + parts["output_bytes"] + parts["temp_bytes"]
    assert len(parts["run"]["seconds"]) == 2
    np.testing.assert_allclose(parts["run"]["losses"], np.log(5004), atol=0.5)
    assert "2 of 2" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_tiny_run_over_samples(tmp_path, capsys):
    output = tmp_path / "sampled.json"
    assert benchmark.main([*SAMPLED, "--items=50", "--full_up_to=10", f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    assert [(one["items"], one["form"]) for one in record["results"]] == [(50, "sampled"), (50, "lazy")]
    assert all(len(one["seconds"]) == 2 and one["median_seconds"] > 0 for one in record["results"])
    assert record["settings"]["repeats"] == 2
    assert "not run" in capsys.readouterr().out


def test_the_largest_array():
    assert largest_array("f32[3,4]{1,0} add(bf16[10,2]{1,0} a, pred[50]{0} b)") == 50
    assert largest_array("(f32[3,4], s64[2]) tuple()") == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*TINY, "--shards=3"], "--shards=3 must divide --devices=2"),
        ([*TINY, "--steps=0"], "--steps=0 must be at least 1"),
        ([*TINY, "--items=0"], "--items=0: expected sizes of at least 1"),
        (
            [*TINY, "--config=ml1m_tim4rec", "--shards=1"],
            "--config=ml1m_tim4rec: choose one with train.positions='all'",
        ),
        ([*SAMPLED, "--negatives=0"], "--negatives=0 must be at least 1"),
        ([*SAMPLED, "--items=0"], "--items=0: expected sizes of at least 1"),
        ([*SAMPLED, "--config=ml1m_tim4rec"], "--config=ml1m_tim4rec: choose one with train.positions='all'"),
    ],
)
def test_options_that_do_not_fit(capsys, options, message):
    assert benchmark.main(options) == 2
    assert message in capsys.readouterr().err
