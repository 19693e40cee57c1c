"""The generated log: its rule, its noise, its times."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from tim4rec_jax.data.synthetic import GAP_THRESHOLD, generate, popularity, transition_rules
from tim4rec_jax.data_config import SyntheticConfig

CONFIG = SyntheticConfig(num_users=2000, num_items=400, min_events=8, max_events=30, noise=0.1, seed=7)


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    return generate(CONFIG)


def _transitions(log: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(last item, last gap, next item) of every event that has two events before it; items count from 0."""
    user, time = log["user"].to_numpy(), log["timestamp"].to_numpy()
    item = log["item"].cast(pl.Int64).to_numpy() - 1
    inside = (user[2:] == user[1:-1]) & (user[1:-1] == user[:-2])
    return item[1:-1][inside], (time[1:-1] - time[:-2])[inside], item[2:][inside]


def test_columns_and_sizes(log):
    assert log.schema == {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    counts = log.group_by("user").len()["len"]
    assert len(counts) == CONFIG.num_users
    assert counts.min() == CONFIG.min_events and counts.max() == CONFIG.max_events
    assert set(log["item"].unique()) == {str(i) for i in range(1, CONFIG.num_items + 1)}


def test_the_oracle_needs_the_gap(log):
    short, long = transition_rules(CONFIG)
    last, gap, following = _transitions(log)
    with_gap = np.mean(np.where(gap < GAP_THRESHOLD, short[last], long[last]) == following)
    assert 0.89 < with_gap < 0.93
    for rule in (short, long):
        assert 0.43 < np.mean(rule[last] == following) < 0.52
    # The best predictor that sees the last item alone: the item that follows it most often.
    pairs = pl.DataFrame({"last": last, "next": following}).group_by("last", "next").len()
    best = pairs.group_by("last").agg(pl.col("len").max())["len"].sum() / len(last)
    assert 0.45 < best < 0.58


def test_popularity_is_a_poor_predictor(log):
    _, _, following = _transitions(log)
    top = np.argsort(-np.bincount(following, minlength=CONFIG.num_items))[:10]
    assert np.isin(following, top).mean() < 0.15


def test_noise_follows_popularity():
    noisy = dataclasses.replace(CONFIG, noise=1.0)
    items = generate(noisy)["item"].cast(pl.Int64).to_numpy() - 1
    share = np.bincount(items, minlength=noisy.num_items) / len(items)
    np.testing.assert_allclose(share, popularity(noisy), atol=0.006)


def test_no_noise_means_the_rule_always(log):
    clean = dataclasses.replace(CONFIG, noise=0.0, num_users=50)
    short, long = transition_rules(clean)
    last, gap, following = _transitions(generate(clean))
    np.testing.assert_array_equal(np.where(gap < GAP_THRESHOLD, short[last], long[last]), following)


def test_gaps_survive_float32_seconds(log):
    _, gap, _ = _transitions(log)
    assert gap.min() >= 50 * 64
    assert 0.48 < np.mean(gap >= GAP_THRESHOLD) < 0.52
    exact = log["timestamp"].to_numpy()
    rounded = exact.astype(np.float32).astype(np.int64)
    assert np.abs(rounded - exact).max() <= 32


def test_same_seed_same_rows(log):
    assert generate(CONFIG).equals(log)
    assert not generate(dataclasses.replace(CONFIG, seed=8)).equals(log)
