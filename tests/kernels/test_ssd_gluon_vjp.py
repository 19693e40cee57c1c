"""Gradients of SSD by Gluon kernels: their PTX, instruction by instruction, against the definition; machine code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")

from kernels.ssd import ssd
from kernels.ssd.config import GluonConfig, default_gluon_config
from kernels.ssd.gluon_tiles import GluonParams
from kernels.ssd.gluon_vjp import narrowed, that_fits
from kernels.ssd.gluon_vjp_shared import check_shared_memory, shared_bytes
from tests.kernels.codegen import for_gpus
from tests.kernels.gluon_ptx import interpreted, resources
from tests.kernels.op_suite import assert_near, ids_of
from tests.kernels.ptx.warp import Warp
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
    """The same bits: sums over heads have an order of their own."""
    arrays, options = CASES["segments of several histories"]
    ids = jnp.asarray(options["ids"])

    def bits(backwards):
        with interpreted(backwards=backwards):
            found = gradients(arrays, ids, implementation="gluon", precision="highest", config=options.get("config"))
        return {name: np.asarray(gradient).tobytes() for name, gradient in found.items()}

    assert bits(False) == bits(True)
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


def check_no_history_feels_another(arrays, sizes, precision, **machine):
    """The second history of one row has huge values: no other's gradients change by one bit."""
    ids, part = jnp.asarray(ids_of((sizes,), sum(sizes))), slice(sizes[0], sizes[0] + sizes[1])

    def of(arrays):
        with interpreted(**machine):
            return gradients(arrays, ids, implementation="gluon", precision=precision)

    other = {key: arrays[key].at[:, part].multiply(-1e15 if key in "xBC" else -3.0) for key in ("x", "dt", "B", "C")}
    found, changed = of(arrays), of(arrays | other)
    assert not np.array_equal(found["x"][:, part], changed["x"][:, part])
    for name in ("x", "dt", "B", "C"):
        np.testing.assert_array_equal(*(np.delete(each[name], np.s_[part], 1) for each in (found, changed)))
    np.testing.assert_array_equal(found["initial_state"], changed["initial_state"])


def test_no_history_feels_another():
    check_no_history_feels_another(CASES["several histories"][0], (5, 8, 17, 5), "highest")


def backward_kernels(arrays, *, ids=None, precision="default", config=None):
    """What a cut, or the default one, makes of a shape; by name."""

    def value(arrays):
        options = {"segment_ids": ids, "precision": precision, "config": config}
        return ssd(**arrays, implementation="gluon", **options).astype(jnp.float32).sum()

    with interpreted(only_shapes=True) as launches:
        jax.eval_shape(jax.grad(value), arrays)
    return {name: kernel for name, kernel, _ in launches.seen}


def backward_kernel(arrays, **options):
    return backward_kernels(arrays, **options)["ssd_backward"]


# Shapes, options, most instructions per token and head (of all loops, in 16 positions of a head) and bytes of the stack
# on Hopper, measured and rounded up. A warp has all of a head, or as many columns of it as it says.
CODE = {
    "plain": ({"length": 200, "width": 32, "state": 32}, {}, 99, 0),
    "short": ({"length": 50, "width": 32, "state": 32}, {}, 69, 0),
    "several histories": ({"length": 64, "width": 32, "state": 32}, {"ids": np.ones((1, 64), np.int32)}, 79, 0),
    "wide, 16 columns": ({"length": 200, "width": 128, "state": 64}, {"config": GluonConfig(4, 16)}, 105, 64),
    "float32, 16 columns": ({"length": 200, "width": 32, "state": 32}, {"precision": "highest"}, 128, 0),
    "widest, 16 columns": ({"length": 200, "width": 128, "state": 128}, {}, 203, 1040),
}


@pytest.mark.parametrize(
    ("name", "capability"), [case for name in CODE for case in for_gpus(name, usual=name == "plain")]
)
def test_machine_code(name, capability):
    """Two programs fit into a multiprocessor, as many as registers allow; what they take is foreseen."""
    sizes, options, most_instructions, most_stack = CODE[name]
    kernel = backward_kernel(arrays_of(**sizes, heads=4), **options)
    used = resources(kernel, capability)
    constants = dict(kernel.constants)
    params = GluonParams(
        1, sizes["length"], 4, 1, sizes["width"], sizes["state"],
        config=GluonConfig(constants["W"], constants["COLUMNS"], block=constants["BLOCK"]), exact=constants["EXACT"],
        has_initial=False,
    )  # fmt: skip
    assert used.shared_bytes == shared_bytes(params, 4)
    # Of the 228 KB of a multiprocessor each program takes 1 KB besides.
    assert sizes["state"] > 64 or 2 * (used.shared_bytes + 1024) <= 228 * 1024
    # Other generations' compilers put more on the stack.
    slack = 1.0 if capability == 90 else 1.12
    assert 0 < used.loop_instructions <= 16 * most_instructions * slack
    assert used.stack_bytes <= most_stack + (0 if capability == 90 else 48)
    assert used.tensor_core_instructions > 0


