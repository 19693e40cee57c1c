"""No result depends on what time it is."""

import itertools
import os
import time

import pytest

from experiments import train
from tests.training.ctrl_c import ctrl_c_at
from tests.training.event_records import events_of
from tests.training.forked_runs import OPTIONS, require_same_runs
from tim4rec_jax.training.logging import read_metrics


@pytest.mark.exhaustive
def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    """An hour at every look, and over a resume; files of older steps look newer than those of later ones."""
    reference, folder = tmp_path / "reference", tmp_path / "run"
    assert train.main([*OPTIONS, f"--run_dir={reference}"]) == 0
    hours = itertools.count()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    with ctrl_c_at(16):
        assert train.main([*OPTIONS, f"--run_dir={folder}"]) == 130
    for age, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (now - 86400 * age, now - 86400 * age))
    assert train.main([*OPTIONS, f"--run_dir={folder}", "--resume"]) == 0

    require_same_runs([folder], reference)
    lines = read_metrics(folder)
    assert all(line[name] >= 0 for line in lines for name in line if "seconds" in name or "per_second" in name)
    steps = {event.step for event in events_of(folder) if event.summary.value and not event.session_log.status}
    assert steps == {line["step"] for line in lines if "step" in line}
