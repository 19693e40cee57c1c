"""Events one by one give what whole histories give; what is refused changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.serving.tiny_run import NUM_ITEMS
from tim4rec_jax.serving.ranking import SCORE_TILE_BYTES
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.streaming import Streamer, fingerprint, require_streamable

pytestmark = pytest.mark.quick

START = 978_300_000


@pytest.fixture(scope="module")
def streamer(causal_recommender):
    return Streamer(causal_recommender.model, causal_recommender.params)


def histories(length, rows=3, seed=0):
    rng = np.random.default_rng(seed)
    gaps = rng.choice([0, 5, 60, 86_400, 3_000_000], (rows, length))
    return rng.integers(1, NUM_ITEMS + 1, (rows, length)), START + np.cumsum(gaps, axis=1)


@pytest.fixture(scope="module")
def encoded(streamer):
    items, times = histories(10)
    encode = jax.jit(lambda params, *a: streamer.model.apply({"params": params}, *a)[0])
    return np.asarray(encode(streamer.params, items.astype(np.int32), times.astype(np.int32)))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_steps_give_what_the_whole_history_gives(streamer, encoded):
    items, times = histories(10)
    state = streamer.init_state(3)
    for i in range(10):
        state, hidden = streamer.step(state, items[:, i], times[:, i])
        np.testing.assert_allclose(hidden, encoded[:, i], rtol=0, atol=1e-5 * np.abs(encoded).max())


def test_ragged_pieces(streamer, encoded):
    items, times = histories(10)
    state, _ = streamer.extend(streamer.init_state(3), items[:, :6], np.array([6, 2, 0]), times[:, :6])
    rest = np.array([4, 8, 10])
    padded = [np.zeros((3, 10), np.int64) for _ in range(2)]
    for row, size in enumerate(rest):
        for target, source in zip(padded, (items, times), strict=True):
            target[row, :size] = source[row, 10 - size :]
    _, hidden = streamer.extend(state, padded[0], rest, padded[1])
    np.testing.assert_allclose(hidden, encoded[:, -1], rtol=0, atol=1e-5 * np.abs(encoded).max())


def test_the_state_is_constant_and_counted(streamer):
    state = streamer.init_state(5)
    before = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    items, times = histories(4, rows=5)
    state, hidden = streamer.extend(state, items, np.full(5, 4), times)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == before
    assert streamer.state_bytes() == (before + hidden.nbytes) // 5


@pytest.mark.parametrize(
    ("item", "time", "message"),
    [
        (31, 10, r"row 1: unknown item 31; items are 1 to 30; the state is unchanged"),
        (0, 10, r"row 1: unknown item 0;"),
        (3, -1, rf"row 1: time {START - 1} goes backwards, the last event was at {START}; the state is unchanged"),
    ],
)
def test_a_refused_event_leaves_the_state_as_it_was(streamer, item, time, message):
    state, _ = streamer.step(streamer.init_state(2), np.array([1, 2]), np.array([START, START]))
    before = bits(state)
    with pytest.raises(ValueError, match=message):
        streamer.step(state, np.array([1, item]), np.array([START, START + time]))
    assert bits(state) == before
    streamer.step(state, np.array([1, 3]), np.array([START, START]))


def test_times_are_whole_seconds(streamer):
    state = streamer.init_state(1)
    with pytest.raises(ValueError, match="timestamps are float64; give whole numbers"):
        streamer.step(state, np.array([1]), np.array([0.5]))
    with pytest.raises(ValueError, match=r"978300000000 does not fit .* if these are milliseconds"):
        streamer.step(state, np.array([1]), np.array([978_300_000_000]))
    with pytest.raises(ValueError, match=r"items \(1, 1\), lengths \(1,\) and timestamps \(2, 1\) must be"):
        streamer.step(state, np.array([1]), np.array([START, START]))
    streamer.step(state, np.array([1]), np.array([START]))


def test_top_k_is_the_sorted_catalogue(streamer, encoded):
    hidden = jnp.asarray(encoded[:, -1])
    scores = np.asarray(streamer.model.apply({"params": streamer.params}, hidden, method="score"))
    exclude = [np.array([1, 2, 2]), np.array([], int), np.array([int(scores[2, 1:].argmax()) + 1])]
    for excluded in (None, exclude):
        indices, found = streamer.top_k(hidden, 7, excluded)
        for row in range(3):
            allowed = [i for i in range(1, 31) if excluded is None or i not in excluded[row]]
            best = sorted(allowed, key=lambda i, row=row: -scores[row, i])[:7]
            assert indices[row].tolist() == best
            np.testing.assert_allclose(found[row], scores[row, best], rtol=1e-5)


def test_top_k_in_tiles(streamer, encoded, monkeypatch):
    whole = streamer.top_k(jnp.asarray(encoded[0]), 4)
    monkeypatch.setitem(SCORE_TILE_BYTES, "cpu", 4 * 4 * (NUM_ITEMS + 1))
    for a, b in zip(streamer.top_k(jnp.asarray(encoded[0]), 4), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_top_k_refuses(streamer, encoded):
    hidden = jnp.asarray(encoded[:2, 0])
    with pytest.raises(ValueError, match="k=31 is larger than the catalogue of 30 items"):
        streamer.top_k(hidden, 31)
    with pytest.raises(FloatingPointError, match="the scores of you are not finite"):
        streamer.top_k(hidden.at[1].set(jnp.nan), 2, labels=["me", "you"])


def test_a_list_ends_where_nothing_is_left(streamer, encoded):
    indices, scores = streamer.top_k(jnp.asarray(encoded[:2, 0]), 29, [np.array([1]), np.array([1, 2])])
    assert (indices[0] > 1).all() and (indices[1, :28] > 2).all()
    assert indices[1, 28] == 0 and scores[1, 28] == -np.inf


def test_only_models_that_go_on(recommender):
    with pytest.raises(ValueError, match="'tim4rec' cannot go on from a state.*tim4rec_causal"):
        require_streamable(recommender.model)


def test_the_fingerprint_tells_models_apart(streamer, causal_run):
    again = Recommender.from_run(causal_run)
    ids = again.item_ids
    mine = fingerprint(streamer.model, streamer.params, ids)
    assert fingerprint(again.model, again.params, ids) == mine
    changed = {
        **again.params,
        "item_embedding": jax.tree.map(lambda x: x.at[0, 0].add(1e-6), again.params["item_embedding"]),
    }
    assert fingerprint(again.model, changed, ids) != mine
    assert fingerprint(again.model, again.params, ids[::-1]) != mine
    same = dataclasses.replace(again.model.config, kernels="xla", chunk_size=7, dropout=0.7, time_dropout=0.7)
    assert fingerprint(type(again.model)(same), again.params, ids) == mine
    other = dataclasses.replace(again.model.config, norm_eps=1e-5)
    assert fingerprint(type(again.model)(other), again.params, ids) != mine
