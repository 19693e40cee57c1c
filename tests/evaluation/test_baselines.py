"""Popularity, worked by hand and against brute force."""

import numpy as np
import pytest

from tests.evaluation.logs import random_log
from tim4rec_jax.data.examples import Examples
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.evaluation.baselines import popularity_counts, popularity_ranks


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
        expected.append(1 + sum(counts[j] > counts[target] for j in rivals))
    ranks = popularity_ranks(log, counts, split.test, exclude_seen=exclude_seen)
    np.testing.assert_array_equal(ranks, expected)
    assert ranks.dtype == np.int32


def test_ties_are_read_in_the_targets_favour(log):
    ranks = popularity_ranks(log, np.ones(16, np.int64), leave_one_out(log).test)
    assert (ranks == 1).all()
