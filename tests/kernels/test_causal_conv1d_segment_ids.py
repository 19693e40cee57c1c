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
from tests.kernels.op_suite import BAD_IDS, histories, ids_of
from tests.kernels.test_causal_conv1d import assert_near
from tests.kernels.walks import convolution

BATCH, LENGTH, CHANNELS = 3, 11, 5
# Outputs and gradients, as shares of the largest magnitude.
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}
HISTORIES = {
    "none": [(LENGTH,)] * BATCH,
    "some": [(3, 1, 5, 2), (10, 1), (1, 1, 9)],
    "everywhere": [(1,) * LENGTH] * BATCH,
}

KERNELS = "pallas_triton"
MOSAIC = "pallas_mosaic"
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
# The forms that take no initial.
NO_INITIAL = {*CUTS, MOSAIC}

by_plain = pytest.mark.parametrize("implementation", PLAIN)
# The interpreter of Mosaic GPU kernels is slow.
SLOW = pytest.param(MOSAIC, marks=pytest.mark.exhaustive)
by_implementation = pytest.mark.parametrize("implementation", [*PLAIN, *CUTS, SLOW])
by_taps = pytest.mark.parametrize("taps", [1, 2, 4, 8])


@functools.cache
def inputs(taps, implementation="xla"):
    """x, weight, bias, initial and dy in float64 with float32 values; kernels have zeros as initial."""
    rng = np.random.default_rng(taps)
    of_x = (BATCH, LENGTH, CHANNELS)
    shapes = of_x, (taps, CHANNELS), (CHANNELS,), (BATCH, taps - 1, CHANNELS), of_x
    arrays = [rng.normal(size=shape).astype(np.float32).astype(np.float64) for shape in shapes]
    if implementation in NO_INITIAL:
        arrays[3] = np.zeros_like(arrays[3])
    return arrays


@functools.cache
def program(implementation):
    """Jitted (x, weight, bias, initial or None, dy, ids) -> y and the gradient by all but ids.

    An implementation is a plain one, or a cut of the kernels, which take no initial.
    """

    @jax.jit
    def run(x, weight, bias, initial, dy, ids):
        options = {"activation": "silu", "implementation": implementation}
        if implementation in CUTS:
            options |= {"implementation": KERNELS, "config": CUTS[implementation]}

        def apply(x, weight, bias, initial):
            return causal_conv1d(x, weight, bias, segment_ids=ids, initial=initial, **options)

        y, pull = jax.vjp(apply, x, weight, bias, None if implementation in NO_INITIAL else initial)
        return [a for a in (y, *pull(dy)) if a is not None]

    return run


def alone(x, weight, bias, initial, dy, ids):
    """y and gradients where each history is convolved by itself, in float64."""
    before = weight.shape[0] - 1
    results = [np.zeros(a.shape) for a in (x, x, weight, bias, initial)]
    for row, first, after, _, follows in histories(ids):
        rows, part = slice(row, row + 1), slice(first, after)
        # What comes before is given as zeros, or as more of x; its outputs are nobody's.
        earlier = initial[rows] if follows else np.zeros_like(initial[rows])
        given, weights = np.concatenate([earlier, x[rows, part]], 1), np.concatenate([0 * earlier, dy[rows, part]], 1)
        y, dx, dweight, dbias = convolution("silu", given, weight, bias, weights)
        results[0][rows, part], results[1][rows, part] = y[:, before:], dx[:, before:]
        results[2] += dweight
        results[3] += dbias
        results[4][rows] += dx[:, :before] * follows
    return results


@functools.cache
def truth(taps, name, implementation):
    return alone(*inputs(taps, implementation), ids_of(HISTORIES[name], LENGTH))


def check(implementation, taps, name, dtype):
    given = [jnp.asarray(a, dtype) for a in inputs(taps, implementation)]
    actual = program(implementation)(*given, ids_of(HISTORIES[name], LENGTH))
    assert {a.dtype for a in actual} == {jnp.dtype(dtype)}
    # With one tap nothing comes from before, and kernels take nothing from there.
    kept = slice(5 if taps > 1 and implementation in PLAIN else 4)
    assert_near(actual[kept], truth(taps, name, implementation)[kept], TOLERANCES[dtype])


def test_the_suite_knows_every_implementation():
    assert {*PLAIN, KERNELS, MOSAIC} == set(IMPLEMENTATIONS)


@by_taps
@pytest.mark.parametrize("name", HISTORIES)
@by_plain
def test_each_history_alone_in_float64(implementation, name, taps, x64):
    check(implementation, taps, name, "float64")


@pytest.mark.parametrize("name", HISTORIES)
@by_implementation
def test_each_history_alone_in_float32(implementation, name):
    check(implementation, 4, name, "float32")


@pytest.mark.parametrize("taps", [1, 2, 8])
@pytest.mark.parametrize("implementation", ["segments", SLOW])
def test_kernels_with_other_numbers_of_taps(implementation, taps):
    check(implementation, taps, "some", "float32")


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(bits=st.lists(st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH))
def test_any_histories_as_by_the_definition(bits):
    ids = 1 + np.cumsum(np.array(bits).reshape(BATCH, LENGTH), axis=1, dtype=np.int32)
    with jax.enable_x64(True):
        actual, expected = (program(name)(*inputs(4), ids) for name in ("xla", "reference"))
    assert_near(actual, [np.asarray(a) for a in expected], TOLERANCES["float64"])


@pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
@by_implementation
def test_no_history_feels_another(implementation, value):
    """Not by one bit, whatever the other holds."""
    x, weight, bias, initial, dy = (jnp.asarray(a, jnp.float32) for a in inputs(4, implementation))
    ids = ids_of([(3, 4, 4)] * BATCH, LENGTH)
    run = program(implementation)
    y, dx, _, _, *d_initial = run(x, weight, bias, initial, dy, ids)
    changed = run(x.at[:, 3:7].set(value), weight, bias, initial, dy, ids)
    for a, b in ((changed[0], y), (changed[1], dx)):
        np.testing.assert_array_equal(a[:, :3], b[:, :3])
        np.testing.assert_array_equal(a[:, 7:], b[:, 7:])
        assert (a[:, 3:7] != b[:, 3:7]).any()
    other = run(x, weight, bias, initial, dy.at[:, 3:7].set(value), ids)[1]
    for part in (slice(3), slice(7, LENGTH)):
        np.testing.assert_array_equal(other[:, part], dx[:, part])
    np.testing.assert_array_equal(changed[4:], d_initial)


@by_implementation
def test_bfloat16_stays_bfloat16(implementation):
    x, weight, bias, initial, dy = (jnp.asarray(a, jnp.bfloat16) for a in inputs(4, implementation))
    ids = ids_of(HISTORIES["some"], LENGTH)
    actual = program(implementation)(x, weight, bias, initial, dy, ids)
    assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
    wide = [np.asarray(a, np.float64) for a in (x, weight, bias, initial, dy)]
    assert_near(actual[:2], alone(*wide, ids)[:2], (2e-2, 2e-2))


@by_implementation
def test_vmap_over_segment_ids(implementation):
    arrays = [jnp.asarray(a, jnp.float32) for a in inputs(4)]
    ids = np.stack([ids_of([(k, 11 - k), (9 - k, 2 + k), (11,)], LENGTH) for k in (1, 2, 3)])
    run = program(implementation)
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(None,) * 5 + (0,)))(*arrays, ids)
    for index, one in enumerate(ids):
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
    for lengths in ([LENGTH, 0, 5], [1, 2, LENGTH]):
        tail = causal_conv1d_tail(
            jnp.asarray(x), taps, ids_of([(n,) for n in lengths], LENGTH), jnp.asarray(initial) if given else None
        )
        assert tail.shape == initial.shape
        for row, length in enumerate(lengths):
            before = initial[row] if given else np.zeros_like(initial[row])
            known = np.concatenate([before, x[row, :length]])
            np.testing.assert_array_equal(tail[row], known[len(known) - (taps - 1) :])


def test_bad_arguments():
    x, weight, _, initial, _ = (jnp.asarray(a, jnp.float32) for a in inputs(4))
    for ids, message in BAD_IDS:
        for run in (causal_conv1d, lambda x, weight, segment_ids: causal_conv1d_tail(x, 4, segment_ids)):
            with pytest.raises(ValueError, match=message):
                run(x[:, :6], weight, segment_ids=ids)
    with pytest.raises(ValueError, match=r"initial has shape \(3, 2, 5\), expected \[b, K - 1, c\] = \(3, 3, 5\)"):
        causal_conv1d(x, weight, initial=initial[:, 1:])
    with pytest.raises(ValueError, match="initial is bfloat16, expected float32, the dtype of x"):
        causal_conv1d(x, weight, initial=initial.astype(jnp.bfloat16))
    for name in (KERNELS, MOSAIC):
        with pytest.raises(ValueError, match=f"implementation='{name}' offers no initial: use implementation='xla'"):
            causal_conv1d(x, weight, initial=initial, implementation=name)
    with pytest.raises(ValueError, match=r"x has shape \(3, 11\), expected \[b, l, c\]"):
        causal_conv1d_tail(x[..., 0], 4)
    with pytest.raises(ValueError, match="K=0 must be at least 1"):
        causal_conv1d_tail(x, 0)
    with pytest.raises(ValueError, match=r"initial has shape \(3, 3, 5\), expected \[b, K - 1, c\] = \(3, 1, 5\)"):
        causal_conv1d_tail(x, 2, initial=initial)


def test_the_tail_is_of_the_last_history():
    x, _, _, initial, _ = (jnp.asarray(a, jnp.float32) for a in inputs(4))
    tail = causal_conv1d_tail(x, 4, ids_of([(9, 2), (2, 1), (2,)], LENGTH), initial)
    for row, (first, after) in enumerate([(9, 11), (2, 3)]):
        assert not tail[row, : 3 - (after - first)].any()
        np.testing.assert_array_equal(tail[row, 3 - (after - first) :], x[row, first:after])
    np.testing.assert_array_equal(tail[2], jnp.concatenate([initial[2, 2:], x[2, :2]]))
