"""The two loaders of packed rows against each other and against the log."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.data.test_loader import assert_same_batches, epoch_of
from tests.evaluation.logs import random_log
from tim4rec_jax import DataConfig, ExperimentConfig, ModelConfig, TrainConfig
from tim4rec_jax.data.loader import DeviceLoader
from tim4rec_jax.data.packed_loader import PACKED_LOADERS, make_loader
from tim4rec_jax.data.splits import leave_one_out

MAX_LEN, BATCH_SIZE = 6, 5


@pytest.fixture(scope="module")
def log():
    return random_log(num_users=30, num_items=15, min_events=3, max_events=14, seed=3)


def config_of(name, *, seed=0, precision="float32", context=None, positions="all"):
    train = TrainConfig(positions=positions, batch_size=BATCH_SIZE, seed=seed, window_context=context)
    model = ModelConfig(name="sasrec", max_len=MAX_LEN)
    return ExperimentConfig("test", model, DataConfig(loader=name, timestamp_precision=precision), train)


def loader_of(name, log, **settings):
    return make_loader(config_of(name, **settings), log, leave_one_out(log).train)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", np.float32), ("int64", np.int32)])
def test_both_give_the_same_batches_in_the_same_order(log, precision, dtype):
    device, grain = (loader_of(name, log, seed=7, precision=precision) for name in ("device", "grain"))
    assert device.num_batches == grain.num_batches > 3
    assert device.fill_share == grain.fill_share > 0.9
    for epoch in (1, 2):
        batches = epoch_of(device, epoch)
        assert len(batches) == device.num_batches
        assert_same_batches(epoch_of(grain, epoch), batches)
        types = [leaf.dtype for leaf in jax.tree.leaves(batches[0])]
        assert types == [np.int32, np.int32, dtype, np.int32, np.float32]
        assert {leaf.shape for batch in batches for leaf in jax.tree.leaves(batch)} == {(BATCH_SIZE, MAX_LEN)}


def histories(batch):
    """The histories as (items, timestamps, targets, weights), and the padding."""
    for row in range(len(batch.items)):
        cuts = np.flatnonzero(np.diff(batch.segment_ids[row], prepend=-1))
        columns = (batch.items, batch.timestamps, batch.targets, batch.weights)
        yield from zip(*(np.split(column[row], cuts[1:]) for column in columns), strict=True)


@pytest.mark.parametrize("name", PACKED_LOADERS)
def test_every_target_is_trained_on_once_after_the_items_before_it(log, name):
    loader = loader_of(name, log, context=2)
    expected = [
        (target, *log.items[max(first, first + end - 3) : first + end])
        for first, end, target in (
            (log.offsets[user], end, log.items[log.offsets[user] + end])
            for user, end in zip(*dataclasses.astuple(leave_one_out(log).train), strict=True)
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


@pytest.mark.parametrize("name", PACKED_LOADERS)
def test_rows_that_only_fill_the_last_batch_come_last_without_weight(log, name):
    loader = loader_of(name, log)
    batches = epoch_of(loader, 1)
    assert all(batch.weights.any(axis=1).all() for batch in batches[:-1])
    real = batches[-1].weights.any(axis=1)
    assert 0 < real.sum() < BATCH_SIZE and not real[real.sum() :].any()
    assert not batches[-1].items[~real].any()
    assert not batches[-1].segment_ids[~real].any()


@pytest.mark.parametrize("name", PACKED_LOADERS)
def test_starting_inside_an_epoch_gives_the_rest_of_it(log, name):
    whole = epoch_of(loader_of(name, log), 2)
    for start in (1, len(whole) - 1):
        assert_same_batches(epoch_of(loader_of(name, log), 2, start), whole[start:])
    assert epoch_of(loader_of(name, log), 2, len(whole)) == []


@pytest.mark.parametrize("name", PACKED_LOADERS)
def test_epochs_and_seeds_differ_in_equally_many_batches(log, name):
    loader = loader_of(name, log)
    first, again, second = (epoch_of(loader, epoch) for epoch in (1, 1, 2))
    assert_same_batches(again, first)
    other = epoch_of(loader_of(name, log, seed=1), 1)
    for different in (second, other):
        assert len(different) == len(first)
        assert any((a.items != b.items).any() for a, b in zip(different, first, strict=True))


@pytest.mark.parametrize("name", PACKED_LOADERS)
def test_examples_before_a_batch_are_the_targets_trained_on(log, name):
    loader = loader_of(name, log, context=1)
    for epoch in (2, 1):
        targets = [int(batch.weights.sum()) for batch in epoch_of(loader, epoch)]
        before = [loader.examples_before(epoch, batch) for batch in range(loader.num_batches + 1)]
        assert before == [0, *np.cumsum(targets)]
        assert before[-1] == len(leave_one_out(log).train)


def test_settings_choose_the_loader(log):
    assert isinstance(loader_of("device", log, positions="last"), DeviceLoader)
    for name, loader in PACKED_LOADERS.items():
        assert isinstance(loader_of(name, log), loader)
    with pytest.raises(ValueError, match="train.window_context=6 must be less than model.max_len=6"):
        loader_of("grain", log, context=6)


@pytest.mark.parametrize("name", PACKED_LOADERS)
def test_timestamps_beyond_int32_are_refused(log, name):
    milliseconds = dataclasses.replace(log, timestamps=log.timestamps * 1000)
    with pytest.raises(ValueError, match="does not fit into the int32 seconds"):
        loader_of(name, milliseconds, precision="int64")
