"""Windows over histories and rows packed with them: every target once, enough context, nothing overlaps."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tim4rec_jax.data.packing import (
    LengthGroup,
    PackedRows,
    choose_lengths,
    pack_lengths,
    plan_length_groups,
    plan_packed_rows,
    window_histories,
)

pytestmark = pytest.mark.quick

HISTORIES = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(np.array)


@settings(deadline=None)
@given(HISTORIES, st.integers(1, 15).flatmap(lambda m: st.tuples(st.just(m), st.none() | st.integers(0, m - 1))))
def test_every_input_is_trained_on_once_with_its_context(num_inputs, setting):
    max_len, context = setting
    windows = window_histories(num_inputs, max_len, context)
    assert {column.dtype for column in windows} == {np.dtype(np.int32)}
    least = max_len // 2 if context is None else context
    trained = []
    for user, first, end, trained_from in zip(*windows, strict=True):
        assert 0 <= first <= trained_from < end <= num_inputs[user] and end - first <= max_len
        trained += [(user, position) for position in range(trained_from, end)]
        assert all(position - first >= min(position, least) for position in range(trained_from, end))
    assert trained == [(user, position) for user, n in enumerate(num_inputs) for position in range(n)]
    # No more windows than the context asks for: all but a user's last are full.
    followed = np.flatnonzero(windows.users[1:] == windows.users[:-1])
    assert (windows.ends - windows.firsts)[followed].tolist() == [max_len] * len(followed)


def test_windows_worked_by_hand():
    windows = window_histories(np.array([3, 0, 10, 11, 14]), 10, 4)
    assert np.stack(windows, axis=1).tolist() == [
        [0, 0, 3, 0],
        [2, 0, 10, 0],
        [3, 0, 10, 0],
        [3, 6, 11, 10],
        [4, 0, 10, 0],
        [4, 6, 14, 10],
    ]
    assert np.stack(window_histories(np.array([12]), 10, None), axis=1).tolist() == [[0, 0, 10, 0], [0, 5, 12, 10]]


@pytest.mark.parametrize("context", [10, 11])
def test_a_context_that_leaves_nothing_to_train_on_is_refused(context):
    message = f"train.window_context={context} must be less than model.max_len=10, .* at most 9, or None for 5"
    with pytest.raises(ValueError, match=message):
        window_histories(np.array([3]), 10, context)


def best_fit_decreasing(lengths, max_len):
    """One length after the other: how full the rows become."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= max_len]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return sorted(map(sum, rows))


@settings(deadline=None)
@given(st.integers(1, 40).flatmap(lambda m: st.tuples(st.just(m), st.lists(st.integers(1, m), min_size=1))))
def test_rows_are_those_of_best_fit_decreasing(case):
    max_len, lengths = case
    pattern = pack_lengths(np.array(lengths), max_len)
    rows = []
    for r, (begin, end) in enumerate(itertools.pairwise(pattern.bounds)):
        sizes = pattern.lengths[begin:end]
        assert pattern.offsets[begin:end].tolist() == (np.cumsum(sizes) - sizes).tolist()
        assert pattern.used[r] == sizes.sum() <= max_len
        rows.append(sizes.tolist())
    assert sorted(size for row in rows for size in row) == sorted(lengths)
    assert sorted(map(sum, rows)) == best_fit_decreasing(lengths, max_len)
    assert pattern.fill_share == pytest.approx(sum(lengths) / (len(rows) * max_len))


@pytest.mark.parametrize(
    ("lengths", "found"), [([0, 3], "0 to 3"), ([2, 6], "2 to 6"), ([], "none")], ids=["zero", "too long", "empty"]
)
def test_lengths_that_fit_no_row_are_refused(lengths, found):
    with pytest.raises(ValueError, match=f"lengths to pack are {found}; .* from 1 to max_len=5"):
        pack_lengths(np.array(lengths, int), 5)


MAX_LEN = 8


def packed_rows(seed=3, num_users=60):
    rng = np.random.default_rng(0)
    num_inputs = np.minimum(rng.geometric(0.2, num_users), 30)
    windows = window_histories(num_inputs, MAX_LEN, 3)
    offsets = np.cumsum(num_inputs + 3) - (num_inputs + 3)
    first_rows = (offsets[windows.users] + windows.firsts).astype(np.int32)
    trained = np.concatenate([offset + np.arange(n) for offset, n in zip(offsets, num_inputs, strict=True)])
    return PackedRows(windows, first_rows, pack_lengths(windows.ends - windows.firsts, MAX_LEN), seed), trained


def test_an_epoch_lays_every_window_out_once():
    packed, trained = packed_rows()
    count = packed.pattern.num_rows
    lengths = packed.windows.ends - packed.windows.firsts
    for epoch in (1, 2):
        rows = packed.epoch(epoch)
        positions = packed.positions(rows, 0, count + 2)
        assert positions.rows.dtype == np.int32 and positions.rows.shape == (count + 2, MAX_LEN)
        assert sorted(positions.rows[positions.trained].tolist()) == trained.tolist()
        assert not positions.trained[positions.rows < 0].any()
        found = []
        for row, starts in zip(positions.rows, positions.starts, strict=True):
            assert starts[0]
            for piece in np.split(row, np.flatnonzero(starts)[1:]):
                if piece[0] >= 0:
                    assert (np.diff(piece) == 1).all()
                    found.append((piece[0], len(piece)))
                else:
                    assert (piece == -1).all()
        assert sorted(found) == sorted(zip(packed.first_rows.tolist(), lengths.tolist(), strict=True))
        assert (positions.rows[count:] == -1).all()
        by_row = np.append(0, np.cumsum(positions.trained.sum(axis=1)))
        np.testing.assert_array_equal(rows.targets_before, by_row[: count + 1])
        part = packed.positions(rows, 5, 4)
        for whole, mine in zip(positions, part, strict=True):
            np.testing.assert_array_equal(mine, whole[5:9])


def neighbours(packed, epoch):
    """Pairs of windows that lie one after the other in a row."""
    windows, bounds = packed.epoch(epoch).windows, packed.pattern.bounds
    return {pair for a, b in itertools.pairwise(bounds) for pair in itertools.pairwise(windows[a:b].tolist())}


def test_epochs_and_seeds_mix_neighbours_and_rows_anew():
    packed, _ = packed_rows(num_users=600)
    first = packed.epoch(1)
    for again, column in zip(packed_rows(num_users=600)[0].epoch(1), first, strict=True):
        np.testing.assert_array_equal(again, column)
    for other_packed, epoch in ((packed, 2), (packed_rows(seed=4, num_users=600)[0], 1)):
        other = other_packed.epoch(epoch)
        np.testing.assert_array_equal(np.sort(other.order), np.arange(packed.pattern.num_rows))
        assert (other.order == first.order).mean() < 0.05
        shared = neighbours(packed, 1) & neighbours(other_packed, epoch)
        assert len(shared) < 0.1 * len(neighbours(packed, 1))


def test_many_short_histories_take_no_more_rows_than_their_positions_need():
    lengths = np.minimum(np.random.default_rng(0).geometric(0.15, 5000), 50)
    assert pack_lengths(lengths, 50).num_rows == -(-lengths.sum() // 50)


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
    assert planned("cpu") == (LengthGroup(200, 16),)  # Of 20 at once, a fifth of the last turn would be padding.
    assert planned("cpu", max_len=5000) == (LengthGroup(5000, 1),)
    assert planned("cpu", max_len=4) == (LengthGroup(4, 64),)
