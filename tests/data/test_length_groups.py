"""Static lengths against every other choice, and the plan made of them."""

import itertools

import numpy as np
import pytest

from tim4rec_jax.data.length_groups import LengthGroup, choose_lengths, plan_length_groups, plan_packed_rows


def cost(chosen, lengths, penalty):
    padded = np.array(chosen)[np.searchsorted(chosen, lengths)]
    return padded.sum() + penalty * len(chosen)


@pytest.mark.parametrize("max_groups", [1, 2, 3, 20])
@pytest.mark.parametrize("max_len", [20, 50])
def test_chosen_lengths_are_the_cheapest(max_len, max_groups):
    lengths = np.minimum(np.random.default_rng(0).geometric(0.12, 500), max_len)
    candidates = sorted(set(np.minimum(-(-lengths // 8) * 8, max_len).tolist()))
    options = [
        (*subset, candidates[-1])
        for size in range(min(max_groups, len(candidates)))
        for subset in itertools.combinations(candidates[:-1], size)
    ]
    for penalty in (0, 100, 1000, 10**6):
        chosen = choose_lengths(lengths, max_len, max_groups=max_groups, penalty=penalty, step=8)
        assert tuple(chosen) in options
        assert cost(chosen, lengths, penalty) == min(cost(option, lengths, penalty) for option in options)
    assert choose_lengths(lengths, max_len, max_groups=max_groups, penalty=10**6, step=8) == [candidates[-1]]


def test_small_cases_worked_by_hand():
    lengths = np.array([1, 1, 1, 9])
    assert choose_lengths(lengths, 9, max_groups=3, penalty=0, step=1) == [1, 9]
    assert choose_lengths(lengths, 9, max_groups=1, penalty=0, step=1) == [9]
    # Padding the three short rows costs 3 * 8 positions.
    assert choose_lengths(lengths, 9, max_groups=3, penalty=23, step=1) == [1, 9]
    assert choose_lengths(lengths, 9, max_groups=3, penalty=25, step=1) == [9]
    # Multiples of the step, but never beyond the longest there is.
    assert choose_lengths(lengths, 9, max_groups=3, penalty=0, step=4) == [4, 9]
    assert choose_lengths(np.array([7]), 50, max_groups=3, penalty=0) == [8]


def plan(lengths, max_len, **changed):
    options = {"max_groups": 6, "batch_size": 64, "vocab_size": 100, "microbatch_tokens": None, "platform": "cpu"}
    return plan_length_groups(np.array(lengths), max_len, **(options | changed))


def test_groups_go_down_from_the_longest_and_microbatches_fill_the_tokens():
    lengths = np.minimum(np.random.default_rng(0).geometric(0.12, 5000), 50)
    groups = plan(lengths, 50, microbatch_tokens=500)
    assert [group.length for group in groups] == sorted({group.length for group in groups}, reverse=True)
    assert groups[0] == LengthGroup(50, 10) and 2 <= len(groups) <= 6
    assert all(group.rows == min(500 // group.length, 64) for group in groups)
    assert plan(lengths, 50, max_groups=1, microbatch_tokens=500) == (LengthGroup(50, 10),)


def test_every_length_up_to_max_len_has_a_group():
    assert plan([3, 3, 4], 50)[0].length == 50


def test_a_length_that_saves_too_little_is_not_compiled_for():
    # One row in a thousand is short: a static length of its own would save less than a hundredth of the positions.
    assert len(plan([50] * 999 + [2], 50)) == 1
    assert len(plan([50] * 900 + [2] * 100, 50)) == 2


def test_rows_are_bounded_by_the_batch_the_tokens_and_on_a_cpu_the_scores():
    assert plan([50], 50, microbatch_tokens=10) == (LengthGroup(50, 1),)
    assert plan([50], 50, microbatch_tokens=10**6) == (LengthGroup(50, 64),)
    assert plan([50], 50, platform="gpu") == (LengthGroup(50, 64),)
    assert plan([50], 50, platform="gpu", microbatch_tokens=500) == (LengthGroup(50, 10),)
    # A million items make 4 MB of scores a row.
    assert plan([50], 50, vocab_size=10**6)[0].rows == 4
    assert plan([50], 50, vocab_size=10**8)[0].rows == 1
    assert plan([50], 50, vocab_size=10**6, platform="gpu")[0].rows == 64


def test_packed_rows_are_one_group():
    def planned(platform, microbatch_tokens=None, max_len=200):
        options = {"batch_size": 64, "microbatch_tokens": microbatch_tokens, "platform": platform}
        return plan_packed_rows(max_len, **options)

    assert planned("gpu") == (LengthGroup(200, 64),)
    assert planned("gpu", 1000) == planned("cpu", 1000) == (LengthGroup(200, 5),)
    assert planned("cpu") == (LengthGroup(200, 10),)
    assert planned("cpu", max_len=5000) == (LengthGroup(5000, 1),)
    assert planned("cpu", max_len=4) == (LengthGroup(4, 64),)
