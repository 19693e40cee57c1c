"""Gradients of SSD by Gluon kernels: their PTX, instruction by instruction, against the definition; machine code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")

from kernels.ssd import ssd
from tests.kernels.codegen import for_gpus
from tests.kernels.gluon_ptx import interpreted, resources
from tests.kernels.op_suite import assert_near, ids_of
from tests.kernels.test_ssd_gluon import CASES, TINY, arrays_of, normal

# Of the largest number of a gradient.
LIMITS = {"float32": 3e-5, "tfloat32": 1e-2, "bfloat16": 3e-2}


def gradients(arrays, ids, **options):
    """Gradients of all arrays by a weighted sum of both outputs."""

    def value(arrays):
        y, state = ssd(**arrays, segment_ids=ids, return_final_state=True, **options)
        weights = [normal(name, *a.shape).astype(a.dtype) for name, a in (("dy", y), ("dstate", state))]
        return jnp.sum((y * weights[0]).astype(state.dtype)) + jnp.sum(state * weights[1])

    return jax.grad(value)(arrays)


def check(arrays, products="float32", *, config=None, ids=None, **options):
    """Interprets both passes, and returns what they were."""
    if products == "bfloat16":
        arrays = arrays | {key: arrays[key].astype(jnp.bfloat16) for key in "xBC"}
    ids = None if ids is None else jnp.asarray(ids)
    precision = "highest" if products == "float32" else "default"
    with interpreted(**options) as launches:
        found = gradients(arrays, ids, implementation="gluon", precision=precision, config=config)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), arrays)
        wanted = gradients(wide, ids, implementation="reference")
    for name, gradient in found.items():
        assert gradient.dtype == arrays[name].dtype
        assert_near(gradient, np.asarray(wanted[name]), LIMITS[products], name)
    return launches.seen


USUAL = ("ragged length", "segments of several histories")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive) for name in CASES]
)
def test_gradients(name):
    arrays, options = CASES[name]
    check(arrays, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("products", ["tfloat32", "bfloat16"])
@pytest.mark.parametrize("name", ["ragged length", "several histories", "segments"])
def test_gradients_in_other_precisions(name, products):
    arrays, options = CASES[name]
    check(arrays, products, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [90, 100])
def test_gradients_of_other_gpus(capability):
    check(arrays_of(35, initial=True), "tfloat32", capability=capability)


@pytest.mark.exhaustive
def test_programs_and_warps_in_the_opposite_order():
    """The same bits, too: sums over heads have an order of their own."""
    arrays, options = CASES["segments of several histories"]
    check(arrays, backwards=True, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("steps", ["large", "large beside small"])
def test_steps_that_are_large(steps):
    """The gradient of A is of what passes; nothing of what does not may be rounded into it."""
    arrays = arrays_of(35)
    random = np.random.default_rng(5)
    large = np.full((1, 35, 2), 100.0) if steps == "large" else random.choice([-3.0, 10.0, 100.0], (1, 35, 2))
    arrays |= {"dt": jnp.asarray(large + random.normal(size=large.shape), jnp.float32)}
    check(arrays)
    # Of each number itself: what a position gets from steps that let nothing through is 0, and not what rounding left.
    alone = arrays | {"D": jnp.zeros(2), "dt": jnp.full((1, 35, 2), 300.0)}
    with interpreted():
        found = gradients(alone, None, implementation="gluon", precision="highest")
    assert np.all(np.asarray(found["A"]) == 0.0)


def test_no_history_feels_another():
    """Not by one bit, also where a neighbour's values are huge."""
    arrays, _ = CASES["several histories"]
    ids = jnp.asarray(ids_of(((5, 11, 14, 5),), 35))

    def of(arrays):
        with interpreted():
            return gradients(arrays, ids, implementation="gluon", precision="highest")

    other = {key: arrays[key].at[:, 5:16].multiply(-1e15 if key in "xBC" else -3.0) for key in ("x", "dt", "B", "C")}
    found, changed = of(arrays), of(arrays | other)
    assert not np.array_equal(found["x"][:, 5:16], changed["x"][:, 5:16])
    for name in ("x", "dt", "B", "C"):
        np.testing.assert_array_equal(np.delete(found[name], np.s_[5:16], 1), np.delete(changed[name], np.s_[5:16], 1))
    np.testing.assert_array_equal(found["initial_state"], changed["initial_state"])


def backward_kernel(arrays, *, ids=None, precision="default"):
    """What the default cut makes of a shape."""

    def value(arrays):
        options = {"segment_ids": ids, "precision": precision}
        return ssd(**arrays, implementation="gluon", **options).astype(jnp.float32).sum()

    with interpreted(only_shapes=True) as launches:
        jax.eval_shape(jax.grad(value), arrays)
    return {name: kernel for name, kernel, _ in launches.seen}["ssd_backward"]
