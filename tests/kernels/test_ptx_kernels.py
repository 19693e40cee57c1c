"""The GPU kernels as they are compiled, instruction by instruction, against the definitions in float64."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels.causal_conv1d import causal_conv1d
from kernels.selective_scan import selective_scan
from kernels.softmax_cross_entropy import softmax_cross_entropy
from kernels.ssd import SsdConfig, ssd
from tests.kernels.op_suite import assert_near, ids_of
from tests.kernels.ptx import launch, program
from tests.kernels.ptx.memory import Fault, Memory

# Of the largest number of an array: values, gradients.
LIMITS = {"float32": (2e-5, 1e-4), "tfloat32": (5e-3, 1e-2), "bfloat16": (2e-2, 2e-2)}


def normal(name, *shape, dtype=np.float32):
    """The same numbers for a name at every call."""
    return np.random.default_rng([*name.encode()]).normal(size=shape).astype(dtype)


def value_and_gradients(operator, options, arrays, weights):
    value, pull = jax.vjp(lambda arrays: operator(**arrays, **options), arrays)
    return {"value": value, "gradient": pull(weights)[0]}


def in_float64(operator, options, arrays, weights):
    """The definition, on the same numbers."""
    with jax.enable_x64(True):
        arrays, weights = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (arrays, weights))
        return jax.tree.map(np.asarray, value_and_gradients(operator, options, arrays, weights))


def check(operator, arrays, *, kernel_options, products="float32", capability=80, backwards=False, **options):
    """Interprets the kernels of a value and its gradients; `kernel_options` do not change what is computed."""
    kernels = options | kernel_options | {"implementation": "pallas_triton", "interpret": False}
    shapes = jax.eval_shape(lambda arrays: operator(**arrays, **options, implementation="reference"), arrays)
    weights = jax.tree.map(lambda a: jnp.asarray(normal("weights", *a.shape), a.dtype), shapes)
    run = functools.partial(value_and_gradients, operator, kernels)
    actual = launch.interpret(run, arrays, weights, capability=capability, backwards=backwards)
    expected = in_float64(operator, options | {"implementation": "reference"}, arrays, weights)
    pairs = zip(*(jax.tree.leaves_with_path(tree) for tree in (actual, expected)), strict=True)
    for (path, got), (_, wanted) in pairs:
        assert_near(got, wanted, LIMITS[products]["gradient" in str(path[0])], jax.tree_util.keystr(path))


# State space duality.

PLAIN = SsdConfig(chunk_size=16, segments=1, heads_per_program=1, width_splits=1, forward_warps=1, backward_warps=1)


def ssd_arrays(length, *, batch=1, heads=2, groups=1, width=8, state=5, initial=False, dtype=np.float32):
    arrays = {
        "x": normal("x", batch, length, heads, width).astype(dtype),
        "dt": normal("dt", batch, length, heads),
        "A": -np.geomspace(1, 16, heads).astype(np.float32),
        "B": normal("B", batch, length, groups, state).astype(dtype),
        "C": normal("C", batch, length, groups, state).astype(dtype),
        "D": normal("D", heads),
        "dt_bias": normal("bias", heads),
    }
    if initial:
        arrays["initial_state"] = normal("initial", batch, heads, width, state)
    return {name: jnp.asarray(a) for name, a in arrays.items()}


# Arrays, what else is computed with, how the work is cut up (None: as it is by default).
SSD = {
    "cut by default": (ssd_arrays(100), {}, None),
    "plain": (ssd_arrays(20), {}, {}),
    "states": (ssd_arrays(20, initial=True), {"return_final_state": True}, {}),
    "ragged": (ssd_arrays(20, batch=2), {"segment_ids": jnp.asarray(ids_of(((13,), ()), 20))}, {}),
    "several histories": (ssd_arrays(35), {"segment_ids": jnp.asarray(ids_of(((5, 11, 14, 5),), 35))}, {}),
    "several histories and states": (
        ssd_arrays(20, initial=True),
        {"segment_ids": jnp.asarray(ids_of(((7, 2, 11),), 20)), "return_final_state": True},
        {},
    ),
    "segments": (ssd_arrays(40, initial=True), {"return_final_state": True}, {"segments": 3}),
    "segments of several histories": (
        ssd_arrays(40),
        {"segment_ids": jnp.asarray(ids_of(((3, 17, 20),), 40))},
        {"segments": 2},
    ),
    "more warps": (ssd_arrays(20), {}, {"forward_warps": 4, "backward_warps": 4}),
    "pipelined loads": (ssd_arrays(40), {}, {"num_stages": 3}),
    "wide heads": (ssd_arrays(20, heads=1, width=64, state=64), {}, {"forward_warps": 4, "backward_warps": 4}),
    "heads of two groups": (ssd_arrays(18, heads=4, groups=2), {}, {"heads_per_program": 2}),
    "width in splits": (ssd_arrays(18, width=24, heads=1), {}, {"width_splits": 2, "chunk_size": 32}),
}


# The first of several heads loads sums that nobody wrote and selects them away, which is harmless: a load that is
# masked for it instead spills 32 to 48 more bytes per thread on sm_90.
UNWRITTEN = pytest.mark.xfail(
    raises=Fault, strict=True, reason="the gradients of B and C are read before anybody wrote them"
)


def check_ssd(name, products, **options):
    arrays, given, cut = SSD[name]
    if products == "bfloat16":
        arrays = arrays | {key: arrays[key].astype(jnp.bfloat16) for key in "xBC"}
    kernel_options = {"config": None if cut is None else dataclasses.replace(PLAIN, **cut)}
    kernel_options["precision"] = "highest" if products == "float32" else "default"
    check(ssd, arrays, kernel_options=kernel_options, products=products, **given, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=UNWRITTEN if name == "heads of two groups" else ()) for name in SSD]
)
def test_ssd(name):
    check_ssd(name, "float32")


@pytest.mark.exhaustive
@pytest.mark.parametrize("products", ["tfloat32", "bfloat16"])
@pytest.mark.parametrize("name", ["states", "several histories"])
def test_ssd_in_other_precisions(name, products):
    check_ssd(name, products)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["states", "more warps", "wide heads"])
@pytest.mark.parametrize("products", LIMITS)
def test_ssd_for_hopper(name, products):
    check_ssd(name, products, capability=90)


@pytest.mark.exhaustive
@pytest.mark.parametrize("products", ["tfloat32", "bfloat16"])
def test_ssd_for_blackwell(products):
    """One warp alone has no products that its new tensor cores make."""
    check_ssd("states", products, capability=100)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["more warps", "segments"])
def test_ssd_with_warps_and_programs_in_the_opposite_order(name):
    check_ssd(name, "float32", backwards=True)


# Causal convolution, selective scan, cross-entropy.


# Shape, taps, dtype, what else is computed with.
CONVOLUTIONS = {
    "silu": ((2, 20, 40), 4, "float32", {"activation": "silu"}),
    "several histories": (
        (1, 20, 7),
        3,
        "float32",
        {"activation": "hard_swish", "segment_ids": jnp.asarray(ids_of(((5, 8, 7),), 20))},
    ),
    "bfloat16": ((1, 9, 40), 4, "bfloat16", {"activation": "none"}),
    "most taps": ((1, 40, 33), 8, "float32", {"activation": "silu"}),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_causal_conv1d(name, capability):
    shape, taps, dtype, options = CONVOLUTIONS[name]
    arrays = {"x": normal("x", *shape), "weight": normal("weight", taps, shape[2]), "bias": normal("bias", shape[2])}
    arrays = {name: jnp.asarray(a) for name, a in arrays.items()}
    arrays["x"] = arrays["x"].astype(dtype)
    check(causal_conv1d, arrays, kernel_options={}, products=dtype, capability=capability, **options)


def scan_arrays(length, width, state):
    shapes = {"x": (1, length, width), "dt": (1, length, width), "A": (width, state)}
    shapes |= {"B": (1, length, state), "C": (1, length, state), "D": (width,), "dt_bias": (width,)}
    arrays = {name: jnp.asarray(normal(name, *shape)) for name, shape in shapes.items()}
    return arrays | {"A": -jnp.exp(arrays["A"])}


# Shape l, e, n, whether there are states at both ends, dtype, what else is computed with.
SCANS = {
    "states": ((20, 8, 16), True, "float32", {}),
    "odd sizes": ((13, 5, 3), False, "float32", {}),
    "several histories": ((20, 8, 5), True, "float32", {"segment_ids": jnp.asarray(ids_of(((3, 13, 4),), 20))}),
    "ragged": ((13, 5, 3), False, "float32", {"segment_ids": jnp.asarray(ids_of(((9,),), 13))}),
    "bfloat16": ((20, 8, 16), False, "bfloat16", {}),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SCANS)
def test_selective_scan(name, capability):
    shape, states, dtype, options = SCANS[name]
    arrays = scan_arrays(*shape)
    arrays |= {name: arrays[name].astype(dtype) for name in ("x", "dt", "B", "C")}
    if states:
        arrays["initial_state"] = jnp.asarray(normal("initial", 1, *shape[1:]))
    options = options | {"return_final_state": states}
    check(selective_scan, arrays, kernel_options={}, products=dtype, capability=capability, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("width", "products", "masked", "backwards"),
    [
        (20, "float32", False, False),
        (20, "float32", True, True),
        (20, "tfloat32", True, False),
        (20, "bfloat16", False, False),
        (256, "bfloat16", True, False),
    ],
)
@pytest.mark.parametrize("capability", [80, 90])
def test_softmax_cross_entropy(width, products, masked, backwards, capability):
    arrays = {"hidden": jnp.asarray(normal("hidden", 20, width)), "embedding": jnp.asarray(normal("items", 70, width))}
    if products == "bfloat16":
        arrays = {name: a.astype(jnp.bfloat16) for name, a in arrays.items()}
    options = {"targets": jnp.arange(20) * 3, "masked": jnp.arange(70) % 9 == 4 if masked else None}
    kernel_options = {"precision": "highest" if products == "float32" else "default"}
    order = {"capability": capability, "backwards": backwards}
    check(softmax_cross_entropy, arrays, kernel_options=kernel_options, products=products, **order, **options)


# What a function may do with its kernels.


def first_half(x):
    """A kernel that leaves the rest of its output as it was."""

    def kernel(x_ref, y_ref):
        y_ref[:16] = x_ref[:16]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    options = pltriton.CompilerParams(num_warps=1, num_stages=1)
    return pl.pallas_call(kernel, out_shape=shape, compiler_params=options, name="first_half")(x)


def test_an_output_that_is_only_half_there():
    x = jnp.arange(32.0)
    with pytest.raises(Fault, match=r"first_half never wrote byte 64 of an output \(32,\)"):
        launch.interpret(lambda x: first_half(x) + 1, x)
    with pytest.raises(Fault, match="first_half never wrote byte 64"):
        launch.interpret(first_half, x)
    # A kernel may have it and read what is there.
    with pytest.raises(Fault, match="first_half never wrote byte 64"):
        launch.interpret(lambda x: first_half(first_half(x)), x)


def test_kernels_in_loops_are_refused():
    with pytest.raises(ValueError, match="a kernel inside scan: not interpreted"):
        launch.interpret(lambda x: jax.lax.map(first_half, x), jnp.zeros((2, 32)))


# Faults planted in a kernel's text.


class Recorded:
    """A launch that can be repeated with other text."""

    def __init__(self, text, memories, options):
        self.lines, self.options = text.split("\n"), options
        self.memories = [(memory.name, memory.bytes.copy(), memory.written.copy()) for memory in memories]

    def find(self, pattern):
        """Numbers of the lines that begin so."""
        return [number for number, line in enumerate(self.lines) if re.match(rf"\s*{pattern}", line)]

    def run(self, number=None, line=""):
        """Runs it, with another line in one place; returns what the memories hold then."""
        lines = list(self.lines)
        if number is not None:
            lines[number] = line
        fresh = [Memory(name, array) for name, array, _ in self.memories]
        for memory, (_, _, written) in zip(fresh, self.memories, strict=True):
            memory.written[:] = written
        program.run("\n".join(lines), fresh, **self.options)
        return [memory.bytes for memory in fresh]


def recorded(monkeypatch, function, *arguments, **options):
    """The launches of a function's kernels."""
    calls = []

    def record(text, memories, **given):
        calls.append(Recorded(text, memories, given))
        program.run(text, memories, **given)

    monkeypatch.setattr(launch, "run", record)
    launch.interpret(function, *arguments, **options)
    return calls


