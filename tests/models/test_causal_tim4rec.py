"""The causal form of TiM4Rec: no position reads a later one, histories share rows, and go on from a state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.calls import program
from tests.models.settings import sibling
from tim4rec_jax import build_model
from tim4rec_jax.layers.causal_time import DateOffset, gap_features
from tim4rec_jax.models import STATISTICS, CausalTiM4RecConfig, init_params, one_segment, variables

CAUSAL = CausalTiM4RecConfig(
    vocab_size=40, max_len=12, d_model=16, d_state=8, head_dim=8, chunk_size=5, dropout=0.0, time_dropout=0.0,
    norm_eps=1e-6, date_knots=5, dtype="float64",
)  # fmt: skip
TIMES = {"gap_mean": 8.0, "gap_std": 3.0, "first_second": 1_000, "last_second": 40_000_000}
SETTINGS = {
    "time": CAUSAL,
    "time off": sibling(CAUSAL, "ssd4rec"),
    "one layer, no date": dataclasses.replace(CAUSAL, num_layers=1, use_ffn=False, date_knots=0),
}


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


@pytest.mark.parametrize("name", SETTINGS)
def test_no_position_reads_a_later_one(name):
    config = SETTINGS[name]
    assert build_model(config).causal and build_model(config).causal
    params = perturbed(config)
    items, timestamps = history(9)
    before = encode(config, params, items, timestamps)
    for position in (1, 5, 8):
        changed = encode(
            config, params, items.at[:, position].set(items[:, position] % 39 + 1), timestamps.at[:, position:].add(777)
        )
        np.testing.assert_array_equal(changed[:, :position], before[:, :position])
        assert np.abs(changed[:, position:] - before[:, position:]).max(axis=(0, 2)).min() > 1e-6


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


@pytest.mark.parametrize("name", SETTINGS)
def test_the_last_position_alone(name):
    config = SETTINGS[name]
    params = perturbed(config)
    items, timestamps = history(9)
    lengths = jnp.array([1, 5, 9], jnp.int32)
    inside = jnp.arange(9) < lengths[:, None]
    items, timestamps = jnp.where(inside, items, 0), jnp.where(inside, timestamps, 0)
    every = encode(config, params, items, timestamps)
    last = program(config, "last")(params, items, lengths, timestamps)
    np.testing.assert_allclose(last, every[jnp.arange(3), lengths - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_packed_histories_know_nothing_of_each_other(name):
    config = SETTINGS[name]
    params = perturbed(config)
    items, timestamps = history(11, rows=2)
    starts = np.zeros((2, 11), bool)
    starts[0, [0, 4, 5]] = starts[1, [0, 7]] = True
    segment_ids = jnp.cumsum(starts, axis=1)
    packed = encode(config, params, items, timestamps, segment_ids=segment_ids)
    for row, first, end in ((0, 0, 4), (0, 4, 5), (0, 5, 11), (1, 0, 7), (1, 7, 11)):
        alone = encode(config, params, items[row : row + 1, first:end], timestamps[row : row + 1, first:end])
        np.testing.assert_allclose(packed[row, first:end], alone[0], rtol=0, atol=1e-11)
    changed = items.at[0, :4].set(1), timestamps.at[0, :4].set(5)
    other = encode(config, params, *changed, segment_ids=segment_ids)
    np.testing.assert_array_equal(other[0, 4:], packed[0, 4:])


@pytest.mark.parametrize("name", SETTINGS)
def test_pieces_of_any_size_give_what_one_pass_gives(name):
    config = SETTINGS[name]
    params = perturbed(config)
    items, timestamps = history(23)
    whole = encode(config, params, items, timestamps)
    final = None
    for sizes in ([23], [1] * 23, [7, 1, 2, 13]):
        cache, parts, at = empty_cache(config, params, 3), [], 0
        for size in sizes:
            columns = slice(at, at + size)
            hidden, cache = called(config)(params, items[:, columns], timestamps[:, columns], cache=cache)
            parts.append(hidden)
            at += size
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-10)
        final = cache if final is None else final
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(final), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(final.events, 23)


def test_ragged_pieces_leave_what_is_padded_alone():
    params = perturbed(CAUSAL)
    items, timestamps = history(6)
    empty = empty_cache(CAUSAL, params, 3)
    options = {"segment_ids": one_segment(jnp.array([0, 2, 6]), 6), "cache": empty}
    _, cache = called(CAUSAL)(params, items, timestamps, **options)
    for leaf, start in zip(jax.tree.leaves(cache), jax.tree.leaves(empty), strict=True):
        np.testing.assert_array_equal(leaf[0], start[0])
    junk_items, junk_times = items.at[1, 2:].set(7), timestamps.at[1, 2:].set(1)
    _, other = called(CAUSAL)(params, junk_items, junk_times, **options)
    jax.tree.map(np.testing.assert_array_equal, cache, other)
    assert cache.events.tolist() == [0, 2, 6]


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


def test_no_parameter_depends_on_the_length():
    models = (build_model(dataclasses.replace(CAUSAL, max_len=length)) for length in (3, 50))
    shapes = [jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)) for model in models]
    assert shapes[0] == shapes[1]


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
