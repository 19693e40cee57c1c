"""The loaders, of prefixes and of packed rows, on the device and on the host, against each other and the log."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.evaluation.logs import random_log
from tim4rec_jax import DataConfig, ExperimentConfig, ModelConfig, TrainConfig
from tim4rec_jax.data.loader import epoch_order, make_loader, timestamps_for_device
from tim4rec_jax.data.splits import gather_windows, leave_one_out

pytestmark = pytest.mark.quick

MAX_LEN = 6
BATCH_SIZE = {"last": 16, "all": 5, "masked": 5}
LOADERS = ("device", "grain")
each_loader = pytest.mark.parametrize("name", LOADERS)
each_kind = pytest.mark.parametrize("positions", BATCH_SIZE)


@pytest.fixture(scope="module")
def log():
    return random_log(num_users=30, num_items=15, min_events=3, max_events=14, seed=3)


@pytest.fixture(scope="module")
def examples(log):
    train = leave_one_out(log).train
    assert len(train) % BATCH_SIZE["last"] not in (0, BATCH_SIZE["last"] - 1)
    return train


def loader_of(name, log, positions, *, seed=0, precision="float32", context=None, batch_size=None):
    train = TrainConfig(
        positions=positions, batch_size=batch_size or BATCH_SIZE[positions], seed=seed, window_context=context
    )
    data = DataConfig(loader=name, timestamp_precision=precision)
    model = ModelConfig(name="bert4rec" if positions == "masked" else "sasrec", max_len=MAX_LEN)
    config = ExperimentConfig("test", model, data, train)
    return make_loader(config, log, leave_one_out(log).train)


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


@each_kind
@pytest.mark.parametrize(("precision", "dtype"), [("float32", np.float32), ("int64", np.int32)])
def test_both_give_the_same_batches_in_the_same_order(log, positions, precision, dtype):
    device, grain = (loader_of(name, log, positions, seed=7, precision=precision) for name in LOADERS)
    assert device.num_batches == grain.num_batches > 3
    for epoch in (1, 2):
        batches = epoch_of(device, epoch)
        assert len(batches) == device.num_batches
        assert_same_batches(epoch_of(grain, epoch), batches)
        types = [leaf.dtype for leaf in jax.tree.leaves(batches[0])]
        assert types == [np.int32, np.int32, dtype, np.int32, np.float32]
        assert {batch.items.shape for batch in batches} == {(BATCH_SIZE[positions], MAX_LEN)}


@each_loader
def test_an_epoch_holds_every_example_once(log, examples, name):
    windows = gather_windows(log.items, log.timestamps, log.offsets, examples.users, examples.ends, MAX_LEN)
    for epoch in (1, 2):
        batches = epoch_of(loader_of(name, log, "last"), epoch)
        real = concatenated(batches, "weights") == 1
        assert real.sum() == len(examples)
        rows = [concatenated(batches, part)[real] for part in ("items", "timestamps", "lengths", "targets")]
        found = sorted(zip(rows[0].tolist(), rows[1].tolist(), rows[2].tolist(), rows[3].tolist(), strict=True))
        seconds = windows.timestamps.astype(np.float32).tolist()
        expected = zip(windows.items.tolist(), seconds, windows.lengths.tolist(), windows.targets.tolist(), strict=True)
        assert found == sorted(expected)


@each_loader
def test_a_short_last_batch_is_filled_with_rows_of_no_weight(log, examples, name):
    batches = epoch_of(loader_of(name, log, "last"), 1)
    assert all((batch.weights == 1).all() for batch in batches[:-1])
    left = len(examples) % BATCH_SIZE["last"]
    np.testing.assert_array_equal(batches[-1].weights, [1.0] * left + [0.0] * (BATCH_SIZE["last"] - left))
    assert (batches[-1].lengths >= 1).all()
    small = epoch_of(loader_of(name, log, "last", batch_size=len(examples) + 3), 1)
    assert len(small) == 1 and small[0].weights.sum() == len(examples)


def histories(batch):
    """The histories as (items, timestamps, targets, weights), and the padding."""
    for row in range(len(batch.items)):
        cuts = np.flatnonzero(np.diff(batch.segment_ids[row], prepend=-1))
        columns = (batch.items, batch.timestamps, batch.targets, batch.weights)
        yield from zip(*(np.split(column[row], cuts[1:]) for column in columns), strict=True)


@each_loader
def test_every_target_is_trained_on_once_after_the_items_before_it(log, name):
    train = leave_one_out(log).train
    loader = loader_of(name, log, "all", context=2)
    assert loader.sampler.fill_share > 0.8
    expected = [
        (target, *log.items[max(first, first + end - 3) : first + end])
        for first, end, target in (
            (log.offsets[user], end, log.items[log.offsets[user] + end])
            for user, end in zip(train.users, train.ends, strict=True)
        )
    ]
    seconds = log.timestamps.astype(np.float32)
    for epoch in (1, 2):
        found = []
        for batch in epoch_of(loader, epoch):
            for items, timestamps, targets, weights in histories(batch):
                padding = items == 0
                assert padding.all() or not padding.any()
                assert not any(column[padding].any() for column in (timestamps, targets, weights))
                for i in np.flatnonzero(weights == 1):
                    assert weights[i:].all() and timestamps[i] in seconds[log.items == items[i]]
                    found.append((targets[i], *items[max(i - 2, 0) : i + 1]))
        assert sorted(found) == sorted(expected)


@each_loader
def test_every_event_of_the_training_part_may_be_masked_once(log, name):
    """Those of users with one training event, who have nothing to tell it from, are left out, as everywhere."""
    ends = np.diff(log.offsets) - 2
    assert (ends == 1).any() and (ends > MAX_LEN).any()
    loader = loader_of(name, log, "masked", context=2)
    expected = [
        (int(log.items[first + i]), *log.items[first : first + i][-2:])
        for first, end in zip(log.offsets, ends, strict=False)
        for i in range(end if end > 1 else 0)
    ]
    for epoch in (1, 2):
        found = []
        for batch in epoch_of(loader, epoch):
            np.testing.assert_array_equal(batch.targets, batch.items)
            for items, _, _, weights in histories(batch):
                found += [(int(items[i]), *items[max(i - 2, 0) : i]) for i in np.flatnonzero(weights)]
        assert sorted(found) == sorted(expected)


@each_loader
def test_rows_that_only_fill_the_last_batch_come_last_without_weight(log, name):
    loader = loader_of(name, log, "all")
    batches = epoch_of(loader, 1)
    assert all(batch.weights.any(axis=1).all() for batch in batches[:-1])
    real = batches[-1].weights.any(axis=1)
    assert 0 < real.sum() < BATCH_SIZE["all"] and not real[real.sum() :].any()
    assert not batches[-1].items[~real].any()
    assert not batches[-1].segment_ids[~real].any()


@each_kind
@each_loader
def test_starting_inside_an_epoch_gives_the_rest_of_it(log, name, positions):
    whole = epoch_of(loader_of(name, log, positions), 2)
    for start in (1, len(whole) - 1):
        assert_same_batches(epoch_of(loader_of(name, log, positions), 2, start), whole[start:])
    assert epoch_of(loader_of(name, log, positions), 2, len(whole)) == []


@each_kind
@each_loader
def test_epochs_and_seeds_differ_in_equally_many_batches(log, name, positions):
    loader = loader_of(name, log, positions)
    first, again, second = (epoch_of(loader, epoch) for epoch in (1, 1, 2))
    assert_same_batches(again, first)
    other = epoch_of(loader_of(name, log, positions, seed=1), 1)
    for different in (second, other):
        assert len(different) == len(first)
        assert any((a.items != b.items).any() for a, b in zip(different, first, strict=True))


@each_kind
@each_loader
def test_examples_before_a_batch_are_the_targets_trained_on(log, examples, name, positions):
    loader = loader_of(name, log, positions, context=None if positions == "last" else 1)
    for epoch in (2, 1):
        targets = [int(batch.weights.sum()) for batch in epoch_of(loader, epoch)]
        before = [loader.examples_before(epoch, batch) for batch in range(loader.num_batches + 1)]
        assert before == [0, *np.cumsum(targets)]
        # The first event of each user is one more that may be masked.
        assert before[-1] == len(examples) + (positions == "masked") * len(np.unique(examples.users))


def test_a_context_that_leaves_nothing_to_train_on_is_refused(log):
    with pytest.raises(ValueError, match="train.window_context=6 must be less than model.max_len=6"):
        loader_of("grain", log, "all", context=6)


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


@each_kind
@each_loader
def test_timestamps_beyond_int32_are_refused(log, name, positions):
    milliseconds = dataclasses.replace(log, timestamps=log.timestamps * 1000)
    message = (
        rf"timestamp {milliseconds.timestamps.max()} does not fit into the int32 seconds .*at most 2147483647, "
        "2038-01-19.; if these are milliseconds give seconds, else choose 'float32'"
    )
    with pytest.raises(ValueError, match=message):
        loader_of(name, milliseconds, positions, precision="int64")
    with pytest.raises(ValueError, match=f"timestamp {-(2**31) - 1} does not fit"):
        timestamps_for_device(np.array([-(2**31) - 1]), "int64")
    first = epoch_of(loader_of(name, milliseconds, positions), 1)[0]
    assert first.timestamps.max() > 2**31
