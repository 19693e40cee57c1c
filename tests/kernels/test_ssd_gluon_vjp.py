"""Gradients of SSD by Gluon kernels: their PTX, instruction by instruction, against the definition; machine code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")

from kernels.ssd import ssd
from tests.kernels.codegen import for_gpus
from tests.kernels.gluon_ptx import interpreted, resources
from tests.kernels.op_suite import assert_near, ids_of
from tests.kernels.test_ssd_gluon import CASES, arrays_of, normal

pytestmark = pytest.mark.usefixtures("any_machine")

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
    large = np.full((1, 35, 2), 20.0) if steps == "large" else random.choice([-3.0, 10.0, 100.0], (1, 35, 2))
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


# Shapes, options, most instructions per token and head (of all loops, in 16 positions of a head) and bytes of the stack
# on Hopper, measured and rounded up. A warp has all of a head, or as many columns of it as it says.
CODE = {
    "plain": ({"length": 200, "width": 32, "state": 32}, {}, 125, 160),
    "short": ({"length": 50, "width": 32, "state": 32}, {}, 84, 144),
    "several histories": ({"length": 64, "width": 32, "state": 32}, {"ids": np.ones((1, 64), np.int32)}, 86, 136),
    "wide, 16 columns": ({"length": 200, "width": 128, "state": 64}, {}, 134, 272),
    "float32, 16 columns": ({"length": 200, "width": 32, "state": 32}, {"precision": "highest"}, 148, 96),
    "widest, 16 columns": ({"length": 200, "width": 128, "state": 128}, {}, 230, 1120),
}


@pytest.mark.parametrize(
    ("name", "capability"), [case for name in CODE for case in for_gpus(name, usual=name == "plain")]
)
def test_machine_code(name, capability):
    """Shared memory is for sums over heads alone, which go through it one array at a time."""
    sizes, options, most_instructions, most_stack = CODE[name]
    kernel = backward_kernel(arrays_of(**sizes, heads=4), **options)
    used = resources(kernel, capability)
    constants = dict(kernel.constants)
    assert used.shared_bytes <= 4 * 16 * constants["W"] * constants["STATES"]
    # Other generations' compilers put more on the stack.
    slack = 1.0 if capability == 90 else 1.12
    assert 0 < used.loop_instructions <= 16 * most_instructions * slack
    assert used.stack_bytes <= most_stack * (1.0 if capability == 90 else 1.6)
    assert used.tensor_core_instructions > 0


def test_one_head_alone_needs_no_shared_memory():
    kernel = backward_kernel(arrays_of(20, heads=1, width=16, state=16))
    assert resources(kernel, 90).shared_bytes == 0


def test_warps_of_one_group_are_added_up_in_the_kernel():
    for heads, groups, wanted in [(4, 1, 4), (4, 2, 2), (6, 2, 1), (1, 1, 1)]:
        kernel = backward_kernel(arrays_of(20, heads=heads, groups=groups))
        assert dict(kernel.constants)["JOIN"] == wanted
