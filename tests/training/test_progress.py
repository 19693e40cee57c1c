"""RecBole's rule of early stopping, worked by hand."""

import pytest

from tim4rec_jax.training.progress import EarlyStop

pytestmark = pytest.mark.quick


def follow(values, patience):
    """The states after each validation, from epoch 1 on."""
    states, stop = [], EarlyStop(patience)
    for epoch, value in enumerate(values, start=1):
        stop = stop.after(value, epoch)
        states.append(stop)
    return states


def test_the_start():
    stop = EarlyStop(3)
    assert (stop.best, stop.best_epoch, stop.failures) == (None, 0, 0)
    assert not stop.improved and not stop.should_stop


def test_the_best_epoch_moves_with_better_and_with_equal_values():
    states = follow([0.1, 0.3, 0.2, 0.3, 0.25], patience=5)
    assert [state.best_epoch for state in states] == [1, 2, 2, 4, 4]
    assert [state.improved for state in states] == [True, True, False, True, False]
    assert [state.failures for state in states] == [0, 0, 1, 0, 1]
    assert states[-1].best == 0.3


def test_values_are_compared_to_four_decimals():
    states = follow([0.12344, 0.12336, 0.12334, 0.12341], patience=5)
    assert [state.best_epoch for state in states] == [1, 2, 2, 4]
    assert [state.best for state in states] == [0.1234, 0.1234, 0.1234, 0.1234]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_training_stops_when_more_than_patience_fail_in_a_row(patience):
    states = follow([0.5] + [0.4] * (patience + 1), patience)
    assert [state.should_stop for state in states] == [False] * (patience + 1) + [True]
    assert states[-1].best_epoch == 1


def test_an_improvement_starts_the_count_again():
    states = follow([0.5, 0.4, 0.4, 0.5, 0.4, 0.4, 0.4], patience=2)
    assert [state.should_stop for state in states] == [False] * 6 + [True]


def test_a_zero_metric_counts():
    states = follow([0.0, 0.0], patience=2)
    assert [state.best_epoch for state in states] == [1, 2]
