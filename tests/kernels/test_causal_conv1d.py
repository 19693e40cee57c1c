"""The causal convolution against loops and against PyTorch's grouped convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_last
from tests.quick_jit import quick_jit

ACTIVATIONS = {
    "none": (lambda y: y, lambda y: y),
    "silu": (lambda y: y / (1 + np.exp(-y)), torch.nn.functional.silu),
    "hard_swish": (lambda y: y * np.clip(y + 3, 0, 6) / 6, torch.nn.functional.hardswish),
}
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def arrays(length, taps, dtype=np.float32):
    rng = np.random.default_rng([length, taps])
    shapes = (3, length, 5), (taps, 5), (5,)
    return [(2 * rng.normal(size=shape)).astype(dtype) for shape in shapes]


def by_loops(x, weight, bias):
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for back in range(min(weight.shape[0], t + 1)):
            y[:, t] += weight[-1 - back] * x[:, t - back]
    return y + bias


@by_activation
@pytest.mark.parametrize(("length", "taps"), [(9, 4), (2, 4), (1, 1)])
def test_equals_the_loops(length, taps, activation):
    x, weight, bias = arrays(length, taps)
    expected = ACTIVATIONS[activation][0](by_loops(x, weight, bias))
    actual = quick_jit(causal_conv1d, static_argnames="activation")(x, weight, bias, activation=activation)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_without_bias_and_activation():
    x, weight, _ = arrays(9, 4)
    np.testing.assert_allclose(causal_conv1d(x, weight), by_loops(x, weight, 0), rtol=1e-5, atol=1e-5)


@by_activation
def test_gradients_equal_pytorch(activation, x64):
    x, weight, bias = arrays(9, 4, np.float64)
    dy = np.random.default_rng(1).normal(size=x.shape)

    def weighted(*given):
        return jnp.sum(causal_conv1d(*given, activation=activation) * dy)

    gradients = quick_jit(jax.grad(weighted, argnums=(0, 1, 2)))(x, weight, bias)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, weight, bias)]
    padded = torch.nn.functional.pad(leaves[0].transpose(1, 2), (3, 0))
    y = torch.nn.functional.conv1d(padded, leaves[1].T[:, None], leaves[2], groups=5).transpose(1, 2)
    (ACTIVATIONS[activation][1](y) * torch.from_numpy(dy)).sum().backward()
    for actual, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(actual, leaf.grad.numpy(), rtol=1e-10, atol=1e-10)


@by_activation
def test_bfloat16_stays_bfloat16_and_close(activation):
    x, weight, bias = arrays(9, 4)
    narrow = jnp.asarray(x, jnp.bfloat16)
    actual = causal_conv1d(narrow, weight, bias, activation=activation)
    assert actual.dtype == jnp.bfloat16
    expected = ACTIVATIONS[activation][0](by_loops(np.asarray(narrow, np.float64), weight, bias))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2e-2, atol=0.1)


@by_activation
def test_one_position_equals_the_full_form(activation, x64):
    x, weight, bias = arrays(9, 4, np.float64)
    window = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    full = causal_conv1d(jnp.asarray(x), weight, bias, activation=activation)
    for t in (0, 2, 8):
        one = causal_conv1d_last(jnp.asarray(window[:, t : t + 4]), weight, bias, activation=activation)
        np.testing.assert_allclose(one, full[:, t], rtol=1e-12, atol=1e-12)


def test_one_position_without_bias_in_bfloat16():
    x, weight, _ = arrays(4, 4)
    one = causal_conv1d_last(jnp.asarray(x, jnp.bfloat16), weight)
    assert one.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(one, np.float64), by_loops(x, weight, 0)[:, -1], rtol=2e-2, atol=0.1)


def test_bad_arguments():
    x, weight, bias = arrays(9, 4)
    with pytest.raises(ValueError, match=r"x \(3, 9\) and weight \(4, 5\) must be \[b, l, c\] and \[K, c\]"):
        causal_conv1d(x[..., 0], weight)
    with pytest.raises(ValueError, match=r"x \(3, 9, 5\) and weight \(4, 4\) must be \[b, l, c\] and \[K, c\]"):
        causal_conv1d(x, weight[:, :4])
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), expected \(5,\)"):
        causal_conv1d(x, weight, bias[:1])
    with pytest.raises(ValueError, match=r"activation='gelu' must be one of \['hard_swish', 'none', 'silu'\]"):
        causal_conv1d(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"window \(3, 9, 5\) must be \[b, K, c\] for weight \(4, 5\)"):
        causal_conv1d_last(x, weight)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), expected \(5,\)"):
        causal_conv1d_last(x[:, :4], weight, bias[:1])
