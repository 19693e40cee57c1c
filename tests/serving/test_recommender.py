"""Recommendations against scores sorted by hand, and what bad requests are told."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from tests.edited_runs import make_old
from tests.models.settings import sibling
from tests.serving.tiny_run import MAX_LEN, NUM_ITEMS
from tim4rec_jax.models import build_model, init_params, last_hidden
from tim4rec_jax.serving import recommender as recommender_module
from tim4rec_jax.serving.ranking import SCORE_TILE_BYTES
from tim4rec_jax.serving.recommender import History, Recommender


@pytest.fixture(scope="module")
def histories(recommender, log):
    return [recommender.history_of_user(user) for user in log.user_ids]


@pytest.fixture(scope="module")
def all_scores(recommender, histories):
    """Scores of every history one by one, at full length."""
    model, variables = recommender.model, {"params": recommender.params}

    @jax.jit
    def score(items, lengths, timestamps):
        hidden, _ = model.apply(variables, items, timestamps)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return model.apply(variables, last, method="score")

    rows = []
    for history in histories:
        items, times = np.zeros((1, MAX_LEN), np.int32), np.zeros((1, MAX_LEN), np.float32)
        n = min(len(history.items), MAX_LEN)
        items[0, :n], times[0, :n] = history.items[-n:], history.timestamps[-n:]
        rows.append(np.asarray(score(items, np.array([n], np.int32), times))[0])
    return np.array(rows)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_top_k_is_the_sorted_catalogue(recommender, histories, all_scores, exclude_seen):
    for k in (1, 5):
        indices, scores = recommender.top_k(histories, k, exclude_seen=exclude_seen)
        for history, row, found, found_scores in zip(histories, all_scores, indices, scores, strict=True):
            allowed = [i for i in range(1, NUM_ITEMS + 1) if not (exclude_seen and i in history.items)]
            best = sorted(allowed, key=lambda i: -row[i])[:k]
            assert found.tolist() == best
            np.testing.assert_allclose(found_scores, row[best], rtol=1e-3, atol=1e-3)


def test_padding_is_never_recommended(recommender):
    """Even where its score is the best and the seen items fill their array."""
    favourite = jax.tree.map(lambda x: x, recommender.params)
    table = favourite["item_embedding"]["embedding"]
    history = recommender.history_from_ids(["i1"])
    model, config = recommender.model, recommender.config
    items, times = np.array([[1] + [0] * (MAX_LEN - 1)]), np.zeros((1, MAX_LEN), np.float32)
    hidden = last_hidden(model, {"params": favourite}, items, np.ones(1, np.int32), times)
    favourite = {**favourite, "item_embedding": {"embedding": table.at[0].set(1e3 * hidden[0])}}
    biased = Recommender(
        model, favourite, config, item_ids=recommender.item_ids, titles=None, histories=recommender._histories
    )
    for exclude_seen in (False, True):
        indices, _ = biased.top_k([history], 5, exclude_seen=exclude_seen)
        assert indices.min() >= 1


def test_small_batches_give_the_same(recommender, histories, monkeypatch):
    expected, expected_scores = recommender.top_k(histories, 5)
    monkeypatch.setattr(recommender_module, "BATCH_TOKENS", 64)
    monkeypatch.setitem(SCORE_TILE_BYTES, "cpu", 4 * 4 * (NUM_ITEMS + 1))
    indices, scores = recommender.top_k(histories, 5)
    np.testing.assert_array_equal(indices, expected)
    # The norms over near-constant gaps of this untrained model magnify rounding.
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-3)


def test_repeated_calls_do_not_compile(recommender, histories):
    recommender.top_k(histories[:3], 5)
    recommender.top_k(histories[:1], 5)
    compiled = recommender_module._top_k._cache_size()
    short = [History(history.items[:3], history.timestamps[:3]) for history in histories]
    recommender.top_k(short[:3], 5)
    compiled = max(compiled, recommender_module._top_k._cache_size())
    for k in (5, 6, 7, 8):
        recommender.top_k(short[4:8], k)
        recommender.top_k(short[4:7], k)
    assert recommender_module._top_k._cache_size() == compiled


def test_recommendations_carry_ids_and_titles(recommender, histories, log):
    indices, scores = recommender.top_k(histories[:2], NUM_ITEMS)
    lists = recommender.recommend(histories[:2], NUM_ITEMS)
    for row, row_scores, items in zip(indices, scores, lists, strict=True):
        assert [r.item_id for r in items] == [log.item_ids[int(i) - 1] for i in row]
        assert [r.score for r in items] == row_scores.tolist()
        titles = {r.item_id: r.title for r in items}
        assert titles.pop(log.item_ids[-1]) is None
        assert titles == {item_id: f"Title of {item_id}" for item_id in titles}


def test_history_of_user_is_the_whole_log(recommender, log):
    for user, user_id in enumerate(log.user_ids):
        history = recommender.history_of_user(user_id)
        rows = slice(log.offsets[user], log.offsets[user + 1])
        np.testing.assert_array_equal(history.items, log.items[rows])
        np.testing.assert_array_equal(history.timestamps, log.timestamps[rows])
        assert history.assumed_gap is None


def test_history_from_ids_with_times(recommender, log):
    history = recommender.history_from_ids([log.item_ids[4], log.item_ids[0]], [978_300_000, 978_300_000])
    assert history.items.tolist() == [5, 1]
    assert history.timestamps.tolist() == [978_300_000, 978_300_000]
    assert history.assumed_gap is None


def test_missing_times_are_assumed_and_said(recommender, log):
    gaps = np.concatenate([np.diff(log.timestamps[a:b]) for a, b in zip(log.offsets, log.offsets[1:], strict=False)])
    history = recommender.history_from_ids(log.item_ids[:4].to_list())
    assert history.assumed_gap == round(np.median(gaps))
    assert history.timestamps[-1] == log.timestamps.max()
    assert np.diff(history.timestamps).tolist() == [history.assumed_gap] * 3


def test_times_change_the_scores_of_a_time_aware_model(recommender, log):
    ids = log.item_ids[:MAX_LEN].to_list()
    even = recommender.history_from_ids(ids, 978_300_000 + 86_400 * np.arange(MAX_LEN))
    uneven = recommender.history_from_ids(ids, 978_300_000 + 8_640 * np.arange(MAX_LEN) ** 2)
    _, scores = recommender.top_k([even, uneven], 5)
    assert not np.allclose(scores[0], scores[1], rtol=1e-5)


def test_unknown_user(recommender):
    with pytest.raises(ValueError, match=r"unknown user 'u399'; nearest known: 'u39', .*histories.parquet .* all 40"):
        recommender.history_of_user("u399")


def test_unknown_item(recommender):
    with pytest.raises(
        ValueError, match=r"unknown item 'i77' at position 2; nearest known: 'i7', .*item_ids.parquet .* lists all 30"
    ):
        recommender.history_from_ids(["i1", "i77"])


def test_empty_history(recommender):
    with pytest.raises(ValueError, match="the history is empty; give at least 1 item id"):
        recommender.history_from_ids([])
    nothing = History(np.zeros(0, np.int32), np.zeros(0, np.int64), label="user 'x'")
    with pytest.raises(ValueError, match="user 'x' is empty; give at least 1 item id"):
        recommender.recommend([nothing], 3)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1], "the history has 2 items but 1 times; give one time an item, or none at all"),
        ([100, 99], "times go backwards at position 2: 99 after 100; give items and times oldest first"),
        ([100.5, 101], "times must be whole seconds since 1970, got"),
        ([-5, 3], "time -5 at position 1 is beyond 0"),
        ([978_300_000, 978_300_000_000], "time 978300000000 at position 2 .* not milliseconds"),
    ],
)
def test_bad_times(recommender, times, message):
    with pytest.raises(ValueError, match=message):
        recommender.history_from_ids(["i1", "i2"], times)


def test_k_out_of_range(recommender, histories):
    with pytest.raises(ValueError, match="k=31 is larger than the catalogue of 30 items; set k to at most 30"):
        recommender.recommend(histories[:1], 31)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        recommender.recommend(histories[:1], 0)


def test_k_beyond_what_is_unseen(recommender):
    history = recommender.history_from_ids(["i1", "i2", "i1"])
    assert len(recommender.recommend([history], 28, exclude_seen=True)[0]) == 28
    other = recommender.history_from_ids(["i9"])
    shorter, whole = recommender.recommend([history, other], 29, exclude_seen=True)
    assert [item.item_id for item in shorter] == [
        item.item_id for item in recommender.recommend([history], 28, exclude_seen=True)[0]
    ]
    assert len(shorter) == 28 and len(whole) == 29
    indices, scores = recommender.top_k([history], 30, exclude_seen=True)
    assert (indices[0, 28:] == 0).all() and (scores[0, 28:] == -np.inf).all() and (indices[0, :28] > 0).all()


def test_scores_that_are_not_finite(run, recommender, histories):
    broken = Recommender.from_run(run)
    broken.params = jax.tree.map(lambda x: x * jnp.nan, recommender.params)
    with pytest.raises(FloatingPointError, match="the scores for user 'u0' are not finite"):
        broken.recommend([dataclasses.replace(histories[0], label="user 'u0'")], 3)


def test_items_that_do_not_fit_the_model(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "mixed")
    items = pl.read_parquet(copy / "item_ids.parquet")
    items[:-1].write_parquet(copy / "item_ids.parquet")
    with pytest.raises(ValueError, match=r"item_ids.parquet is not as it was written"):
        Recommender.from_run(copy)
    make_old(copy)
    with pytest.raises(ValueError, match=r"lists 29 items, but the model has vocab_size=31 \(items \+ 1\)"):
        Recommender.from_run(copy)


@pytest.mark.parametrize(("read", "name"), [(5, "tim4rec"), (25, "ssd4rec")])
def test_as_many_events_are_read_as_in_evaluation(recommender, histories, read, name):
    """Fewer than the model holds, or more where it reads any length; the rest of a history changes nothing."""
    config = dataclasses.replace(
        recommender.config,
        model=sibling(recommender.config.model, name),
        eval=dataclasses.replace(recommender.config.eval, max_len=read),
    )
    model = build_model(config.model)
    params = init_params(model, jax.random.key(1))
    made = Recommender(
        model, params, config, item_ids=recommender.item_ids, titles=None, histories=recommender._histories
    )
    cut = [
        dataclasses.replace(history, items=history.items[-read:], timestamps=history.timestamps[-read:])
        for history in histories
    ]
    assert max(len(history.items) for history in histories) > made.max_len == read or read == 25
    for found, expected in zip(made.top_k(histories, 5), made.top_k(cut, 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    longer = dataclasses.replace(
        config, model=dataclasses.replace(config.model, max_len=100), eval=recommender.config.eval
    )
    if name == "ssd4rec":
        whole = Recommender(
            build_model(longer.model),
            params,
            longer,
            item_ids=recommender.item_ids,
            titles=None,
            histories=recommender._histories,
        )
        np.testing.assert_array_equal(made.top_k(histories, 5)[0], whole.top_k(histories, 5)[0])


def test_more_events_than_a_fixed_length_are_refused(recommender):
    asked = dataclasses.replace(recommender.config.eval, max_len=13)
    with pytest.raises(ValueError, match=r"eval.max_len=13 is over the model's max_len=12, and tim4rec reads no more"):
        dataclasses.replace(recommender.config, eval=asked)