@pytest.fixture
def ssd_forward(monkeypatch):
    options = {
        "config": PLAIN,
        "precision": "default",
        "implementation": "pallas_triton",
        "interpret": False,
        "return_final_state": True,
    }
    (call,) = recorded(monkeypatch, lambda arrays: ssd(**arrays, **options), ssd_arrays(20, initial=True))
    return call


@pytest.mark.exhaustive
def test_every_missing_barrier_is_found(ssd_forward):
    """But for the one between a warp's reads and its writes of the same places by the same lanes."""
    expected = ssd_forward.run()
    barriers = ssd_forward.find(r"bar\.(warp\.)?sync")
    assert len(barriers) > 20
    missed = 0
    for number in barriers:
        try:
            actual = ssd_forward.run(number)
        except Fault as fault:
            assert "race" in str(fault) or "nobody wrote" in str(fault)
        else:
            missed += 1
            for a, b in zip(actual, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    assert missed <= 1


@pytest.mark.exhaustive
def test_every_missing_mask_is_found(ssd_forward):
    masked = ssd_forward.find(r"@!?%p\d+ (ld|st)\.global")
    assert len(masked) > 20
    for number in masked:
        with pytest.raises(Fault, match=r"(reads|writes) \d+ bytes at byte -?\d+ of (in|out)put|race"):
            ssd_forward.run(number, re.sub(r"@!?%p\d+ ", "", ssd_forward.lines[number]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"bar\.sync", "race|nobody wrote|no fence"),
        (r"fence\.proxy\.async", "reads shared memory by tensor cores with no fence.proxy.async"),
        (r"wgmma\.(commit|wait)_group", "which nobody wrote|products of tensor cores or copies were never waited for"),
    ],
)
def test_what_is_missing_around_products_of_four_warps_is_found(pattern, message, monkeypatch):
    arrays = {"hidden": jnp.asarray(normal("hidden", 20, 20)), "embedding": jnp.asarray(normal("items", 70, 20))}
    options = {
        "targets": jnp.arange(20) * 3,
        "precision": "default",
        "implementation": "pallas_triton",
        "interpret": False,
    }
    (call,) = recorded(monkeypatch, lambda arrays: softmax_cross_entropy(**arrays, **options), arrays, capability=90)
    found = call.find(pattern)
    assert found
    for number in found:
        with pytest.raises(Fault, match=message):
            call.run(number)
