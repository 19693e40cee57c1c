"""What a service is made of: programs compiled before the first answer, a batch of requests, and the time mask."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from tests.serving.tiny_run import make_config, make_run
from tim4rec_jax.serving.batching import Batcher, Overloaded
from tim4rec_jax.serving.history_file import top_k as whole_top_k
from tim4rec_jax.serving.prepared import PreparedRecommender, Row, compilations
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.streaming import Streamer
from tim4rec_jax.serving.time_mask import TimeMask


@pytest.fixture(scope="module")
def prepared(recommender):
    made = PreparedRecommender(recommender, rows=4, k=7, scored=3)
    made.warm()
    return made


def history(length, seed=0):
    rng = np.random.default_rng(seed)
    return History(rng.integers(1, 31, length).astype(np.int32), 978_300_000 + np.cumsum(rng.integers(0, 9000, length)))


def test_alone_as_the_recommender_and_together_to_rounding(recommender, prepared):
    histories = [history(length, seed) for seed, length in enumerate([1, 3, 5, 8, 9, 11, 12, 13, 40])]
    allowed = np.arange(31) % 3 != 0
    counter = compilations()
    before = counter.count
    alone = [prepared.rank([Row(h, allowed, np.array([4, 9], np.int32))])[0] for h in histories]
    together = prepared.rank([Row(h, allowed) for h in histories])
    assert counter.count == before
    for h, one, among in zip(histories, alone, together, strict=True):
        indices, scores = recommender.top_k([h], 7, allowed=allowed)
        [named] = recommender.item_scores([h], [np.array([4, 9])])
        assert one.finite and one.indices.tolist() == indices[0].tolist()
        assert one.scores.tobytes() == scores[0].tobytes() and one.scored.tobytes() == named.tobytes()
        assert among.indices.tolist() == indices[0].tolist()
        np.testing.assert_allclose(among.scores, scores[0], rtol=1e-5, atol=1e-5)


def test_lists_end_where_nothing_is_left(prepared):
    allowed = np.zeros(31, bool)
    allowed[[5, 6]] = True
    few, none = prepared.rank([Row(history(4), allowed), Row(history(4), np.zeros(31, bool))])
    assert sorted(few.indices.tolist()) == [5, 6] and len(few.scores) == 2
    assert none.indices.tolist() == [] and none.finite
    [(similar, cosines)] = prepared.similar([5], allowed)
    assert similar.tolist() == [6] and len(cosines) == 1


def test_similar_items_are_the_recommenders(recommender, prepared):
    counter = compilations()
    before = counter.count
    found = prepared.similar(list(range(1, 31)))
    assert counter.count == before
    indices, cosines = recommender.similar(list(range(1, 31)), 7)
    for (items, scores), expected, values in zip(found, indices, cosines, strict=True):
        assert items.tolist() == expected.tolist()
        np.testing.assert_allclose(scores, values, rtol=1e-6)


def test_scores_that_are_not_finite_are_told_by_row(recommender):
    params = jax.tree.map(lambda leaf: leaf, recommender.params)
    table = np.array(jax.tree.leaves(params["item_embedding"])[0])
    table[7] = np.nan
    params["item_embedding"] = jax.tree.map(lambda _: table, params["item_embedding"])
    broken = Recommender(
        recommender.model,
        params,
        recommender.config,
        item_ids=recommender.item_ids,
        titles=None,
        histories=recommender._histories,
    )
    [found] = PreparedRecommender(broken, rows=1, k=3, scored=1).rank([Row(history(3))])
    assert not found.finite


def test_a_compilation_is_counted():
    counter = compilations()
    before = counter.count
    jax.jit(lambda x: x * before + 3)(np.arange(3.0))
    assert counter.count == before + 1


def test_time_mask_by_its_definition(causal_recommender, recommender, tmp_path, log):
    for known in (causal_recommender, recommender):
        mask, h = TimeMask(known), history(9)
        assert mask.exists
        [found] = mask.of(h, 5)
        model, params = known.model, known.params
        inputs = known.inputs([h], np.array([9], np.int32), 12)
        ids = (np.arange(12) < 9)[None].astype(np.int32)
        collections = {"params": {n: p for n, p in params.items() if n != "data_statistics"}}
        collections |= {n: p for n, p in params.items() if n == "data_statistics"}
        _, kept = model.apply(collections, inputs[0], inputs[2], segment_ids=ids, mutable=["intermediates"])
        [delta] = kept["intermediates"]["layers_0"]["mixer"]["step_size"]
        decay = np.exp(np.asarray(params["layers_0"]["mixer"]["A_log"]))
        for i in range(5):
            for j in range(5):
                steps = np.asarray(delta)[0, 4 + j + 1 : 4 + i + 1].sum(axis=0)
                expected = np.exp(-decay * steps).mean() if j <= i else 0
                assert found[i, j] == pytest.approx(expected, rel=1e-4)
        other = dataclasses.replace(h, timestamps=np.sort(history(9, 5).timestamps))
        assert not np.array_equal(mask.of(other, 5)[0], found)
    path = tmp_path / "run"
    make_run(path, log, make_config("ssd4rec"))
    without = TimeMask(Recommender.from_run(path))
    assert not without.exists and without.of(history(3), 3) == []


def test_requests_are_answered_together_in_their_order():
    first, going = threading.Event(), threading.Event()
    batches = []

    def answer(asked):
        batches.append(list(asked))
        first.set()
        going.wait(10)
        return [ValueError("seven") if number == 7 else 10 * number for number in asked]

    batcher = Batcher(answer, rows=4, seconds=0.0, most_waiting=20)
    batcher.start()
    futures = [batcher.submit(0)]
    assert first.wait(10)
    futures += [batcher.submit(number, rows) for number, rows in ((1, 1), (2, 1), (3, 3), (7, 1), (8, 1))]
    going.set()
    assert [f.result(10) for f in futures[:4]] == [0, 10, 20, 30] and futures[5].result(10) == 80
    with pytest.raises(ValueError, match="seven"):
        futures[4].result(10)
    batcher.stop()
    assert batches == [[0], [1, 2, 3], [7, 8]] and batcher.waiting == 0


def test_a_stop_answers_what_was_taken_in():
    batcher = Batcher(
        lambda asked: [time.sleep(0.001) or number for number in asked], rows=2, seconds=5, most_waiting=99
    )
    futures = [batcher.submit(number) for number in range(9)]
    batcher.start()
    batcher.stop()
    assert [f.result(0) for f in futures] == list(range(9))
    with pytest.raises(Overloaded, match="stopping"):
        batcher.submit(1)


def test_too_much_is_refused_and_a_batch_that_fails_ends_nothing():
    def answer(asked):
        raise RuntimeError(f"{len(asked)} at once")

    batcher = Batcher(answer, rows=8, seconds=0, most_waiting=3)
    futures = [batcher.submit(0, 2), batcher.submit(0)]
    with pytest.raises(Overloaded, match="3 rows are waiting, and at most 3 may"):
        batcher.submit(0)
    batcher.start()
    for future in futures:
        with pytest.raises(RuntimeError, match="2 at once"):
            future.result(10)
    again = batcher.submit(0, 50)  # Alone, a large request is taken in.
    with pytest.raises(RuntimeError, match="1 at once"):
        again.result(10)
    batcher.stop()


def test_states_go_on_as_events_come(causal_recommender, tmp_path):
    """The answers of whole histories, however they come; what is kept is bounded, and what is not is made again."""
    state_bytes = Streamer(causal_recommender.model, causal_recommender.params).state_bytes()
    known = PreparedRecommender(causal_recommender, rows=4, k=7, scored=2, state_bytes=5 * state_bytes)
    known.warm()
    before = compilations().count
    whole = {f"u{n}": history(n, n) for n in (1, 2, 15, 17, 40, 300, 600)}
    grown = {user: 0 for user in whole}
    rng = np.random.default_rng(0)
    while any(grown[user] < len(h.items) for user, h in whole.items()):
        some = list(rng.permutation(list(whole))[: rng.integers(1, 8)])
        rows = []
        for user in some:
            grown[user] = min(len(whole[user].items), grown[user] + int(rng.choice([1, 2, 90])))
            part = slice(0, grown[user])
            cut = History(whole[user].items[part], whole[user].timestamps[part])
            rows.append(Row(cut, scored=np.array([3, 4]), user=user))
        last = dict(zip(some, zip(rows, known.rank(rows), strict=True), strict=True))
        assert len(known.states) <= 5
    assert compilations().count == before
    for row, found in last.values():
        [indices], [scores] = whole_top_k(causal_recommender, [row.history], 7, whole_histories=True)
        assert found.indices.tolist() == indices.tolist()
        np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    # Alone, and in one piece: the same bits.
    for events in (1, 16, 256):
        one = history(events, 9)
        [found] = known.rank([Row(one)])
        [indices], [scores] = whole_top_k(causal_recommender, [one], 7, whole_histories=True)
        assert found.indices.tolist() == indices.tolist() and found.scores.tobytes() == scores.tobytes()
    # A history that is shorter than what is kept is another one.
    [other] = known.rank([Row(history(3, 8), user="u600")])
    [alone] = known.rank([Row(history(3, 8))])
    assert other.scores.tobytes() == alone.scores.tobytes()


def test_a_model_without_states_is_refused(recommender):
    with pytest.raises(ValueError, match="cannot go on from a state"):
        PreparedRecommender(recommender, state_bytes=2**20)
