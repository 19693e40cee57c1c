"""The SSD operator where steps are large, or large beside small: as near to float64 as the walk step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.ssd import SsdConfig, dense_mask, ssd
from tests.kernels.packed import alone, marked
from tests.kernels.ssd_cases import BATCH, HEADS, Case, assert_near, cotangents, inputs, sequential

WHOLE = SsdConfig(chunk_size=32, segments=1, heads_per_program=1, width_splits=1, forward_warps=2, backward_warps=2)
PARTS = SsdConfig(chunk_size=16, segments=3, heads_per_program=1, width_splits=1, forward_warps=2, backward_warps=2)
FORMS = {
    "reference": {"implementation": "reference"},
    "xla, chunks of 64": {"implementation": "xla", "chunk_size": 64},
    "xla, chunks of 7": {"implementation": "xla", "chunk_size": 7},
    "kernels": {"implementation": "pallas_triton_interpreted", "config": WHOLE},
    "kernels in segments": {"implementation": "pallas_triton_interpreted", "config": PARTS},
}
# The largest error of the float32 reference over all of these cases is 6e-6 of an array's largest magnitude.
TOLERANCE = 1e-5
# Standard deviations of the raw steps, or "mixed"; decay rates are up to the second number.
STEPS = [(1.0, 16.0), (10.0, 16.0), (100.0, 50.0), (1e4, 50.0), ("mixed", 1.0), ("mixed", 50.0), ("mixed", 1e4)]
SHAPES = [
    Case(1, 1, initial=True),
    Case(31, 2, lengths=(31, 0, 17)),
    Case(32, None, initial=True),
    Case(50, 4, initial=True),
    Case(200, None, lengths=(200, 1, 64), initial=True),
]
STARTS = {50: ((13, 14, 40), (0, 25, 49), ())}

by_form = pytest.mark.parametrize("form", FORMS)
by_steps = pytest.mark.parametrize(("steps", "rate"), STEPS)


@functools.cache
def arrays_of(case, steps, rate):
    """Float64 arrays of float32 numbers; mixed steps are small ones with 10, 100 and 10,000 strewn in."""
    rng = np.random.default_rng(7)
    arrays = dict(inputs(case))
    shape = arrays["dt"].shape
    if steps == "mixed":
        large = rng.choice([0, 10, 100, 1e4], p=[0.85, 0.05, 0.05, 0.05], size=shape)
        arrays["dt"] = np.where(large, large, rng.normal(size=shape) - 3)
    else:
        arrays["dt"] = steps * rng.normal(size=shape)
    arrays["A"] = -np.geomspace(rate / 16, rate, HEADS)
    return {name: a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}


@functools.cache
def truth(case, steps, rate):
    arrays, weights = arrays_of(case, steps, rate), cotangents(case)
    if case.length in STARTS:
        return alone(sequential, arrays, marked((BATCH, case.length), *STARTS[case.length]), case.lengths, *weights)
    return sequential(arrays, case.lengths, *weights)


@functools.cache
def program(form):
    @jax.jit
    def run(arrays, lengths, starts, dy, dstate):
        def apply(arrays):
            return ssd(**arrays, lengths=lengths, starts=starts, return_final_state=True, **FORMS[form])

        (y, state), pull = jax.vjp(apply, arrays)
        return y, state, pull((dy.astype(y.dtype), dstate))[0]

    return run


def run(case, steps, rate, form, dtype="float32"):
    arrays = {
        name: jnp.asarray(a, dtype if name in ("x", "dt", "B", "C") else "float32")
        for name, a in arrays_of(case, steps, rate).items()
    }
    dy, dstate = (jnp.asarray(weight, jnp.float32) for weight in cotangents(case))
    starts = marked((BATCH, case.length), *STARTS[case.length]) if case.length in STARTS else None
    lengths = None if case.lengths is None else jnp.array(case.lengths)
    return program(form)(arrays, lengths, starts, dy, dstate)


def compare(actual, expected, tolerance):
    assert_near(actual[0], expected[0], tolerance, "y")
    assert_near(actual[1], expected[1], tolerance, "final state")
    assert set(actual[2]) == set(expected[2])
    for name, gradient in actual[2].items():
        assert_near(gradient, expected[2][name], tolerance, f"gradient by {name}")


@by_form
@by_steps
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_float64(case, steps, rate, form):
    compare(run(case, steps, rate, form), truth(case, steps, rate), TOLERANCE)


@pytest.mark.parametrize("form", ["reference", "xla, chunks of 64", "kernels"])
@by_steps
def test_bfloat16_values_and_gradients_are_within_its_rounding(steps, rate, form):
    case = SHAPES[3]
    arrays = {
        name: np.asarray(jnp.asarray(a, jnp.bfloat16 if name in ("x", "dt", "B", "C") else jnp.float32), np.float64)
        for name, a in arrays_of(case, steps, rate).items()
    }
    weights = [np.asarray(jnp.asarray(w, jnp.float32), np.float64) for w in cotangents(case)]
    expected = alone(sequential, arrays, marked((BATCH, case.length), *STARTS[case.length]), None, *weights)
    compare(run(case, steps, rate, form, jnp.bfloat16), expected, 3e-2)


def test_the_dense_mask_keeps_small_steps_beside_large_ones(x64):
    dt = np.full((1, 40, 1), 0.5)
    dt[0, 5] = 1e6
    small = dense_mask(jnp.asarray(dt, jnp.float32), jnp.array([-1.0], jnp.float32))
    wide = dense_mask(jnp.asarray(dt, jnp.float64), jnp.array([-1.0], jnp.float64))
    np.testing.assert_allclose(small, wide, rtol=2e-5, atol=0)
