"""Gradients of SSD by `wgmma`: their PTX for compute capability 9.0 against the definition; planted faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")

from kernels.ssd.config import GluonConfig
from tests.kernels import gluon_ptx
from tests.kernels.gluon_ptx import interpreted, resources
from tests.kernels.op_suite import ids_of
from tests.kernels.ptx.memory import Fault
from tests.kernels.test_ptx_kernels import Recorded
from tests.kernels.test_ssd_gluon import arrays_of
from tests.kernels.test_ssd_gluon_vjp import (
    backward_kernels,
    check,
    check_no_history_feels_another,
    gradients,
    worst_conflict,
)

pytestmark = pytest.mark.usefixtures("any_machine")

NAME = "ssd_backward_wgmma"


def wide(length, *, heads=1, **options):
    return arrays_of(length, heads=heads, width=128, state=64, **options)


IN_SEGMENTS = GluonConfig(warps=2, columns=32, segments=2, wgmma=True)
# Arrays and options; the first one is run in the usual tier.
CASES = {
    "two blocks of several histories": (wide(80, initial=True), {"ids": ids_of(((5, 30, 27, 9),), 80)}),
    "ragged length": (wide(70, initial=True), {}),
    "whole block": (wide(64), {}),
    "one position": (wide(1, initial=True), {}),
    "padding": (wide(20, batch=2), {"ids": ids_of(((13,), ()), 20)}),
    "heads of a group": (wide(66, heads=2), {}),
    "groups": (wide(66, heads=2, groups=2), {}),
    "segments": (wide(150, initial=True), {"config": IN_SEGMENTS}),
    "segments of several histories": (wide(140), {"config": IN_SEGMENTS, "ids": ids_of(((3, 80, 50),), 140)}),
}
FIRST = next(iter(CASES))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == FIRST else pytest.mark.exhaustive) for name in CASES]
)
def test_gradients(name):
    arrays, options = CASES[name]
    assert check(arrays, "tfloat32", capability=90, **options)[-1][0] == NAME


@pytest.mark.exhaustive
def test_programs_and_warps_in_the_opposite_order():
    """The same bits: sums over warps and heads have an order of their own."""
    arrays = wide(66, heads=2)

    def bits(backwards):
        with interpreted(backwards=backwards, capability=90):
            found = gradients(arrays, None, implementation="gluon", precision="default")
        return {name: np.asarray(gradient).tobytes() for name, gradient in found.items()}

    assert bits(False) == bits(True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("steps", ["large", "large beside small"])
def test_steps_that_are_large(steps):
    """Decays of 64 positions keep the digits of small steps beside large ones."""
    arrays = wide(70)
    random = np.random.default_rng(5)
    large = np.full((1, 70, 1), 20.0) if steps == "large" else random.choice([-3.0, 10.0, 100.0], (1, 70, 1))
    check(arrays | {"dt": jnp.asarray(large + random.normal(size=large.shape), jnp.float32)}, "tfloat32", capability=90)


@pytest.mark.exhaustive
def test_no_history_feels_another():
    check_no_history_feels_another(wide(80, initial=True), (5, 61, 14), "default", capability=90)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"width": 64}, {}, r"p=64 is not 128"),
        ({"state": 32}, {}, r"n=32 is not 64"),
        ({}, {"block": 32}, r"block=32 is not 64"),
        ({}, {"precision": "highest"}, r"products are not of TF32 factors"),
        ({"dtype": jnp.bfloat16}, {}, r"products are not of TF32 factors"),
        ({}, {"capability": (8, 0)}, r"this GPU has compute capability 8.0, not 9.0"),
        ({}, {"capability": (10, 0)}, r"this GPU has compute capability 10.0, not 9.0"),
    ],
)
def test_what_is_not_offered_is_refused(sizes, options, message, monkeypatch):
    """Where it is named; by itself it is not taken."""
    sizes, options = {"width": 128, "state": 64, "dtype": jnp.float32} | sizes, dict(options)
    capability = options.pop("capability", (9, 0))
    monkeypatch.setattr("kernels.ssd.gluon_vjp_shared.gpu_capability", lambda: capability)
    precision = options.pop("precision", "default")
    arrays = arrays_of(20, heads=2, width=sizes["width"], state=sizes["state"])
    arrays |= {key: arrays[key].astype(sizes["dtype"]) for key in "xBC"}
    config = GluonConfig(warps=2, columns=32, wgmma=True, **options)
    with pytest.raises(ValueError, match=f"wgmma=True in a GluonConfig: {message}; leave it out"):
        backward_kernels(arrays, precision=precision, config=config)
    if not options:
        assert NAME not in backward_kernels(arrays, precision=precision)


def test_machine_code():
    """What a GPU of compute capability 9.0 has, and next to no stack."""
    kernels = {length: backward_kernels(wide(length, heads=4))[NAME] for length in (64, 200)}
    for kernel in kernels.values():
        used = resources(kernel, 90)
        assert used.shared_bytes <= 227 * 1024
        assert used.stack_bytes <= 24


@pytest.mark.exhaustive
def test_no_bank_of_shared_memory_is_asked_twice(monkeypatch):
    def run():
        with interpreted(capability=90):
            gradients(wide(70, initial=True), None, implementation="gluon", precision="default")

    assert worst_conflict(monkeypatch, run) == (1, {4, 8, 16})


@pytest.fixture(scope="module")
def call():
    """The launch of a row of several blocks and histories, which can be repeated with other text."""
    calls, run = [], gluon_ptx.run
    arrays, ids = wide(70, initial=True), jnp.asarray(ids_of(((5, 50, 15),), 70))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.dispatch.missing", lambda name: None)
        patch.setattr(
            gluon_ptx,
            "run",
            lambda *given, **options: [calls.append(Recorded(*given, options)), run(*given, **options)],
        )
        with interpreted(capability=90):
            jax.block_until_ready(gradients(arrays, ids, implementation="gluon", precision="default"))
    return calls[-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("pattern", "message", "most_missed"),
    [
        # The compiler puts some barriers beside others.
        (r"bar\.sync", "race|nobody wrote|no fence", 4),
        (r"fence\.proxy\.async", "no fence.proxy.async", 0),
        (r"wgmma\.wait_group", "nobody wrote|race|never waited for", 0),
        # Products that are waited for together belong to the last one's group then.
        (r"wgmma\.commit_group", "nobody wrote|race|never waited for", 4),
        (r"cp\.async\.(commit|wait)_group", "nobody wrote|race|never waited for|no fence", 0),
    ],
)
def test_what_is_missing_is_found(call, pattern, message, most_missed):
    """As a fault, or by what comes out; or it changes nothing."""
    expected = call.run()
    found = call.find(pattern)
    assert found
    missed = []
    for number in found:
        try:
            actual = call.run(number)
        except Fault as fault:
            assert any(part in str(fault) for part in message.split("|")), fault
        else:
            if all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True)):
                missed.append(number)
    assert len(missed) <= most_missed, [call.lines[number] for number in missed]
