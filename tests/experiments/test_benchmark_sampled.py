"""experiments.benchmark sampled: a tiny run."""

import json

import pytest

from experiments import benchmark

TINY = ["sampled", "--tiny", "--batch_rows=2", "--length=8", "--negatives=16", "--repeats=2"]


@pytest.mark.slow
def test_a_tiny_run(tmp_path, capsys):
    output = tmp_path / "sampled.json"
    assert benchmark.main([*TINY, "--items=50", "--full_up_to=10", f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    assert [(one["items"], one["form"]) for one in record["results"]] == [(50, "sampled"), (50, "lazy")]
    assert all(len(one["seconds"]) == 2 and one["median_seconds"] > 0 for one in record["results"])
    assert record["settings"]["repeats"] == 2
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--negatives=0"], "--negatives=0 must be at least 1"),
        (["--items=0"], "--items=0: expected sizes of at least 1"),
        (["--config=ml1m_tim4rec"], "--config=ml1m_tim4rec: choose one with train.positions='all'"),
    ],
)
def test_options_that_do_not_fit(capsys, options, message):
    assert benchmark.main([*TINY, *options]) == 2
    assert message in capsys.readouterr().err
