"""The causal form of TiM4Rec: what it reads of gaps and dates, and ten thousand events one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax import build_model
from tim4rec_jax.layers.causal_time import DateOffset, gap_features
from tim4rec_jax.models import STATISTICS, CausalTiM4RecConfig, init_params, variables

CAUSAL = CausalTiM4RecConfig(
    vocab_size=40,
    max_len=12,
    d_model=16,
    d_state=8,
    head_dim=8,
    chunk_size=5,
    dropout=0.0,
    time_dropout=0.0,
    norm_eps=1e-6,
    date_knots=5,
    dtype="float64",
)
TIMES = {"gap_mean": 8.0, "gap_std": 3.0, "first_second": 1_000, "last_second": 40_000_000}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def perturbed(config):
    """Parameters far from their initial values, where every path counts."""
    params = init_params(build_model(config), jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.normal(size=p.shape), p.dtype), params)
    statistics = build_model(config).data_statistics(**TIMES)
    return params | ({STATISTICS: statistics} if statistics else {})


def history(length, seed=2, rows=3):
    rng = np.random.default_rng(seed)
    items = rng.integers(1, CAUSAL.vocab_size, (rows, length), np.int32)
    gaps = rng.choice([0, 1, 60, 86_400, 3_000_000], (rows, length)).astype(np.int64)
    return jnp.asarray(items), jnp.asarray(np.cumsum(gaps, axis=1) % 2_000_000_000 + 100, jnp.int32)


@functools.cache
def called(config):
    model = build_model(config)
    return jax.jit(lambda params, *a, **k: model.apply(variables(params), *a, **k))


def encode(config, params, items, timestamps, **options):
    return called(config)(params, items, timestamps, **options)[0]


def empty_cache(config, params, rows):
    return build_model(config).apply(variables(params), rows, method="init_cache")


def test_without_a_date_time_matters_only_by_its_gaps():
    config = dataclasses.replace(CAUSAL, date_knots=0)
    params = perturbed(config)
    items, timestamps = history(9)
    before = encode(config, params, items, timestamps)
    np.testing.assert_array_equal(encode(config, params, items, timestamps + 5_000), before)
    later = encode(config, params, items, timestamps.at[:, 4:].add(5_000))
    np.testing.assert_array_equal(later[:, :4], before[:, :4])
    assert np.abs(later[:, 4:] - before[:, 4:]).max() > 1e-4
    # A tie is told from a first event and from a short gap.
    tied = timestamps.at[:, 1].set(timestamps[:, 0])
    a_second = tied.at[:, 1:].add(1)
    first, second = (encode(config, params, items, times)[:, 1] for times in (tied, a_second))
    assert np.abs(first - second).max() > 1e-7


def test_features_of_an_events_time():
    gaps, firsts = jnp.array([[9, 0, 1, 86_400, 2**31 - 1]]), jnp.array([[True] + [False] * 4])
    features = gap_features(gaps, firsts, mean=2.0, std=4.0, dtype=jnp.float64)[0]
    scaled = [0, 0, *(np.log1p([1, 86_400, 2**31 - 1]) - 2) / 4]
    np.testing.assert_allclose(features[:, 0], scaled, rtol=1e-15)
    np.testing.assert_array_equal(features[:, 1:], [[0, 1], [1, 0], [0, 0], [0, 0], [0, 0]])


def test_the_date_shifts_the_output_along_straight_lines():
    config = dataclasses.replace(CAUSAL, date_knots=3)
    knots = np.random.default_rng(0).normal(size=(3, config.d_model))
    offset = DateOffset(config).apply(
        {"params": {"knots": jnp.asarray(knots)}}, jnp.array([50, 100, 150, 200, 275, 400]), 100, 300, 2 / 200
    )
    expected = [knots[0], knots[0], (knots[0] + knots[1]) / 2, knots[1], 0.25 * knots[1] + 0.75 * knots[2], knots[2]]
    np.testing.assert_allclose(offset, expected, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"date_knots=1 must be 0, or at least 2"):
        dataclasses.replace(CAUSAL, date_knots=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_ten_thousand_events_one_by_one(dtype, tolerance):
    """At initial values, as trained models are: small random changes of the decays would forget everything."""
    config = dataclasses.replace(CAUSAL, dtype=dtype, vocab_size=30)
    model = build_model(config)
    params = init_params(model, jax.random.key(3))
    items, timestamps = (
        1 + column[:, :10_000] % 29 if i == 0 else column for i, column in enumerate(history(10_000, rows=1))
    )
    timestamps = jnp.cumsum(jnp.abs(timestamps) % 1000, axis=1).astype(jnp.int32)
    whole = encode(config, params, items, timestamps)

    def step(cache, event):
        item, second = event
        given = item[None, None], second[None, None]
        hidden, cache = model.apply(variables(params), *given, cache=cache)
        return cache, hidden[0, 0]

    start = empty_cache(config, params, 1)
    _, stepped = jax.jit(lambda cache: jax.lax.scan(step, cache, (items[0], timestamps[0])))(start)
    np.testing.assert_allclose(stepped, whole[0], rtol=0, atol=tolerance * float(jnp.abs(whole).max()))


def test_time_must_be_whole_seconds_for_every_position():
    params = perturbed(CAUSAL)
    items, timestamps = history(5)
    with pytest.raises(ValueError, match=r"timestamps are float32; .* data.timestamp_precision='int64'"):
        encode(CAUSAL, params, items, timestamps.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"timestamps have shape \(3, 4\), expected at least \(b, l\)=\(3, 5\)"):
        encode(CAUSAL, params, items, timestamps[:, :4])


def test_without_statistics_the_neutral_ones_are_taken():
    params = perturbed(CAUSAL)
    items, timestamps = history(5)
    plain = {name: part for name, part in params.items() if name != STATISTICS}
    neutral = plain | {STATISTICS: build_model(CAUSAL).data_statistics()}
    found = encode(CAUSAL, plain, items, timestamps)
    np.testing.assert_array_equal(found, encode(CAUSAL, neutral, items, timestamps))
    assert np.abs(found - encode(CAUSAL, params, items, timestamps)).max() > 1e-3
