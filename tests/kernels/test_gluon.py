"""What Gluon kernels share: products of fragments, numbers that go from lane to lane, arithmetic."""

import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.gluon import (
    fragment,
    fragment_columns,
    fragment_rows,
    lane_numbers,
    lane_sums,
    lanes,
    per_warp,
    product,
    softplus,
    to_columns,
    to_rows,
    to_warp,
)
from tests.kernels.gluon_ptx import GluonKernel, resources, run_kernel


def normal(name, *shape):
    """The same numbers for a name at every call."""
    return np.random.default_rng([*name.encode()]).normal(size=shape).astype(np.float32)


@gluon.jit
def _offsets(W: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    w = gl.arange(0, W, per_warp(W))
    m = gl.arange(0, M, gl.SliceLayout(0, fragment_rows(W)))
    n = gl.arange(0, N, gl.SliceLayout(0, fragment_columns(W)))
    return w[:, None, None] * (M * N) + m[None, :, None] * N + n[None, None, :]


@gluon.jit
def _product_kernel(a, b, c, W: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, EXACT: gl.constexpr):
    A = gl.load(a + _offsets(W, M, K))
    B = gl.load(b + _offsets(W, N, K))
    C = product(A, B, gl.zeros([W, M, N], gl.float32, fragment(W)), EXACT)
    gl.store(c + _offsets(W, M, N), C)


# dtype of the factors, whether they keep their digits, share of the largest number that a product may be off by.
PRECISIONS = [("float32", False, 3e-3), ("float32", True, 2e-6), ("bfloat16", False, 1e-6)]


@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize(("dtype", "exact", "limit"), PRECISIONS)
def test_product(dtype, exact, limit, warps):
    import ml_dtypes

    as_given = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    a, b = (normal(name, warps, rows, 32).astype(as_given) for name, rows in (("a", 16), ("b", 16)))
    constants = (("W", warps), ("M", 16), ("N", 16), ("K", 32), ("EXACT", exact))
    kernel = GluonKernel(_product_kernel, (dtype, dtype, "float32"), constants, warps)
    (c,) = run_kernel(kernel, [a, b], [((warps, 16, 16), np.float32)], grid=1)
    wanted = np.einsum("wmk,wnk->wmn", a.astype(np.float64), b.astype(np.float64))
    assert np.abs(c - wanted).max() < limit * np.abs(wanted).max()
    assert resources(kernel, 80).shared_bytes == 0


@gluon.jit
def _lanes_kernel(x, numbers, rows, columns, at_9, sums, history_sums, soft, slope, W: gl.constexpr):
    at = gl.arange(0, W, gl.SliceLayout(1, lanes(W)))[:, None] * 16 + lane_numbers(W)
    value = gl.load(x + at)
    number = gl.load(numbers + at)
    w = gl.arange(0, W, per_warp(W))
    row = gl.arange(0, 16, gl.SliceLayout(0, fragment_rows(W)))
    column = gl.arange(0, 16, gl.SliceLayout(0, fragment_columns(W)))
    w_rows = gl.arange(0, W, gl.SliceLayout(1, fragment_rows(W)))
    w_columns = gl.arange(0, W, gl.SliceLayout(1, fragment_columns(W)))
    gl.store(rows + w_rows[:, None] * 16 + row[None, :], to_rows(value))
    gl.store(columns + w_columns[:, None] * 16 + column[None, :], to_columns(value))
    gl.store(at_9 + w, to_warp(value, 9))
    gl.store(sums + at, lane_sums(value, number, False))
    gl.store(history_sums + at, lane_sums(value, number, True))
    s, d = softplus(value * 8.0)
    gl.store(soft + at, s)
    gl.store(slope + at, d)


@pytest.mark.parametrize("warps", [1, 4])
def test_numbers_go_from_lane_to_lane(warps):
    x = normal("x", warps, 16)
    numbers = np.sort(np.random.default_rng(1).integers(1, 5, (warps, 16)), axis=1).astype(np.int32)
    kernel = GluonKernel(_lanes_kernel, ("float32", "int32", *["float32"] * 7), (("W", warps),), warps)
    shape = ((warps, 16), np.float32)
    shapes = [shape, shape, ((warps,), np.float32), shape, shape, shape, shape]
    rows, columns, at_9, sums, history_sums, soft, slope = run_kernel(kernel, [x, numbers], shapes, grid=1)
    np.testing.assert_array_equal(rows, x)
    np.testing.assert_array_equal(columns, x)
    np.testing.assert_array_equal(at_9, x[:, 9])
    np.testing.assert_allclose(sums, np.cumsum(x, axis=1), rtol=1e-4, atol=1e-6)
    alone = [
        [x[w, (numbers[w] == numbers[w, t]) & (np.arange(16) <= t)].sum() for t in range(16)] for w in range(warps)
    ]
    np.testing.assert_allclose(history_sums, alone, rtol=1e-4, atol=1e-6)
    wide = 8.0 * x.astype(np.float64)
    np.testing.assert_allclose(soft, np.logaddexp(0, wide), rtol=3e-6)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-wide)), rtol=3e-6)
    assert resources(kernel, 80).shared_bytes == 0
