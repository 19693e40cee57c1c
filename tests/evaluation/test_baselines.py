"""Popularity and item-to-item transitions, worked by hand and against brute force."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from tests.evaluation.logs import random_log
from tim4rec_jax.config import DataConfig, EvalConfig
from tim4rec_jax.data.interactions import clean
from tim4rec_jax.data.splits import Examples, leave_one_out, split_log
from tim4rec_jax.evaluation.baselines import (
    KNN_NEIGHBOURS,
    KNN_SHRINKAGES,
    choose_knn,
    co_occurrences,
    item_neighbours,
    knn_ranks,
    markov_ranks,
    popularity_counts,
    popularity_ranks,
    transition_counts,
    users_of_items,
)
from tim4rec_jax.evaluation.measures import metrics_of_ranks
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, PROTOCOLS

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def log():
    return random_log(num_users=40, num_items=15, min_events=3, max_events=12, seed=3)


def test_counts_hold_the_training_part_only(log):
    split = leave_one_out(log)
    expected = np.zeros(16, np.int64)
    for user in range(log.num_users):
        for item in log.items[log.offsets[user] : log.offsets[user + 1] - 2]:
            expected[item] += 1
    np.testing.assert_array_equal(popularity_counts(log, split.valid), expected)


def test_users_without_a_held_out_event_count_fully(log):
    none = Examples(np.zeros(0, np.int32), np.zeros(0, np.int32))
    np.testing.assert_array_equal(popularity_counts(log, none), np.bincount(log.items, minlength=16))


def test_two_examples_of_a_user_are_refused(log):
    with pytest.raises(ValueError, match="user 4 has 2 examples"):
        popularity_counts(log, Examples(np.array([4, 4], np.int32), np.array([1, 2], np.int32)))


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_ranks_equal_brute_force(log, exclude_seen):
    split = leave_one_out(log)
    counts = popularity_counts(log, split.valid)
    expected = []
    for user, end in zip(split.test.users, split.test.ends, strict=True):
        start = log.offsets[user]
        target = log.items[start + end]
        rivals = set(range(1, 16)) - {target}
        if exclude_seen:
            rivals -= set(log.items[start : start + end].tolist())
        expected.append(1 + sum((counts[j] > counts[target]) + (counts[j] == counts[target]) / 2 for j in rivals))
    ranks = popularity_ranks(log, counts, split.test)[PROTOCOLS[exclude_seen]]
    np.testing.assert_array_equal(ranks, expected)
    assert any(rank % 1 for rank in ranks)


def test_equal_counts_give_the_mean_rank_over_their_orders(log):
    # Fifteen items alike: the target is as likely first as last.
    ranks = popularity_ranks(log, np.ones(16, np.int64), leave_one_out(log).test)[ALL_ITEMS]
    assert (ranks == 8).all()
    first = np.array([0, 9, 9, *[1] * 13])
    of_two = popularity_ranks(log, first, leave_one_out(log).test)[ALL_ITEMS]
    targets = log.items[log.offsets[1:] - 1]
    np.testing.assert_array_equal(of_two, np.where(targets <= 2, 1.5, 3 + 12 / 2))


def _dense_transitions(log) -> np.ndarray:
    counts = np.zeros((log.num_items + 1, log.num_items + 1), np.int64)
    for user in range(log.num_users):
        events = log.items[log.offsets[user] : log.offsets[user + 1] - 2].tolist()
        for before, after in zip(events[:-1], events[1:], strict=True):
            counts[before, after] += 1
    return counts


def test_transitions_hold_the_training_part_only(log):
    transitions = transition_counts(log, leave_one_out(log).valid)
    dense = np.zeros((16, 16), np.int64)
    for item in range(16):
        followers, counts = transitions.row(item)
        assert (np.diff(followers) > 0).all() and (counts > 0).all()
        dense[item, followers] = counts
    np.testing.assert_array_equal(dense, _dense_transitions(log))


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_markov_ranks_equal_brute_force(seed, part, exclude_seen):
    log = random_log(num_users=40, num_items=15, min_events=3, max_events=12, seed=seed)
    split = leave_one_out(log)
    popularity, dense = popularity_counts(log, split.valid), _dense_transitions(log)
    examples = getattr(split, part)
    expected = []
    for user, end in zip(examples.users, examples.ends, strict=True):
        history = log.items[log.offsets[user] : log.offsets[user] + end].tolist()
        target = log.items[log.offsets[user] + end]
        scores = [(dense[history[-1], j], popularity[j]) for j in range(16)]
        rivals = set(range(1, 16)) - {target} - (set(history) if exclude_seen else set())
        expected.append(1 + sum((scores[j] > scores[target]) + (scores[j] == scores[target]) / 2 for j in rivals))
    transitions = transition_counts(log, split.valid)
    ranks = markov_ranks(log, transitions, popularity, examples)[PROTOCOLS[exclude_seen]]
    np.testing.assert_array_equal(ranks, expected)


def test_markov_without_a_known_pair_is_popularity(log):
    split = leave_one_out(log)
    popularity = popularity_counts(log, split.valid)
    nothing = transition_counts(log, Examples(split.test.users, np.zeros(log.num_users, np.int32)))
    assert len(nothing.items) == 0
    of_pairs, of_counts = (
        markov_ranks(log, nothing, popularity, split.test),
        popularity_ranks(log, popularity, split.test),
    )
    for protocol in PROTOCOLS:
        np.testing.assert_array_equal(of_pairs[protocol], of_counts[protocol])


def _dense_similarities(log, k, shrinkage) -> np.ndarray:
    """[v, v] float64: row i holds s_ij of the k nearest j, by the definition."""
    matrix = np.zeros((log.num_users, log.num_items + 1))
    for user in range(log.num_users):
        matrix[user, log.items[log.offsets[user] : log.offsets[user + 1] - 2]] = 1
    norms = np.sqrt((matrix**2).sum(axis=0))
    products = matrix.T @ matrix
    np.fill_diagonal(products, 0)
    scale = np.outer(norms, norms) + shrinkage
    similar = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    for row in similar:
        row[np.lexsort((np.arange(len(row)), -row))[k:]] = 0
    return similar


@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
def test_neighbours_are_those_of_the_dense_definition(log, shrinkage):
    held_out = leave_one_out(log).valid
    pairs, (users, _) = co_occurrences(log, held_out), users_of_items(log, held_out)
    found = item_neighbours(pairs, users, k=4, shrinkage=shrinkage)
    dense = np.zeros((16, 16))
    np.add.at(dense, (np.arange(16)[:, None], found.items), found.similarities)
    np.testing.assert_allclose(dense, _dense_similarities(log, 4, shrinkage), rtol=1e-14)
    assert (np.diff(found.similarities, axis=1) <= 0).all() and (dense > 0).any()


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_knn_ranks_equal_brute_force(log, part, exclude_seen):
    split = leave_one_out(log)
    examples = getattr(split, part)
    users, _ = users_of_items(log, split.valid)
    neighbours = item_neighbours(co_occurrences(log, split.valid), users, k=6, shrinkage=1.0)
    for k in (2, 6):
        similar, expected = _dense_similarities(log, k, 1.0), []
        for user, end in zip(examples.users, examples.ends, strict=True):
            history = set(log.items[log.offsets[user] : log.offsets[user] + end].tolist())
            target = log.items[log.offsets[user] + end]
            scores = np.round(sum(similar[item] for item in history), 12)
            rivals = set(range(1, 16)) - {target} - (history if exclude_seen else set())
            expected.append(1 + sum((scores[j] > scores[target]) + (scores[j] == scores[target]) / 2 for j in rivals))
        ranks = knn_ranks(log, neighbours.nearest(k), examples)[PROTOCOLS[exclude_seen]]
        np.testing.assert_array_equal(ranks, expected)


def test_knn_by_hand():
    """All but the last two train: u and v have a and b, w has b and c."""
    events = [(user, item) for user, items in {"u": "abcc", "v": "abac", "w": "bcab"}.items() for item in items]
    columns = {"user": [user for user, _ in events], "item": [item for _, item in events], "timestamp": range(12)}
    log = clean(pl.DataFrame(columns), k_core=0, timestamp_precision="int64")
    index = {name: place + 1 for place, name in enumerate(log.item_ids)}
    held_out = leave_one_out(log).valid
    users, _ = users_of_items(log, held_out)
    assert [users[index[item]] for item in "abc"] == [2, 3, 1]
    found = item_neighbours(co_occurrences(log, held_out), users, k=1, shrinkage=0.0)
    assert found.items[[index["a"], index["b"], index["c"]], 0].tolist() == [index["b"], index["a"], index["b"]]
    near = found.similarities[[index["a"], index["b"], index["c"]], 0]
    np.testing.assert_allclose(near, [2 / np.sqrt(6), 2 / np.sqrt(6), 1 / np.sqrt(3)])
    shrunk = item_neighbours(co_occurrences(log, held_out), users, k=1, shrinkage=2.0)
    assert shrunk.similarities[index["a"], 0] == pytest.approx(2 / (np.sqrt(6) + 2))
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        item_neighbours(co_occurrences(log, held_out), users, k=0, shrinkage=0.0)


def test_knn_is_chosen_on_validation(log):
    evaluation = EvalConfig(top_k=(3,), monitor="ndcg@3")
    split = split_log(log, DataConfig())
    found = choose_knn(log, split, evaluation)
    users, _ = users_of_items(log, split.valid)
    values = {}
    for shrinkage in KNN_SHRINKAGES:
        for k in KNN_NEIGHBOURS:
            neighbours = item_neighbours(co_occurrences(log, split.valid), users, k=k, shrinkage=shrinkage)
            ranks = knn_ranks(log, neighbours, split.valid)[ALL_ITEMS]
            values[k, shrinkage] = metrics_of_ranks(ranks, ["ndcg@3"])["ndcg@3"]
    assert {(one["k"], one["shrinkage"]): one["ndcg@3"] for one in found.grid} == values
    assert values[found.k, found.shrinkage] == max(values.values()) > min(values.values())
    # What is chosen does not read the test part.
    other = dataclasses.replace(split, test=split.valid)
    assert choose_knn(log, other, evaluation).grid == found.grid
