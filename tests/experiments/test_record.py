"""Evidence of a finished run: everything it rests on, and no folder of the machine."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import record
from experiments.comparison.plan import parse
from tests.experiments.test_compare import TINY, finish
from tim4rec_jax.data.interactions import load_log


def test_a_finished_run_as_one_file(tmp_path):
    _, plan = parse([*TINY, "--seeds=2020,"])
    config = plan.configs["sasrec"]
    log = load_log(config.data)
    data = dataclasses.replace(config.data, path=str(tmp_path / "log.csv"), cache_dir=str(tmp_path / "cache"))
    at = dataclasses.replace(plan, configs={"sasrec": dataclasses.replace(config, data=data)}, runs=tmp_path / "runs")
    finish(at, "sasrec", 2020, log, np.full(log.num_users, 3, np.int32))
    output = tmp_path / "out" / "evidence.json"
    assert record.main([f"--run={at.folder('sasrec', 2020)}", f"--output={output}", "--note=By hand."]) == 0
    text = output.read_text()
    written = json.loads(text)
    assert str(tmp_path) not in text and "cache_dir" not in text
    assert written["config"]["data"]["path"] == "log.csv" and written["note"] == "By hand."
    assert written["environment"]["command"][-1] == "--run_dir=seed_2020"
    assert written["environment"]["data_fingerprint"] == log.fingerprint
    assert written["results"]["test"]["mrr@5"] == pytest.approx(1 / 3) and written["train_seconds"] == 9.0
    assert [epoch["epoch"] for epoch in written["epochs"]] == [1, 2]


def test_an_unfinished_run_is_one_clear_line(tmp_path, capsys):
    assert record.main([f"--run={tmp_path}", f"--output={tmp_path / 'x.json'}"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "x.json").exists()
