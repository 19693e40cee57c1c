"""The gated norm against its formula in NumPy and against PyTorch's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tim4rec_jax.layers.norms import gated_rms_norm


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for shape in ((2, 3, 7), (2, 3, 7), (7,))]


def formula(y, z, scale, eps):
    gated = y * z / (1 + np.exp(-z))
    return scale * gated / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_equals_the_formula(eps):
    y, z, scale = arrays()
    actual = gated_rms_norm(jnp.asarray(y), z, scale, eps=eps)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, formula(y, z, scale, eps), rtol=2e-6, atol=1e-6)


def test_gradients_equal_pytorch(x64):
    given, dy = arrays(np.float64), np.random.default_rng(1).normal(size=(2, 3, 7))
    weighted = jax.jit(jax.grad(lambda *a: jnp.sum(gated_rms_norm(*a, eps=1e-5) * dy), argnums=(0, 1, 2)))
    leaves = [torch.from_numpy(a).requires_grad_() for a in given]
    gated = leaves[0] * torch.nn.functional.silu(leaves[1])
    normed = leaves[2] * gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
    (normed * torch.from_numpy(dy)).sum().backward()
    for actual, leaf in zip(weighted(*given), leaves, strict=True):
        np.testing.assert_allclose(actual, leaf.grad.numpy(), rtol=1e-10, atol=1e-10)


def test_bfloat16_inputs_are_squared_and_summed_in_float32():
    # A bfloat16 sum of equal squares stops growing at 256 of them.
    y, z = jnp.full((1, 4096), 3.0, jnp.bfloat16), jnp.full((1, 4096), 2.0, jnp.bfloat16)
    actual = gated_rms_norm(y, z, jnp.ones(4096), eps=1e-12)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(actual, np.float32), 1.0)
    y, z, scale = (jnp.asarray(a, jnp.bfloat16) for a in arrays())
    expected = formula(*(np.asarray(a, np.float64) for a in (y, z, scale)), 1e-12)
    np.testing.assert_allclose(np.asarray(gated_rms_norm(y, z, scale, eps=1e-12), np.float64), expected, rtol=4e-3)


def test_shapes_that_do_not_fit():
    y, z, scale = arrays()
    message = r"y \(2, 3, 7\), z \(2, 3, 6\) and scale \(7,\) must be \[..., e\], \[..., e\] and \[e\]"
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(y, z[..., :6], scale, eps=1e-5)
    with pytest.raises(ValueError, match=r"scale \(1,\) must be"):
        gated_rms_norm(y, z, scale[:1], eps=1e-5)
