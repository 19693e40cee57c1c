"""SSD by Gluon kernels: their PTX, instruction by instruction, against the definition in float64; machine code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")

from kernels.ssd import GluonConfig, ssd
from tests.kernels.codegen import for_gpus
from tests.kernels.gluon_ptx import interpreted, resources
from tests.kernels.op_suite import assert_near, ids_of

# Of the largest number of an array.
LIMITS = {"float32": 2e-5, "tfloat32": 5e-3, "bfloat16": 2e-2}


def normal(name, *shape):
    """The same numbers for a name at every call."""
    return jnp.asarray(np.random.default_rng([*name.encode()]).normal(size=shape).astype(np.float32))


def arrays_of(length, *, batch=1, heads=2, groups=1, width=8, state=5, initial=False):
    arrays = {
        "x": normal("x", batch, length, heads, width),
        "dt": normal("dt", batch, length, heads),
        "A": -jnp.geomspace(1, 16, heads),
        "B": normal("B", batch, length, groups, state),
        "C": normal("C", batch, length, groups, state),
        "D": normal("D", heads),
        "dt_bias": normal("bias", heads),
    }
    return arrays | ({"initial_state": normal("initial", batch, heads, width, state)} if initial else {})


def in_float64(arrays, **options):
    """y and the final state by the definition."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), arrays)
        results = ssd(**arrays, **options, return_final_state=True, implementation="reference")
        return jax.tree.map(np.asarray, results)


def check(arrays, products="float32", *, capability=80, backwards=False, config=None, ids=None):
    """Interprets the forward kernels, and returns what they were."""
    if products == "bfloat16":
        arrays = arrays | {key: arrays[key].astype(jnp.bfloat16) for key in "xBC"}
    precision = "highest" if products == "float32" else "default"
    ids = None if ids is None else jnp.asarray(ids)
    with interpreted(capability=capability, backwards=backwards) as launches:
        y, state = ssd(
            **arrays,
            segment_ids=ids,
            return_final_state=True,
            implementation="gluon",
            precision=precision,
            config=config,
        )
    assert (y.dtype, state.dtype) == (arrays["x"].dtype, jnp.float32)
    wanted, wanted_state = in_float64(arrays, segment_ids=ids)
    assert_near(y, wanted, LIMITS[products], "y")
    assert_near(state, wanted_state, LIMITS[products], "final state")
    return launches.seen


TINY = GluonConfig(warps=2, columns=16)
# Arrays and options; the first ones are run in the usual tier.
CASES = {
    "ragged length": (arrays_of(35), {}),
    "whole chunks and a kept state": (arrays_of(80, width=32, state=32, initial=True), {}),
    "several histories": (arrays_of(35, initial=True), {"ids": ids_of(((5, 11, 14, 5),), 35)}),
    "one position": (arrays_of(1, initial=True), {}),
    "padding": (arrays_of(20, batch=2), {"ids": ids_of(((13,), ()), 20)}),
    "groups": (arrays_of(18, heads=4, groups=2), {"config": dataclasses.replace(TINY, warps=4)}),
    "width in slices": (arrays_of(18, width=40, heads=1, state=24), {"config": dataclasses.replace(TINY, warps=1)}),
    "wide": (arrays_of(20, heads=1, width=128, state=64, initial=True), {}),
    "widest": (arrays_of(20, heads=1, width=24, state=128), {}),
    "segments": (arrays_of(150, initial=True), {"config": dataclasses.replace(TINY, segments=2, block=64)}),
    "segments of several histories": (
        arrays_of(80),
        {"config": dataclasses.replace(TINY, segments=3, block=16), "ids": ids_of(((3, 37, 30),), 80)},
    ),
    "many small programs": (arrays_of(20, batch=3, heads=3), {}),
}
USUAL = ("ragged length", "whole chunks and a kept state", "several histories", "segments of several histories")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive) for name in CASES]
)
def test_values(name):
    arrays, options = CASES[name]
    check(arrays, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("products", ["tfloat32", "bfloat16"])
@pytest.mark.parametrize("name", ["ragged length", "several histories", "wide", "segments"])
def test_values_in_other_precisions(name, products):
    arrays, options = CASES[name]
    check(arrays, products, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("products", LIMITS)
def test_values_of_other_gpus(products, capability):
    check(arrays_of(35, width=32, state=32, initial=True), products, capability=capability)


@pytest.mark.exhaustive
def test_programs_and_warps_in_the_opposite_order():
    arrays, options = CASES["segments of several histories"]
    check(arrays, backwards=True, **options)
