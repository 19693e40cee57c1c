"""The two loaders against each other and against the log."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.evaluation.logs import random_log
from tim4rec_jax.data.examples import gather_windows
from tim4rec_jax.data.loader import LOADERS, epoch_order, timestamps_for_device
from tim4rec_jax.data.splits import leave_one_out

MAX_LEN, BATCH_SIZE = 6, 16


@pytest.fixture(scope="module")
def log():
    return random_log(num_users=20, num_items=15, min_events=4, max_events=14, seed=3)


@pytest.fixture(scope="module")
def examples(log):
    train = leave_one_out(log).train
    assert len(train) % BATCH_SIZE not in (0, BATCH_SIZE - 1)
    return train


def loader_of(name, log, examples, *, seed=0, precision="float32", batch_size=BATCH_SIZE):
    return LOADERS[name](log, examples, max_len=MAX_LEN, batch_size=batch_size, seed=seed, precision=precision)


def epoch_of(loader, epoch, start=0):
    """The batches of an epoch as NumPy arrays."""
    in_step = jax.jit(loader.batch)
    return [jax.tree.map(np.asarray, in_step(loader.resident, payload)) for payload in loader.epoch(epoch, start)]


def assert_same_batches(actual, expected):
    assert len(actual) == len(expected)
    for mine, wanted in zip(actual, expected, strict=True):
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(wanted), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def concatenated(batches, name):
    return np.concatenate([getattr(batch, name) for batch in batches])


@pytest.mark.parametrize(("precision", "dtype"), [("float32", np.float32), ("int64", np.int32)])
def test_both_give_the_same_batches_in_the_same_order(log, examples, precision, dtype):
    device, grain = (loader_of(name, log, examples, seed=7, precision=precision) for name in ("device", "grain"))
    assert device.num_batches == grain.num_batches == -(-len(examples) // BATCH_SIZE)
    for epoch in (1, 2):
        batches = epoch_of(device, epoch)
        assert len(batches) == device.num_batches
        assert_same_batches(epoch_of(grain, epoch), batches)
        types = [leaf.dtype for leaf in jax.tree.leaves(batches[0])]
        assert types == [np.int32, np.int32, dtype, np.int32, np.float32]
        assert {batch.items.shape for batch in batches} == {(BATCH_SIZE, MAX_LEN)}


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_holds_every_example_once(log, examples, name):
    windows = gather_windows(log.items, log.timestamps, log.offsets, examples.users, examples.ends, MAX_LEN)
    for epoch in (1, 2):
        batches = epoch_of(loader_of(name, log, examples), epoch)
        real = concatenated(batches, "weights") == 1
        assert real.sum() == len(examples)
        rows = [concatenated(batches, part)[real] for part in ("items", "timestamps", "lengths", "targets")]
        found = sorted(zip(rows[0].tolist(), rows[1].tolist(), rows[2].tolist(), rows[3].tolist(), strict=True))
        seconds = windows.timestamps.astype(np.float32).tolist()
        expected = zip(windows.items.tolist(), seconds, windows.lengths.tolist(), windows.targets.tolist(), strict=True)
        assert found == sorted(expected)


@pytest.mark.parametrize("name", LOADERS)
def test_a_short_last_batch_is_filled_with_rows_of_no_weight(log, examples, name):
    batches = epoch_of(loader_of(name, log, examples), 1)
    assert all((batch.weights == 1).all() for batch in batches[:-1])
    left = len(examples) % BATCH_SIZE
    np.testing.assert_array_equal(batches[-1].weights, [1.0] * left + [0.0] * (BATCH_SIZE - left))
    assert (batches[-1].lengths >= 1).all()
    small = epoch_of(loader_of(name, log, examples, batch_size=len(examples) + 3), 1)
    assert len(small) == 1 and small[0].weights.sum() == len(examples)


@pytest.mark.parametrize("name", LOADERS)
def test_starting_inside_an_epoch_gives_the_rest_of_it(log, examples, name):
    whole = epoch_of(loader_of(name, log, examples), 2)
    for start in (1, len(whole) - 1):
        assert_same_batches(epoch_of(loader_of(name, log, examples), 2, start), whole[start:])
    assert epoch_of(loader_of(name, log, examples), 2, len(whole)) == []


@pytest.mark.parametrize("name", LOADERS)
def test_examples_before_a_batch_are_those_with_weight(log, examples, name):
    loader = loader_of(name, log, examples)
    weights = [int(batch.weights.sum()) for batch in epoch_of(loader, 1)]
    before = [loader.examples_before(1, batch) for batch in range(loader.num_batches + 1)]
    assert before == [0, *np.cumsum(weights)]


@pytest.mark.parametrize("name", LOADERS)
def test_epochs_and_seeds_differ(log, examples, name):
    first, again, second = (epoch_of(loader_of(name, log, examples), epoch) for epoch in (1, 1, 2))
    assert_same_batches(again, first)
    other = epoch_of(loader_of(name, log, examples, seed=1), 1)
    for different in (second, other):
        assert (concatenated(different, "targets") != concatenated(first, "targets")).any()
        assert (different[0].items != first[0].items).any()


def test_the_order_is_a_shuffle_of_its_arguments_alone():
    order = epoch_order(3, 4, 1000)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(epoch_order(3, 4, 1000), order)
    for other in (epoch_order(4, 3, 1000), epoch_order(3, 5, 1000), np.arange(1000)):
        assert (other == order).mean() < 0.02


def test_timestamps_in_both_precisions():
    seconds = np.array([0, 978_300_001, 2**31 - 1])
    exact, rounded = timestamps_for_device(seconds, "int64"), timestamps_for_device(seconds, "float32")
    assert (exact.dtype, rounded.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(exact, seconds)
    # Float32 steps by 64 near 1e9.
    np.testing.assert_array_equal(rounded, np.array([0, 978_300_032, 2**31], np.float32))
    assert timestamps_for_device(np.zeros(0, np.int64), "int64").size == 0


@pytest.mark.parametrize("name", LOADERS)
def test_timestamps_beyond_int32_are_refused(log, examples, name):
    milliseconds = dataclasses.replace(log, timestamps=log.timestamps * 1000)
    message = (
        rf"timestamp {milliseconds.timestamps.max()} does not fit into the int32 seconds .*at most 2147483647, "
        "2038-01-19.; if these are milliseconds give seconds, else choose 'float32'"
    )
    with pytest.raises(ValueError, match=message):
        loader_of(name, milliseconds, examples, precision="int64")
    with pytest.raises(ValueError, match=f"timestamp {-(2**31) - 1} does not fit"):
        timestamps_for_device(np.array([-(2**31) - 1]), "int64")
    first = epoch_of(loader_of(name, milliseconds, examples), 1)[0]
    assert first.timestamps.max() > 2**31
