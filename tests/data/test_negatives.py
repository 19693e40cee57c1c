"""The distribution that negatives are drawn from, and the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.data.negatives import draw_negatives, make_proposal

COUNTS = np.array([99, 0, 1, 10, 1000, 3])


def probabilities(proposal):
    """q of items 1 to v - 1."""
    if proposal.bounds is None:
        return np.full(proposal.vocab_size - 1, 1 / (proposal.vocab_size - 1))
    return np.diff(proposal.bounds) / proposal.bounds[-1]


@pytest.mark.parametrize("power", [0, 0.75, 1])
def test_items_are_drawn_by_their_flattened_frequency(power):
    proposal = make_proposal(COUNTS, power)
    expected = np.maximum(COUNTS[1:], 1.0) ** power
    np.testing.assert_allclose(probabilities(proposal), expected / expected.sum(), rtol=1e-5)
    num = 200_000
    drawn = draw_negatives(jax.device_put(proposal), jax.random.key(1), num)
    found = np.bincount(drawn.items, minlength=len(COUNTS))
    assert found[0] == 0 and found.sum() == num
    q = probabilities(proposal)
    # Five standard deviations of a count.
    np.testing.assert_array_less(np.abs(found[1:] - num * q), 5 * np.sqrt(num * q * (1 - q)) + 1)
    np.testing.assert_allclose(drawn.log_expected, np.log(num * q)[np.asarray(drawn.items) - 1], atol=1e-4)


def test_an_item_that_is_never_a_target_can_be_drawn_beside_very_frequent_ones():
    counts = np.full(1_000, 10**9)
    counts[17] = 0
    q = probabilities(make_proposal(counts, 1))
    assert q.min() > 0 and q.argmin() == 16 and np.isclose(q.sum(), 1)


def test_one_item_and_none():
    drawn = draw_negatives(make_proposal(np.array([0, 4]), 1), jax.random.key(0), 3)
    np.testing.assert_array_equal(drawn.items, [1, 1, 1])
    np.testing.assert_allclose(drawn.log_expected, jnp.log(3.0), rtol=1e-6)
    with pytest.raises(ValueError, match="vocab_size=1 must lie between 2"):
        make_proposal(np.array([5]), 1)
