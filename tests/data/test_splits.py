"""Leave-one-out and the gather of windows, against a log worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tim4rec_jax.data.interactions import clean, load_log
from tim4rec_jax.data.splits import gap_statistics, gather_windows, leave_one_out, training_span
from tim4rec_jax.data_config import DataConfig, SyntheticConfig

pytestmark = pytest.mark.quick


@pytest.fixture
def log():
    rows = [("u", item, 10 * t) for t, item in enumerate("abcde")] + [("v", item, 7) for item in "dca"]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    return clean(frame, k_core=0, timestamp_precision="int64")


def pairs(examples):
    return list(zip(examples.users.tolist(), examples.ends.tolist(), strict=True))


def test_the_split_of_a_log_worked_by_hand(log):
    split = leave_one_out(log)
    # u: a b c d e: a -> b and a b -> c train, d validates, e tests. v: d c a has 3 events and trains nothing.
    assert pairs(split.train) == [(0, 1), (0, 2)]
    assert pairs(split.valid) == [(0, 3), (1, 1)]
    assert pairs(split.test) == [(0, 4), (1, 2)]
    for part in (split.train, split.valid, split.test):
        assert part.users.dtype == part.ends.dtype == np.int32
    assert split.nbytes == 8 * (2 + 2 + 2)


def test_windows_worked_by_hand(log):
    test = leave_one_out(log).test
    windows = gather_windows(log.items, log.timestamps, log.offsets, test.users, test.ends, max_len=3)
    assert windows.items.tolist() == [[2, 3, 4], [4, 3, 0]]
    assert windows.timestamps.tolist() == [[10, 20, 30], [7, 7, 0]]
    assert windows.lengths.tolist() == [3, 2]
    assert windows.targets.tolist() == [5, 1]
    assert (windows.items.dtype, windows.lengths.dtype, windows.targets.dtype) == (np.int32, np.int32, np.int32)
    assert windows.timestamps.dtype == np.int64
    with pytest.raises(ValueError, match="max_len=0 must be at least 1"):
        gather_windows(log.items, log.timestamps, log.offsets, test.users, test.ends, max_len=0)


def test_a_user_with_fewer_than_3_events_cannot_be_split(log):
    short = dataclasses.replace(log, offsets=np.array([0, 5, 7]))
    with pytest.raises(ValueError, match="user 'v' has 2 events; leave-one-out needs at least 3 of every user"):
        leave_one_out(short)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(3, 9), min_size=1, max_size=6), max_len=st.integers(1, 6))
def test_every_item_but_the_first_is_predicted_once_in_order(counts, max_len):
    rows = [(str(u), f"{u}-{t}", t) for u, n in enumerate(counts) for t in range(n)]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    log = clean(frame, k_core=0, timestamp_precision="int64")
    split = leave_one_out(log)
    assert len(split.train) == log.statistics.training_examples == sum(n - 3 for n in counts)
    assert pairs(split.train) == sorted(pairs(split.train))
    everything = pairs(split.train) + pairs(split.valid) + pairs(split.test)
    assert sorted(everything) == [(u, t) for u, n in enumerate(counts) for t in range(1, n)]
    users, ends = np.array(everything, np.int32).T
    windows = gather_windows(log.items, log.timestamps, log.offsets, users, ends, max_len)
    for (user, end), items, length, target in zip(everything, *windows[:2], windows.targets, strict=True):
        history = log.items[log.offsets[user] : log.offsets[user + 1]]
        expected = history[max(0, end - max_len) : end]
        assert items.tolist() == expected.tolist() + [0] * (max_len - len(expected))
        assert (length, target) == (len(expected), history[end])


@pytest.mark.parametrize("seconds", [np.int64, np.float32])
def test_the_gather_is_the_same_inside_jit(log, seconds):
    test = leave_one_out(log).test
    arrays = (log.items, log.timestamps.astype(seconds), log.offsets.astype(np.int32), test.users, test.ends)
    on_host = gather_windows(*arrays, max_len=4)
    with jax.numpy_dtype_promotion("strict"):
        on_device = jax.jit(lambda *a: gather_windows(*a, max_len=4, xp=jnp))(*map(jnp.asarray, arrays))
    for host, device in zip(on_host, on_device, strict=True):
        np.testing.assert_array_equal(host, device)
    assert on_device.items.dtype == on_device.lengths.dtype == on_device.targets.dtype == jnp.int32
    assert on_host.timestamps.dtype == seconds


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    small = SyntheticConfig(num_users=30, num_items=20, min_events=6, max_events=9)
    return load_log(DataConfig(synthetic=small, k_core=0, cache_dir=str(tmp_path_factory.mktemp("cache"))))


def gaps_by_hand(log):
    values = []
    for first, end in zip(log.offsets[:-1], log.offsets[1:], strict=True):
        seconds = log.timestamps[first : end - 2]
        values += [np.log1p(gap) for gap in np.diff(seconds) if gap > 0]
    return np.mean(values), np.std(values)


def test_gap_statistics_equal_a_loop_over_users(generated):
    np.testing.assert_allclose(gap_statistics(generated, leave_one_out(generated)), gaps_by_hand(generated), rtol=1e-12)


def test_gaps_of_held_out_events_do_not_count(generated):
    later = generated.timestamps.copy()
    for end in generated.offsets[1:]:
        later[end - 2 : end] += 10**7
    changed = dataclasses.replace(generated, timestamps=later)
    assert gap_statistics(changed, leave_one_out(generated)) == gap_statistics(generated, leave_one_out(generated))
    assert training_span(changed, leave_one_out(generated)) == training_span(generated, leave_one_out(generated))


def test_the_span_of_the_training_part(generated):
    trained = np.concatenate(
        [
            generated.timestamps[first : end - 2]
            for first, end in zip(generated.offsets[:-1], generated.offsets[1:], strict=True)
        ]
    )
    assert training_span(generated, leave_one_out(generated)) == (trained.min(), trained.max())


def test_a_log_without_gaps(generated):
    tied = dataclasses.replace(generated, timestamps=np.full_like(generated.timestamps, 5))
    assert gap_statistics(tied, leave_one_out(generated)) == (0.0, 1.0)
    assert training_span(tied, leave_one_out(generated)) == (5, 6)
    steady = dataclasses.replace(generated, timestamps=60 * np.arange(generated.num_rows))
    assert gap_statistics(steady, leave_one_out(generated)) == (pytest.approx(np.log(61)), 1.0)
