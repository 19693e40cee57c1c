"""The gaps that the causal time branch is standardised with come from the training part alone."""

import dataclasses

import numpy as np
import pytest

from tim4rec_jax.data.gaps import gap_statistics, training_span
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.data_config import DataConfig, SyntheticConfig


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    small = SyntheticConfig(num_users=30, num_items=20, min_events=6, max_events=9)
    return load_log(DataConfig(synthetic=small, k_core=0, cache_dir=str(tmp_path_factory.mktemp("cache"))))


def by_hand(log):
    values = []
    for first, end in zip(log.offsets[:-1], log.offsets[1:], strict=True):
        seconds = log.timestamps[first : end - 2]
        values += [np.log1p(gap) for gap in np.diff(seconds) if gap > 0]
    return np.mean(values), np.std(values)


def test_equals_a_loop_over_users(log):
    np.testing.assert_allclose(gap_statistics(log, leave_one_out(log)), by_hand(log), rtol=1e-12)


def test_held_out_events_do_not_count(log):
    later = log.timestamps.copy()
    for end in log.offsets[1:]:
        later[end - 2 : end] += 10**7
    changed = dataclasses.replace(log, timestamps=later)
    assert gap_statistics(changed, leave_one_out(log)) == gap_statistics(log, leave_one_out(log))
    assert training_span(changed, leave_one_out(log)) == training_span(log, leave_one_out(log))


def test_the_span_of_the_training_part(log):
    trained = np.concatenate(
        [log.timestamps[first : end - 2] for first, end in zip(log.offsets[:-1], log.offsets[1:], strict=True)]
    )
    assert training_span(log, leave_one_out(log)) == (trained.min(), trained.max())


def test_a_log_without_gaps(log):
    tied = dataclasses.replace(log, timestamps=np.full_like(log.timestamps, 5))
    assert gap_statistics(tied, leave_one_out(log)) == (0.0, 1.0)
    assert training_span(tied, leave_one_out(log)) == (5, 6)
    steady = dataclasses.replace(log, timestamps=60 * np.arange(log.num_rows))
    assert gap_statistics(steady, leave_one_out(log)) == (pytest.approx(np.log(61)), 1.0)
