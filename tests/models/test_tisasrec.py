"""TiSASRec against numbers of the original program, against PyTorch, and by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

from tests.models.attention_cases import (
    LENGTHS,
    batch,
    check_bfloat16,
    check_causality,
    check_dropout,
    check_initial_values,
    check_outputs_gradients_and_training,
    check_padding_and_batch,
    check_perturbed_parameters,
    check_round_trip,
    check_the_twin,
    check_twin_on_settings,
    one_thread,  # noqa: F401
    program,
    spread,
)
from tests.models.attention_cases import SMALL as SASREC
from tests.models.settings import sibling
from tim4rec_jax import build_model
from tim4rec_jax.layers.rows import Rows

SMALL = sibling(SASREC, "tisasrec", time_span=30)
PLAIN = dataclasses.replace(SMALL, dropout=0.0, attention_dropout=0.0)


def test_the_original_in_float32(golden_dir):
    check_outputs_gradients_and_training(golden_dir, "tisasrec")


def test_the_original_in_float64_with_perturbed_parameters(golden_dir, x64):
    check_perturbed_parameters(golden_dir, "tisasrec")


def test_the_twin_agrees_with_the_original(golden_dir):
    check_the_twin(golden_dir, "tisasrec")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "changes", [{"num_layers": 1, "attention_heads": 1, "time_span": 6}, {"num_layers": 3, "d_model": 32}]
)
def test_the_twin_on_other_settings(changes, x64):
    check_twin_on_settings(dataclasses.replace(SMALL, **changes))


def test_state_dicts_round_trip():
    check_round_trip(SMALL)


def test_the_model_is_causal():
    check_causality(SMALL)


def test_padding_and_batch_do_not_matter():
    check_padding_and_batch(SMALL)


def test_dropout_follows_the_example_id_and_not_the_batch():
    check_dropout(SMALL)


def test_initial_values():
    check_initial_values(dataclasses.replace(SMALL, vocab_size=200, max_len=50, time_span=256))


def test_bfloat16_is_close_and_keeps_sensitive_parts_in_float32():
    check_bfloat16(PLAIN)


def test_only_whole_seconds_up_to_the_span_between_events_count():
    run, params = program(PLAIN, "last"), spread(PLAIN)
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
    run, params = program(PLAIN, "last"), spread(PLAIN)
    items, timestamps = batch()
    today = (timestamps + 978_000_001) * (np.arange(12) < LENGTHS[:, None])
    exact = np.asarray(run(params, items, LENGTHS, today))
    assert np.abs(run(params, items, LENGTHS, today.astype(np.float32)) - exact).max() > 1e-2


def test_examples_drop_values_of_the_interval_tables():
    """Each at the rate, keys and values apart, every example for itself, and what is kept is scaled up."""
    config = dataclasses.replace(SMALL, time_span=199)
    params, model = spread(config), build_model(config)
    items, timestamps = batch()

    def tables(params, example_ids):
        bound = model.bind({"params": params}, rngs={"dropout": jax.random.key(0)})
        rows = Rows(jnp.asarray(items != 0), None, example_ids, deterministic=False)
        return bound._intervals(jnp.asarray(items), jnp.asarray(timestamps), rows)

    found = jax.jit(tables)(params, np.array([5, 6, 7, 5]))
    kept = []
    for rows, name in ((found.keys, "interval_keys"), (found.values, "interval_values")):
        rows, table = np.asarray(rows), params[name]["embedding"]
        kept.append(rows != 0)
        np.testing.assert_allclose(rows, np.where(kept[-1], table / 0.7, 0), rtol=1e-5)
        assert kept[-1].mean() == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / rows[:3].size))
        np.testing.assert_array_equal(rows[0], rows[3])
        assert (kept[-1][0] != kept[-1][1]).mean() == pytest.approx(0.42, abs=0.05)
    assert (kept[0] != kept[1]).mean() == pytest.approx(0.42, abs=0.05)


def test_bad_input():
    items, timestamps = batch()
    params = spread(SMALL)
    for method in ("all", "last"):
        run = program(SMALL, method)
        with pytest.raises(ValueError, match=r"timestamps have shape None, expected \(b, max_len\)=\(4, 12\)"):
            run.trace(params, items, LENGTHS, None)
        with pytest.raises(ValueError, match=r"timestamps have shape \(4, 8\), expected \(b, max_len\)=\(4, 12\)"):
            run.trace(params, items[:, :8], LENGTHS, timestamps[:, :8])
        with pytest.raises(ValueError, match="items have 13 positions, more than max_len=12"):
            run.trace(params, np.ones((4, 13), np.int32), LENGTHS, timestamps)
