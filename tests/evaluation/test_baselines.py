"""Popularity and item-to-item transitions, worked by hand and against brute force."""

import numpy as np
import pytest

from tests.evaluation.logs import random_log
from tim4rec_jax.data.splits import Examples, leave_one_out
from tim4rec_jax.evaluation.baselines import (
    markov_ranks,
    popularity_counts,
    popularity_ranks,
    transition_counts,
)
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
