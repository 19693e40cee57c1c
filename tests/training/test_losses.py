"""Losses against Optax, against their formulas and against counting."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tim4rec_jax.training.losses import bpr, cross_entropy, sample_negative

pytestmark = pytest.mark.quick


def test_cross_entropy_equals_optax():
    rng = np.random.default_rng(0)
    scores, targets = jnp.asarray(3 * rng.normal(size=(6, 11)), jnp.float32), jnp.asarray(rng.integers(0, 11, 6))
    expected = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
    np.testing.assert_allclose(cross_entropy(scores, targets), expected, rtol=1e-6)
    gradient = jax.grad(lambda s: cross_entropy(s, targets).sum())(scores)
    np.testing.assert_allclose(gradient, jax.nn.softmax(scores) - jax.nn.one_hot(targets, 11), atol=1e-6)


def test_cross_entropy_counts_the_padding_row_and_bears_large_scores():
    scores = jnp.array([[1e4, 1e4, -1e4]])
    np.testing.assert_allclose(cross_entropy(scores, jnp.array([1])), [np.log(2)], rtol=1e-3)


def test_cross_entropy_of_bfloat16_scores_is_float32():
    scores = jnp.zeros((1, 1000), jnp.bfloat16)
    loss = cross_entropy(scores, jnp.array([3]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [np.log(1000)], rtol=1e-6)


def test_bpr_equals_its_formula():
    positive, negative = jnp.array([2.0, -1.0, -100.0]), jnp.array([0.5, 1.0, 100.0])
    expected = -np.log(1e-10 + 1 / (1 + np.exp(np.array([-1.5, 2.0, 200.0]))))
    np.testing.assert_allclose(bpr(positive, negative), expected, rtol=1e-5)
    gradient = jax.grad(lambda p: bpr(p, negative).sum())(positive)
    assert jnp.isfinite(gradient).all()
    assert (gradient[:2] < 0).all()


@pytest.mark.parametrize("target", [1, 3, 6])
def test_negatives_are_uniform_over_the_other_items(target):
    draws, vocab_size = 6000, 7
    keys = jax.random.split(jax.random.key(target), draws)
    counts = np.bincount(jax.vmap(lambda key: sample_negative(key, target, vocab_size))(keys), minlength=vocab_size)
    assert len(counts) == vocab_size
    assert counts[0] == counts[target] == 0
    others = np.delete(counts, [0, target])
    expected = draws / len(others)
    # Chi-square with 4 degrees of freedom: 23.5 is passed once in ten thousand.
    assert np.square(others - expected).sum() / expected < 23.5


def test_two_items_leave_one_negative_and_one_item_none():
    assert [int(sample_negative(jax.random.key(0), jnp.int32(t), 3)) for t in (1, 2)] == [2, 1]
    with pytest.raises(ValueError, match="vocab_size=2 must be at least 3"):
        sample_negative(jax.random.key(0), 1, 2)
