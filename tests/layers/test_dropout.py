"""Dropout masks: what they depend on, and that they are as good as random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tim4rec_jax.layers.dropout import Dropout, keep_mask

pytestmark = pytest.mark.quick

ROWS, POSITIONS, WIDTH = 512, 16, 64


@jax.jit
def row_keys(seed, ids):
    return jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), i)))(ids)


draw = jax.jit(keep_mask, static_argnums=(2, 3))


def deviations(seed, rate):
    """(keep - expected) / standard deviation of every draw, [ROWS, POSITIONS, WIDTH]."""
    keep = np.asarray(draw(row_keys(seed, np.arange(ROWS)), np.arange(POSITIONS), WIDTH, rate), np.float64)
    return (keep - (1 - rate)) / np.sqrt(rate * (1 - rate))


@pytest.fixture(scope="module")
def drawn():
    return deviations(0, 0.2)


def z(values):
    return abs(values.mean()) * np.sqrt(values.size)


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.4, 0.9])
def test_the_share_of_dropped_values_is_the_rate(rate):
    assert z(deviations(1, rate)) < 4


def test_no_row_position_or_channel_is_favoured(drawn):
    for axis in range(3):
        means = drawn.mean(axis=tuple({0, 1, 2} - {axis}))
        scores = means * np.sqrt(drawn.size / drawn.shape[axis])
        assert np.abs(scores).max() < 4.5
        # Neither too even: the sum of squares is chi-square with as many degrees as there are means.
        assert abs(np.square(scores).mean() - 1) < 4 * np.sqrt(2 / len(scores))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_neighbours_are_not_correlated(drawn, axis, distance):
    first = np.take(drawn, np.arange(drawn.shape[axis] - distance), axis)
    second = np.take(drawn, np.arange(distance, drawn.shape[axis]), axis)
    assert z(first * second) < 4


def test_words_of_one_hash_and_neighbouring_keys_are_not_correlated(drawn):
    quarter = WIDTH // 4
    for word in (1, 2, 3):
        assert z(drawn[:, :, :quarter] * drawn[:, :, word * quarter : (word + 1) * quarter]) < 4
    assert z(drawn * deviations(1, 0.2)) < 4


def test_a_row_keeps_its_mask_whatever_lies_beside_it():
    keys = np.asarray(row_keys(3, np.arange(6)))
    full = np.asarray(draw(keys, np.arange(9), 7, 0.5))
    np.testing.assert_array_equal(draw(keys[::-1], np.arange(4), 7, 0.5), full[::-1, :4])
    positions = np.array([[5], [0], [8], [1], [1], [3]])
    np.testing.assert_array_equal(draw(keys, positions, 7, 0.5)[:, 0], full[np.arange(6), positions[:, 0]])
    assert (full[0] != full[1]).any()


@functools.partial(jax.jit, static_argnums=0)
def dropped(rate, x, ids, seed=0, positions=None):
    key = jax.random.key(seed)
    return Dropout(rate).apply({}, x, ids, deterministic=False, positions=positions, rngs={"dropout": key})


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(rate):
    x = jnp.ones((256, 8, 32)).at[0].set(-3.0)
    y = np.asarray(dropped(rate, x, jnp.arange(256)), np.float64)
    threshold = round(rate * 2**16)
    np.testing.assert_allclose(np.unique(y[1:]), [0, 2**16 / (2**16 - threshold)], rtol=1e-6)
    np.testing.assert_allclose(np.unique(y[0]), [-3 * 2**16 / (2**16 - threshold), 0], rtol=1e-6)
    spread = np.sqrt(rate / (1 - rate) / y[1:].size)
    assert abs(y[1:].mean() - 1) < 4 * spread


def test_masks_follow_the_key_and_the_example_id():
    x, ids = np.ones((4, 8, 32), np.float32), np.arange(4)
    y = np.asarray(dropped(0.5, x, ids))
    np.testing.assert_array_equal(dropped(0.5, x, ids), y)
    np.testing.assert_array_equal(dropped(0.5, x[:2, :5], np.array([3, 1])), y[[3, 1], :5])
    assert (dropped(0.5, x, ids, seed=1) != y).any()
    assert (dropped(0.5, x, ids + 4) != y).any()
    positions = np.array([[7], [0], [2], [2]])
    read = dropped(0.5, x[:, :1], ids, positions=positions)
    np.testing.assert_array_equal(read[:, 0], y[ids, positions[:, 0]])


def test_two_sites_of_a_model_drop_different_values():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            ids = jnp.arange(len(x))
            return [Dropout(0.5)(x, ids, deterministic=False) for _ in range(2)]

    first, second = Pair().apply({}, jnp.ones((4, 8, 32)), rngs={"dropout": jax.random.key(0)})
    share = float(jnp.mean((first != 0) == (second != 0)))
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(first.size)


@pytest.mark.parametrize(("rate", "deterministic"), [(0.0, False), (0.3, True)])
def test_no_dropout_is_the_identity_and_needs_no_key(rate, deterministic):
    x = jnp.arange(12.0).reshape(1, 3, 4)
    y = Dropout(rate).apply({}, x, jnp.arange(1), deterministic=deterministic)
    np.testing.assert_array_equal(y, x)


def test_the_dtype_is_kept():
    assert dropped(0.5, jnp.ones((1, 2, 8), jnp.bfloat16), jnp.arange(1)).dtype == jnp.bfloat16
