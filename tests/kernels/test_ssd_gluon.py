"""SSD by Gluon kernels: their PTX, instruction by instruction, against the definition in float64; machine code."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")

from kernels.ssd import GluonConfig, SsdConfig, ssd
from tests.kernels.codegen import for_gpus, some_gpu
from tests.kernels.gluon_ptx import interpreted, resources
from tests.kernels.op_suite import assert_near, ids_of

pytestmark = pytest.mark.usefixtures("any_machine")

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
    "rows that begin anywhere": (arrays_of(20, width=7, state=11, initial=True), {}),
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


def forward_kernels(arrays, *, keep=False, config=None, ids=None, precision="default"):
    """The kernels of the outputs, with `keep` those that keep states for the gradient."""

    def value(x):
        options = {"segment_ids": ids, "precision": precision, "config": config}
        return ssd(**arrays | {"x": x}, implementation="gluon", **options)

    with interpreted(only_shapes=True) as launches:
        jax.eval_shape(functools.partial(jax.vjp, value) if keep else value, arrays["x"])
    return launches.seen


def test_no_history_feels_another():
    """Not by one bit, also where a neighbour's values are huge."""
    arrays, _ = CASES["several histories"]
    ids = ids_of(((5, 11, 14, 5),), 35)

    def outputs(arrays):
        with interpreted():
            y, state = ssd(
                **arrays,
                segment_ids=jnp.asarray(ids),
                return_final_state=True,
                implementation="gluon",
                precision="highest",
            )
        return np.array(y), np.array(state)

    other = {key: arrays[key].at[:, 5:16].multiply(-1e30 if key in "xBC" else -3.0) for key in ("x", "dt", "B", "C")}
    y, state = outputs(arrays)
    other_y, other_state = outputs(arrays | other)
    assert not np.array_equal(y[:, 5:16], other_y[:, 5:16])
    np.testing.assert_array_equal(np.delete(y, np.s_[5:16], 1), np.delete(other_y, np.s_[5:16], 1))
    np.testing.assert_array_equal(state, other_state)


# Shapes, options, most instructions per token and head (in 16 positions of a head's loop) and registers, measured and
# rounded up. A warp has all of a head, or as many columns of it as it says.
CODE = {
    "plain": ({"length": 200, "width": 32, "state": 32}, {}, 28, 160),
    "for the gradient": ({"length": 200, "width": 32, "state": 32}, {"keep": True}, 33, 176),
    "several histories": ({"length": 64, "width": 32, "state": 32}, {"ids": np.ones((1, 64), np.int32)}, 33, 160),
    "wide": ({"length": 200, "width": 128, "state": 64}, {"keep": True}, 46, 232),
    "float32": ({"length": 200, "width": 32, "state": 32}, {"precision": "highest"}, 55, 200),
    "widest": ({"length": 200, "width": 128, "state": 128}, {"keep": True}, 60, 255),
}


@pytest.mark.parametrize(
    ("name", "capability"), [case for name in CODE for case in for_gpus(name, usual=name == "plain")]
)
def test_machine_code(name, capability):
    """No shared memory, next to no stack, and few instructions."""
    sizes, options, most_instructions, most_registers = CODE[name]
    ((_, kernel, _),) = forward_kernels(arrays_of(**sizes, heads=4), **options)
    used = resources(kernel, capability)
    assert used.shared_bytes == 0
    assert 0 < used.loop_instructions <= 16 * most_instructions
    # For 8.0 the compiler takes all registers that it may have, and 8 bytes more.
    older = capability == 80
    assert used.registers <= (255 if older else most_registers)
    assert used.stack_bytes <= 8 * older
    assert used.tensor_core_instructions > 0


def test_states_are_kept_only_where_they_are_wanted():
    for length, keep, wanted in [(64, True, False), (65, True, True), (65, False, False)]:
        ((_, kernel, _),) = forward_kernels(arrays_of(length), keep=keep)
        assert dict(kernel.constants)["KEEP"] is wanted


def test_lowers_for_a_gpu():
    """What jax-triton makes of the call, also of several at once and of rows over the devices of a mesh."""
    pytest.importorskip("jax_triton", reason="jax-triton is for Python 3.12 and newer")
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernel"):
        pytest.skip("JAX's plugin for CUDA is not installed")

    def lowered(function, arrays):
        return jax.jit(function).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()

    arrays = arrays_of(20)
    run = functools.partial(ssd, implementation="gluon")
    with some_gpu():
        one = lowered(lambda arrays: run(**arrays), arrays)
        both = jax.tree.map(lambda a: jnp.stack([a, a]), arrays)
        batched = (
            jax.jit(jax.vmap(lambda arrays: run(**arrays))).trace(both).lower(lowering_platforms=("cuda",)).as_text()
        )
    assert one.count("@triton_kernel_call") == 1 and "while" not in one
    assert batched.count("@triton_kernel_call") == 1 and "while" in batched
    rows = PartitionSpec("rows")
    specs = {name: rows if name in ("x", "dt", "B", "C") else PartitionSpec() for name in arrays}
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    sharded = jax.shard_map(lambda arrays: run(**arrays), mesh=mesh, in_specs=(specs,), out_specs=rows)
    assert "ssd_forward" in str(jax.make_jaxpr(sharded)(arrays))


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is not None, reason="jax-triton is here")
def test_without_jax_triton_it_says_so():
    with pytest.raises(ValueError, match="are called by the package jax-triton, for Python 3.12 or newer"):
        ssd(**arrays_of(20), implementation="gluon")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": 24}, "columns=24 must be 16, 32 or 64"),
        ({"warps": 4}, "warps=4 must be 1, 2, 4 or 8 and divide the 2 warps of a row"),
        ({"segments": 0}, "segments=0 must be at least 1"),
        ({"block": 24}, "block=24 must be a multiple of 16"),
        ({"forward_registers": 300}, "forward_registers=300 must be from 24 to 255, or None"),
    ],
)
def test_a_bad_division_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        ssd(**arrays_of(20), implementation="gluon", config=dataclasses.replace(TINY, **changed))


def test_what_the_kernels_do_not_offer_is_refused():
    arrays = arrays_of(4)
    with pytest.raises(ValueError, match="x is float16; the Gluon kernels take float32 or bfloat16"):
        ssd(**arrays | {"x": arrays["x"].astype(jnp.float16)}, implementation="gluon")
    with pytest.raises(ValueError, match="p=136 is over the 128 of the Gluon kernels"):
        ssd(**arrays_of(4, width=136), implementation="gluon")
    with pytest.raises(ValueError, match="the Gluon kernels take a GluonConfig, or None"):
        ssd(**arrays, implementation="gluon", config=SsdConfig(16, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="implementation='gluon' of ssd takes no interpret"):
        ssd(**arrays, implementation="gluon", interpret=True)