def worst_conflict(monkeypatch, run):
    """Runs it; returns how often a bank of shared memory is asked at once by lanes that are served together, and sizes.

    Served together are all lanes of a warp, or as many as 128 bytes are for. What tensor cores read is not counted.
    """
    sizes, worst = set(), 0

    def note(space, lanes, addresses, size):
        nonlocal worst
        if space != "shared" or len(np.unique(lanes)) < len(lanes):
            return
        served = 32 * 4 // max(size, 4)
        for first in range(0, 32, served):
            at = np.asarray(addresses)[(lanes >= first) & (lanes < first + served)]
            words = np.unique(at[:, None] // 4 + np.arange(max(size, 4) // 4))
            sizes.add(size)
            worst = max(worst, np.bincount(words % 32, minlength=32).max())

    load, store = Warp.load, Warp.store
    monkeypatch.setattr(Warp, "load", lambda self, *args: [note(*args), load(self, *args)][1])
    monkeypatch.setattr(
        Warp,
        "store",
        lambda self, space, lanes, at, values: [
            note(space, lanes, at, values.shape[1]),
            store(self, space, lanes, at, values),
        ][1],
    )
    run()
    return worst, sizes


@pytest.mark.exhaustive
@pytest.mark.parametrize(("width", "state", "dtype"), [(32, 32, "float32"), (16, 64, "float32"), (32, 32, "bfloat16")])
def test_no_bank_of_shared_memory_is_asked_twice(monkeypatch, width, state, dtype):
    arrays = arrays_of(20, width=width, state=state)
    arrays |= {key: arrays[key].astype(dtype) for key in "xBC"}
    config = GluonConfig(warps=2, columns=width)

    def run():
        with interpreted():
            gradients(arrays, None, implementation="gluon", precision="default", config=config)

    worst, sizes = worst_conflict(monkeypatch, run)
    assert {4, 8, 16} <= sizes
    assert worst == 1


@pytest.mark.parametrize(
    ("capability", "block", "limit"), [(None, 256, 232448), ((8, 0), 128, 166912), ((8, 9), 64, 101376)]
)
def test_too_much_shared_memory_is_refused(monkeypatch, capability, block, limit):
    monkeypatch.setattr("kernels.ssd.gluon_vjp_shared.gpu_capability", lambda: capability)
    arrays = arrays_of(20, heads=4, width=32, state=32)
    message = rf"block={block} and warps=4 take \d+ bytes of shared memory .* has {limit} on compute capability"
    with pytest.raises(ValueError, match=message):
        backward_kernel(arrays, config=GluonConfig(warps=4, columns=32, block=block))
    backward_kernel(arrays, config=GluonConfig(warps=4, columns=32, block=32))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_what_nobody_divided_fits_every_gpu(monkeypatch, capability):
    monkeypatch.setattr("kernels.ssd.gluon_vjp_shared.gpu_capability", lambda: capability)
    for heads, width, state, dtype in itertools.product((1, 4, 8), (16, 32, 64, 128), (16, 32, 64, 128), ("f4", "bf2")):
        sizes = {"batch": 64, "length": 200, "heads": heads, "width": width, "state_width": state}
        config = default_gluon_config(**sizes)
        params = GluonParams(**sizes, groups=1, config=config, exact=False, has_initial=False)
        fitted = that_fits(params, jnp.dtype({"f4": "float32", "bf2": "bfloat16"}[dtype]))
        check_shared_memory(narrowed(fitted), int(dtype[-1]))
        wide = (width, state, dtype) == (128, 64, "f4") and capability == (9, 0)
        assert fitted.config.wgmma == wide
        fitted.config.check(heads=heads, width=width)
        assert fitted.config.block <= config.block
    arrays = arrays_of(80, heads=4, width=32, state=32)
    kernel = backward_kernel(arrays)
    assert dict(kernel.constants)["BLOCK"] == (32 if capability in ((8, 6), (8, 9), (12, 0)) else 64)


def test_warps_of_one_group_are_added_up_in_the_kernel():
    for heads, groups, wanted in [(4, 1, 4), (4, 2, 2), (6, 2, 1), (1, 1, 1)]:
        kernel = backward_kernel(arrays_of(20, heads=heads, groups=groups))
        assert dict(kernel.constants)["JOIN"] == wanted
