"""Killed at 25 random moments and resumed each time, a run ends with the bits of one that was left alone."""

import json

import pytest

from tests.training.forked_runs import OPTIONS, require_same_runs, run_forking

KILLS = 25


@pytest.mark.exhaustive
def test_twenty_five_kills_change_no_bit(tmp_path):
    output = tmp_path / "found.json"
    options = [*OPTIONS, "--train.tensorboard=false"]
    run_forking("killed_runs", str(output), str(tmp_path), str(KILLS), *options, folder=tmp_path)
    found = json.loads(output.read_text())
    assert len(found["kills"]) == KILLS
    # Before anything was written, and after different numbers of steps.
    moments = {moment for _, moment in found["kills"]}
    assert len(moments) > 5
    require_same_runs([tmp_path / f"run_{number}" for number in range(found["runs"])], tmp_path / "reference")
