"""Products with a matrix of parameters: values, gradients, and the order in which a CPU computes them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.products import matmul


def _given(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("leading", [(), (5,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize(("features_in", "features_out"), [(6, 20), (20, 6), (6, 6), (1, 1)])
def test_equals_the_product_and_its_gradients(leading: tuple[int, ...], features_in: int, features_out: int) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = _given(rng, (*leading, features_in), "float64")
        w = _given(rng, (features_in, features_out), "float64")
        dy = _given(rng, (*leading, features_out), "float64")
        y, pull_back = jax.vjp(lambda x, w: matmul(x, w, "float64"), x, w)
        dx, dw = pull_back(dy)
        np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(w), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dx, np.asarray(dy) @ np.asarray(w).T, rtol=1e-12, atol=1e-12)
        flat_x, flat_dy = np.reshape(x, (-1, features_in)), np.reshape(dy, (-1, features_out))
        np.testing.assert_allclose(dw, flat_x.T @ flat_dy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w = _given(rng, (4, 8), "bfloat16"), _given(rng, (8, 3), "bfloat16")
    y, pull_back = jax.vjp(lambda x, w: matmul(x, w, dtype), x, w)
    assert y.dtype == dtype
    assert [of.dtype for of in pull_back(y)] == ["bfloat16", "bfloat16"]


@pytest.mark.parametrize(("features_in", "features_out"), [(8, 40), (40, 8)])
def test_weight_gradient_has_its_narrower_side_first_and_copies_nothing_else(
    features_in: int, features_out: int
) -> None:
    def gradient(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda w: matmul(x, w, "float32"), w)[1](dy)[0]

    shapes = (4, 50, features_in), (features_in, features_out), (4, 50, features_out)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(gradient).lower(*given).compile().as_text()
    dots = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", program)
    assert dots == [("8", "40")]
    assert not re.search(r"f32\[\d+,200\]", program), "an operand was turned before the product"
