"""experiments.benchmark nearest_items and daily: small runs, and what they record."""

import json

import numpy as np
import polars as pl
import pytest

from experiments import benchmark
from experiments.benchmarks import daily


def test_an_index_beside_all_items(tmp_path, capsys):
    pytest.importorskip("usearch", reason="the index is built by usearch, which is not installed")
    output = tmp_path / "out.json"
    command = ["nearest_items", "--items=2000", "--queries=20", "--width=16", "--repeats=1", f"--output={output}"]
    assert benchmark.main(command) == 0
    [one] = json.loads(output.read_text())["sizes"]
    assert one["items"] == 2000 and one["recall"] >= 0.99 and one["queries"] == 20
    assert one["bytes"] > 2000 * 16 * 4 and one["index"]["median_seconds"] > 0
    capsys.readouterr()
    for option, said in (("--items=5", "must be at least 10"), ("--queries=0", "must be at least 1")):
        assert benchmark.main(["nearest_items", option]) == 2
        assert said in capsys.readouterr().err


def test_the_seconds_until_a_value_is_reached():
    lines = [{"ndcg@10": value, "train_seconds": 2.0} for value in (0.1, 0.29996, 0.2, 0.4)]
    lines[0]["train_seconds"] = 50.0  # It compiles.
    assert daily._seconds_until(lines, "ndcg@10", 0.3) == 4.0
    assert daily._seconds_until(lines, "ndcg@10", 0.4) == 8.0
    assert daily._seconds_until(lines, "ndcg@10", 0.41) is None


@pytest.mark.exhaustive
def test_three_days(tmp_path):
    output = tmp_path / "daily.json"
    small = ["--model.d_model=16", "--model.num_layers=1", "--model.d_state=8", "--model.head_dim=16"]
    rng = np.random.default_rng(0)
    users, times = np.repeat(np.arange(60), 20), rng.permutation(1200)
    log = pl.DataFrame({"user": users, "item": rng.integers(1, 30, users.size), "timestamp": times})
    log.write_csv(tmp_path / "log.csv")
    options = ["--data.name=custom", f"--data.path={tmp_path / 'log.csv'}", "--data.k_core=0"]
    options += ["--train.epochs=4", "--train.progress=false"]
    command = ["daily", "--config=quickstart", "--days=3", "--share=0.5", *options, *small, f"--output={output}"]
    assert benchmark.main(command) == 0
    days = json.loads(output.read_text())["days"]
    assert [day["day"] for day in days] == [1, 2, 3] and "warm" not in days[0]
    assert days[0]["events"] < days[1]["events"] < days[2]["events"]
    assert [day["warm"]["init_from"]["run"] for day in days[1:]] == ["day1_cold", "day2_warm"]
    assert all(day["warm"]["epochs"] == 2 and day["cold"]["epochs"] == 4 for day in days[1:])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--days=1", "--days=1 must be at least 2"),
        ("--share=0", "must lie in"),
        ("--data.split=none", "holds nothing out"),
        ("--data.where=time>5", "leave it out"),
    ],
)
def test_bad_options_of_daily(option, said, capsys):
    assert benchmark.main(["daily", "--config=quickstart", option]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
