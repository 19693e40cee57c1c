"""TiSASRec's intervals: which seconds count, and how dropout takes from their tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import load_config
from tests.models.calls import LENGTHS, program, rows, small, spread
from tim4rec_jax import build_model
from tim4rec_jax.config import experiment_from_dict
from tim4rec_jax.layers.attention import Intervals, shortest_gap
from tim4rec_jax.layers.rows import Rows

SMALL = small("tisasrec")


def batch():
    """Gaps on both sides of the span of 30 seconds."""
    items, _ = rows()
    gaps = np.random.default_rng(3).choice([0, 1, 5, 20, 400], items.shape)
    return items, ((1000 + np.cumsum(gaps, axis=1)) * (items != 0)).astype(np.int32)


def test_only_whole_seconds_up_to_the_span_between_events_count():
    run, params = program(SMALL, "last"), spread(SMALL)
    items, timestamps = batch()
    before = np.asarray(run(params, items, LENGTHS, timestamps))
    inside = np.arange(12) < LENGTHS[:, None]
    np.testing.assert_array_equal(run(params, items, LENGTHS, (timestamps + 978_000_000) * inside), before)
    np.testing.assert_array_equal(run(params, items, LENGTHS, timestamps.astype(np.float32)), before)
    later = timestamps.copy()
    later[0, 11] += 10_000
    far = np.asarray(run(params, items, LENGTHS, later))
    assert np.abs(far[0] - before[0]).max() > 1e-3
    np.testing.assert_array_equal(far[1:], before[1:])
    later[0, 11] += 1_000_000_000
    np.testing.assert_array_equal(run(params, items, LENGTHS, later), far)
    # A row of one event has no gap to read.
    late = np.where(np.arange(4)[:, None] == 1, timestamps + 7 * inside, timestamps)
    np.testing.assert_array_equal(run(params, items, LENGTHS, late), before)


def test_float32_seconds_of_today_blur_what_integers_tell_apart():
    run, params = program(SMALL, "last"), spread(SMALL)
    items, timestamps = batch()
    today = (timestamps + 978_000_001) * (np.arange(12) < LENGTHS[:, None])
    exact = np.asarray(run(params, items, LENGTHS, today))
    assert np.abs(run(params, items, LENGTHS, today.astype(np.float32)) - exact).max() > 1e-2


def test_examples_drop_values_of_the_interval_tables():
    """Each at the rate, keys and values apart, every example for itself, and what is kept is scaled up."""
    config = small("tisasrec", time_span=199)
    params, model = spread(config), build_model(config)
    items, timestamps = batch()

    def tables(params, example_ids):
        bound = model.bind({"params": params}, rngs={"dropout": jax.random.key(0)})
        rows = Rows(jnp.asarray(items != 0), None, example_ids, deterministic=False)
        return bound._intervals(jnp.asarray(items), jnp.asarray(timestamps), rows)

    found = jax.jit(tables)(params, np.array([5, 6, 7, 5]))
    kept = []
    for dropped, name in ((found.keys, "interval_keys"), (found.values, "interval_values")):
        dropped, table = np.asarray(dropped), params[name]["embedding"]
        kept.append(dropped != 0)
        np.testing.assert_allclose(dropped, np.where(kept[-1], table / 0.7, 0), rtol=1e-5)
        assert kept[-1].mean() == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / dropped[:3].size))
        np.testing.assert_array_equal(dropped[0], dropped[3])
        assert (kept[-1][0] != kept[-1][1]).mean() == pytest.approx(0.42, abs=0.05)
    assert (kept[0] != kept[1]).mean() == pytest.approx(0.42, abs=0.05)


def test_intervals_in_the_shortest_gap_of_the_history():
    """By the definition, each position with the gaps up to it; all times twice as far apart give the same."""
    items, timestamps = batch()
    real = items != 0
    span = 30
    positions = np.broadcast_to(np.arange(12), items.shape)
    keys = jnp.zeros((span + 1, 8))
    for times in (timestamps, timestamps.astype(np.float32)):
        unit = shortest_gap(jnp.asarray(times), jnp.asarray(real))
        found = np.asarray(Intervals(jnp.asarray(times), keys, keys, unit).between(jnp.asarray(positions)))
        for row, i in np.ndindex(*items.shape):
            if real[row, i]:
                own = timestamps[row, : i + 1].astype(np.int64)
                gaps = np.diff(own)
                shortest = gaps[gaps > 0].min(initial=np.iinfo(np.int64).max) if (gaps > 0).any() else 1
                expected = np.minimum((own[-1] - own) // shortest, span)
                np.testing.assert_array_equal(found[row, i, : i + 1], expected)
    config = small("tisasrec", interval_unit="shortest")
    run, params = program(config, "last"), spread(config)
    before = np.asarray(run(params, items, LENGTHS, timestamps))
    np.testing.assert_array_equal(run(params, items, LENGTHS, 2 * timestamps), before)
    assert np.abs(program(SMALL, "last")(params, items, LENGTHS, timestamps) - before).max() > 1e-3
    stored = load_config("ml100k_tisasrec").to_dict()
    stored["model"]["interval_unit"] = "day"
    with pytest.raises(ValueError, match="model.interval_unit='day' must be one of"):
        experiment_from_dict(stored)
