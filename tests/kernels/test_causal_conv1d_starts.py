"""Several histories in a row of the causal convolution, inputs from before the row, and what to go on with after it."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.causal_conv1d import IMPLEMENTATIONS, causal_conv1d, causal_conv1d_tail
from kernels.causal_conv1d.config import CausalConv1dConfig
from tests.kernels.packed import histories, marked
from tests.kernels.test_causal_conv1d import assert_near, by_pytorch

BATCH, LENGTH, CHANNELS = 3, 11, 5
# Outputs and gradients, as shares of the largest magnitude.
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}
STARTS = {
    "none": [(), (), ()],
    "some": [(3, 4, 9), (0, 10), (1, 2)],
    "everywhere": [range(LENGTH)] * BATCH,
}

KERNELS = "pallas_triton_interpreted"
# Strips and channels that do not exist, blocks of positions that do not divide a strip, strips shorter than 8 taps.
CUTS = {
    "rows": CausalConv1dConfig(
        channels=2, strips=2, segments=1, forward_unroll=3, backward_unroll=2, forward_warps=1, backward_warps=1
    ),
    "segments": CausalConv1dConfig(
        channels=8, strips=4, segments=3, forward_unroll=2, backward_unroll=3, forward_warps=1, backward_warps=1
    ),
}
PLAIN = ["reference", "xla"]

by_plain = pytest.mark.parametrize("implementation", PLAIN)
by_implementation = pytest.mark.parametrize("implementation", [*PLAIN, *CUTS])
by_taps = pytest.mark.parametrize("taps", [1, 2, 4, 8])


@functools.cache
def inputs(taps, implementation="xla"):
    """x, weight, bias, initial and dy in float64 with float32 values; kernels have zeros as initial."""
    rng = np.random.default_rng(taps)
    of_x = (BATCH, LENGTH, CHANNELS)
    shapes = of_x, (taps, CHANNELS), (CHANNELS,), (BATCH, taps - 1, CHANNELS), of_x
    arrays = [rng.normal(size=shape).astype(np.float32).astype(np.float64) for shape in shapes]
    if implementation in CUTS:
        arrays[3] = np.zeros_like(arrays[3])
    return arrays


@functools.cache
def program(implementation):
    """Jitted (x, weight, bias, initial or None, dy, starts) -> y and the gradient by all but starts.

    An implementation is a plain one, or a cut of the kernels, which take no initial.
    """

    @jax.jit
    def run(x, weight, bias, initial, dy, starts):
        options = {"activation": "silu", "implementation": implementation}
        if implementation in CUTS:
            options |= {"implementation": KERNELS, "config": CUTS[implementation]}

        def apply(x, weight, bias, initial):
            return causal_conv1d(x, weight, bias, starts=starts, initial=initial, **options)

        y, pull = jax.vjp(apply, x, weight, bias, None if implementation in CUTS else initial)
        return [a for a in (y, *pull(dy)) if a is not None]

    return run


def alone(x, weight, bias, initial, dy, starts):
    """y and gradients where each history is convolved by itself, in float64."""
    before = weight.shape[0] - 1
    results = [np.zeros(a.shape) for a in (x, x, weight, bias, initial)]
    for row, first, after, _, follows in histories(starts):
        rows, part = slice(row, row + 1), slice(first, after)
        # What comes before is given as zeros, or as more of x; its outputs are nobody's.
        earlier = initial[rows] if follows else np.zeros_like(initial[rows])
        given, weights = np.concatenate([earlier, x[rows, part]], 1), np.concatenate([0 * earlier, dy[rows, part]], 1)
        y, dx, dweight, dbias = by_pytorch("silu", given, weight, bias, weights)
        results[0][rows, part], results[1][rows, part] = y[:, before:], dx[:, before:]
        results[2] += dweight
        results[3] += dbias
        results[4][rows] += dx[:, :before] * follows
    return results


@functools.cache
def truth(taps, name, implementation):
    return alone(*inputs(taps, implementation), marked((BATCH, LENGTH), *STARTS[name]))


def check(implementation, taps, name, dtype):
    given = [jnp.asarray(a, dtype) for a in inputs(taps, implementation)]
    actual = program(implementation)(*given, marked((BATCH, LENGTH), *STARTS[name]))
    assert {a.dtype for a in actual} == {jnp.dtype(dtype)}
    # With one tap nothing comes from before, and kernels take nothing from there.
    kept = slice(5 if taps > 1 and implementation in PLAIN else 4)
    assert_near(actual[kept], truth(taps, name, implementation)[kept], TOLERANCES[dtype])


def test_the_suite_knows_every_implementation():
    assert {*PLAIN, KERNELS} == set(IMPLEMENTATIONS) - {"pallas_triton"}


@by_taps
@pytest.mark.parametrize("name", STARTS)
@by_plain
def test_each_history_alone_in_float64(implementation, name, taps, x64):
    check(implementation, taps, name, "float64")


@pytest.mark.parametrize("name", STARTS)
@by_implementation
def test_each_history_alone_in_float32(implementation, name):
    check(implementation, 4, name, "float32")


@pytest.mark.parametrize("taps", [1, 2, 8])
def test_kernels_with_other_numbers_of_taps(taps):
    check("segments", taps, "some", "float32")


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(bits=st.lists(st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH))
def test_any_starts_as_by_the_definition(bits):
    starts = np.array(bits).reshape(BATCH, LENGTH)
    with jax.enable_x64(True):
        actual, expected = (program(name)(*inputs(4), starts) for name in ("xla", "reference"))
    assert_near(actual, [np.asarray(a) for a in expected], TOLERANCES["float64"])


@pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
@by_implementation
def test_no_history_feels_another(implementation, value):
    """Not by one bit, whatever the other holds."""
    x, weight, bias, initial, dy = (jnp.asarray(a, jnp.float32) for a in inputs(4, implementation))
    starts = marked((BATCH, LENGTH), (3, 7), (3, 7), (3, 7))
    run = program(implementation)
    y, dx, _, _, *d_initial = run(x, weight, bias, initial, dy, starts)
    changed = run(x.at[:, 3:7].set(value), weight, bias, initial, dy, starts)
    for a, b in ((changed[0], y), (changed[1], dx)):
        np.testing.assert_array_equal(a[:, :3], b[:, :3])
        np.testing.assert_array_equal(a[:, 7:], b[:, 7:])
        assert (a[:, 3:7] != b[:, 3:7]).any()
    other = run(x, weight, bias, initial, dy.at[:, 3:7].set(value), starts)[1]
    for part in (slice(3), slice(7, LENGTH)):
        np.testing.assert_array_equal(other[:, part], dx[:, part])
    np.testing.assert_array_equal(changed[4:], d_initial)


@by_implementation
def test_bfloat16_stays_bfloat16(implementation):
    x, weight, bias, initial, dy = (jnp.asarray(a, jnp.bfloat16) for a in inputs(4, implementation))
    starts = marked((BATCH, LENGTH), *STARTS["some"])
    actual = program(implementation)(x, weight, bias, initial, dy, starts)
    assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
    wide = [np.asarray(a, np.float64) for a in (x, weight, bias, initial, dy)]
    assert_near(actual[:2], alone(*wide, starts)[:2], (2e-2, 2e-2))


@by_implementation
def test_vmap_over_starts(implementation):
    arrays = [jnp.asarray(a, jnp.float32) for a in inputs(4)]
    starts = np.stack([marked((BATCH, LENGTH), (k,), (0, 9 - k), ()) for k in range(3)])
    run = program(implementation)
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(None,) * 5 + (0,)))(*arrays, starts)
    for index, one in enumerate(starts):
        for actual, expected in zip(mapped, run(*arrays, one), strict=True):
            np.testing.assert_allclose(actual[index], expected, rtol=1e-5, atol=1e-5)


@by_taps
@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (4, 1, 0, 6), (10, 1)], ids=str)
def test_a_row_in_pieces_equals_one_pass(pieces, taps, x64):
    x, weight, bias, initial, _ = map(jnp.asarray, inputs(taps))
    tail, outputs = initial, []
    for piece in np.split(np.arange(LENGTH), np.cumsum(pieces)[:-1]):
        outputs.append(causal_conv1d(x[:, piece], weight, bias, initial=tail))
        tail = causal_conv1d_tail(x[:, piece], taps, initial=tail)
    whole = causal_conv1d(x, weight, bias, initial=initial)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(tail, causal_conv1d_tail(x, taps, initial=initial))


@by_taps
@pytest.mark.parametrize("given", [True, False])
def test_tail_of_rows_that_end(taps, given):
    x, _, _, initial, _ = (np.asarray(a, np.float32) for a in inputs(taps))
    for lengths in ([LENGTH, 0, 5], [1, 2, LENGTH + 3]):
        tail = causal_conv1d_tail(jnp.asarray(x), taps, jnp.array(lengths), jnp.asarray(initial) if given else None)
        assert tail.shape == initial.shape
        for row, length in enumerate(lengths):
            before = initial[row] if given else np.zeros_like(initial[row])
            known = np.concatenate([before, x[row, :length]])
            np.testing.assert_array_equal(tail[row], known[len(known) - (taps - 1) :])


def test_bad_arguments():
    x, weight, _, initial, _ = (jnp.asarray(a, jnp.float32) for a in inputs(4))
    starts = jnp.zeros((BATCH, LENGTH), bool)
    with pytest.raises(ValueError, match=r"starts has shape \(3, 10\), expected \[b, l\] = \(3, 11\)"):
        causal_conv1d(x, weight, starts=starts[:, 1:])
    with pytest.raises(ValueError, match="starts is int8, expected bool"):
        causal_conv1d(x, weight, starts=starts.astype(jnp.int8))
    with pytest.raises(ValueError, match=r"initial has shape \(3, 2, 5\), expected \[b, K - 1, c\] = \(3, 3, 5\)"):
        causal_conv1d(x, weight, initial=initial[:, 1:])
    with pytest.raises(ValueError, match="initial is bfloat16, expected float32, the dtype of x"):
        causal_conv1d(x, weight, initial=initial.astype(jnp.bfloat16))
    for kernels in ("pallas_triton", "pallas_triton_interpreted"):
        with pytest.raises(ValueError, match=f"implementation='{kernels}' offers no initial: use implementation='xla'"):
            causal_conv1d(x, weight, starts=starts, initial=initial, implementation=kernels)
    with pytest.raises(ValueError, match=r"x has shape \(3, 11\), expected \[b, l, c\]"):
        causal_conv1d_tail(x[..., 0], 4)
    with pytest.raises(ValueError, match="K=0 must be at least 1"):
        causal_conv1d_tail(x, 0)
    with pytest.raises(ValueError, match=r"lengths has shape \(2,\), expected \(3,\)"):
        causal_conv1d_tail(x, 4, jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"initial has shape \(3, 3, 5\), expected \[b, K - 1, c\] = \(3, 1, 5\)"):
        causal_conv1d_tail(x, 2, initial=initial)
