"""experiments.benchmark serving: a tiny run, and that its forms do what they are named after."""

import argparse
import json

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import serving

TINY = ["serving", "--config=ml1m_ssd4rec", "--tiny", "--items=30", "--repeats=2", "--seconds=1e-3"]


def test_a_tiny_run(tmp_path, capsys):
    output, figure = tmp_path / "serving.json", tmp_path / "serving.png"
    sizes = ["--histories=10,1500", "--longest=50", "--users=1,5"]
    assert benchmark.main([*TINY, *sizes, f"--output={output}", f"--figure={figure}"]) == 0
    record = json.loads(output.read_text())
    assert record["benchmark"] == "serving" and record["environment"]["backend"] == "cpu"
    settings = {
        "config": "ml1m_ssd4rec",
        "items": 30,
        "histories": [10, 1500],
        "longest": 50,
        "users": [1, 5],
        "seconds": 1e-3,
        "seed": 0,
        "tiny": True,
        "repeats": 2,
    }
    assert record["settings"] == settings and record["model"]["name"] == "ssd4rec"
    growing = {(one["history"], one["form"]): one for one in record["history"]}
    assert set(growing) == {(10, "step"), (10, "window"), (10, "whole"), (1500, "step"), (1500, "window")}
    wide = {(one["users"], one["form"]): one for one in record["users"]}
    assert set(wide) == {(users, form) for users in (1, 5) for form in ("step", "table", "answer", "list", "window")}
    for one in growing.values():
        assert len(one["seconds"]) == 2 and one["microseconds_an_event"] == pytest.approx(1e6 * sum(one["seconds"]) / 2)
    for (users, _), one in wide.items():
        assert one["users_a_second"] == pytest.approx(2 * users / sum(one["seconds"]))
    shown = capsys.readouterr().out
    assert f"ml1m_ssd4rec: {record['state_bytes']:,} bytes of state per user" in shown and "1,500" in shown
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def served():
    options = argparse.Namespace(config="ml1m_ssd4rec", items=30, tiny=True)
    return serving.Served(serving.settings_of(options), 0)


def test_forms_read_what_they_say(served):
    """Going on from the state gives what reading the history with one more event gives."""
    items, times = serving.draw(served.rng, 3, 7, 30)
    hidden = served.stepping(items, times).launch()
    again = np.concatenate([items, items[:, :1]], axis=1), np.concatenate([times, times[:, -1:]], axis=1)
    for longest in (8, 20):
        [read] = served.reading(*again, longest).launch()
        np.testing.assert_allclose(hidden, read, atol=1e-5)
    # Untrained states forget all but the last few events.
    [window] = served.reading(*again, 1).launch()
    assert np.abs(np.asarray(window) - np.asarray(hidden)).max() > 1e-4
    assert np.asarray(served.tabling(items, times).launch())[:3].any(axis=1).all()
    indices, _ = served.answering(items, times).launch()
    assert indices.shape == (3, serving.LISTED)
    listed = served.listing(items, times).launch()
    assert not any(set(row) & set(seen) for row, seen in zip(listed.tolist(), items.tolist(), strict=True))


def test_rows_are_read_in_parts(served, monkeypatch):
    items, times = serving.draw(served.rng, 5, 8, 30)
    [whole] = served.reading(items, times, 8).launch()
    monkeypatch.setattr(serving, "WINDOW_TOKENS", 16)
    parts = served.reading(items, times, 8).launch()
    assert [len(part) for part in parts] == [2, 2, 1]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_the_state_is_that_of_one_pass(served, monkeypatch):
    items, times = serving.draw(served.rng, 2, 7, 30)
    whole = served.state_after(items, times)
    monkeypatch.setattr(serving, "_PIECE", 3)
    for a, b in zip(jax.tree.leaves(served.state_after(items, times)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_drawn_histories():
    items, times = serving.draw(np.random.default_rng(0), 2, 100_000, 30)
    assert items.min() == 1 and items.max() == 30
    assert (np.diff(times) >= 0).all() and times.max() < 2**31


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--users=0,4"], "--users=0,4: expected numbers of at least 1"),
        (["--items=9"], "--items=9 must be at least 10, the length of a list"),
        (["--config=ml1m_tim4rec"], "cannot go on from a state"),
    ],
)
def test_bad_options(capsys, argv, message):
    assert benchmark.main([*TINY, *argv]) == 2
    assert message in capsys.readouterr().err
