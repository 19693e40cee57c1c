"""Killed at random moments and resumed each time, a run ends with the bits of one that was left alone."""

import json

import pytest

from tests.training.forked_runs import OPTIONS, require_same_runs, run_forking

MASKED = [
    option.replace("=quickstart_sasrec", "=quickstart_bert4rec").replace("batch_size=128", "batch_size=12")
    for option in OPTIONS
]
RUNS = {"prefixes": (OPTIONS, 25), "masked events": (MASKED, 6)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("run", RUNS)
def test_kills_change_no_bit(run, tmp_path):
    options, kills = RUNS[run]
    output = tmp_path / "found.json"
    options = [*options, "--train.tensorboard=false"]
    run_forking("killed_runs", str(output), str(tmp_path), str(kills), *options, folder=tmp_path)
    found = json.loads(output.read_text())
    assert len(found["kills"]) == kills
    # Before anything was written, and after different numbers of steps.
    moments = {moment for _, moment in found["kills"]}
    assert len(moments) > kills // 5
    require_same_runs([tmp_path / f"run_{number}" for number in range(found["runs"])], tmp_path / "reference")
