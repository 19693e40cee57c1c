"""One position of the state space duality against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.ssd import ssd, ssd_step


def _inputs(b=3, h=4, p=5, n=6, groups=1, dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    wide = jnp.promote_types(dtype, jnp.float32)
    maps = (b, 1, n) if groups == 1 else (b, 1, groups, n)
    arrays = normal(b, 1, h, p), normal(b, 1, h), -jnp.exp(normal(h, dtype=wide)), normal(*maps), normal(*maps)
    return arrays, normal(b, h, p, n, dtype=wide), {"D": normal(h, dtype=wide), "dt_bias": normal(h, dtype=wide)}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [True, False])
def test_it_is_the_definition_at_length_one(x64, groups, options):
    arrays, state, given = _inputs(groups=groups)
    given = given if options else {}
    expected = ssd(*arrays, initial_state=state, return_final_state=True, implementation="reference", **given)
    for found, wanted in zip(ssd_step(*arrays, state, **given), expected, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_rows_without_a_position_keep_their_bits():
    arrays, state, given = _inputs(dtype=jnp.float32)
    lengths = jnp.array([1, 0, 1])
    _, after = ssd_step(*arrays, state, lengths=lengths, **given)
    assert np.asarray(after[1]).tobytes() == np.asarray(state[1]).tobytes()
    assert (after[::2] != state[::2]).any(axis=(1, 2, 3)).all()


def test_narrow_values_keep_a_wide_state():
    arrays, state, given = _inputs(dtype=jnp.bfloat16)
    y, after = ssd_step(*arrays, state, **given)
    assert y.dtype == jnp.bfloat16 and after.dtype == jnp.float32
    wide = [a.astype(jnp.float32) for a in arrays]
    expected, expected_state = ssd_step(*wide, state, **given)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(after, expected_state, rtol=1e-6, atol=1e-6)


def test_it_has_gradients(x64):
    arrays, state, given = _inputs()

    def loss(function, state, x):
        y, after = function(x, *arrays[1:], state)
        return (y**2).sum() + (after**3).sum()

    def definition(*a):
        return ssd(*a[:5], initial_state=a[5], return_final_state=True, implementation="reference", **given)

    found = jax.grad(lambda *a: loss(lambda *b: ssd_step(*b, **given), *a), (0, 1))(state, arrays[0])
    expected = jax.grad(lambda *a: loss(definition, *a), (0, 1))(state, arrays[0])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_shapes_that_do_not_fit():
    (x, dt, A, B, C), state, _ = _inputs(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"x \(3, 2, 4, 5\) and dt \(3, 1, 4\) must be \[b, 1, h, p\] and \[b, 1, h\]"):
        ssd_step(jnp.repeat(x, 2, axis=1), dt, A, B, C, state)
    with pytest.raises(ValueError, match=r"B \(3, 1, 1, 7\) and C \(3, 1, 1, 6\) must be \[b, 1, g, n\]"):
        ssd_step(x, dt, A, jnp.zeros((3, 1, 7)), C, state)
