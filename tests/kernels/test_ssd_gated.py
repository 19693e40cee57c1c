"""The gated SSD operator, every implementation and every cut, against a float64 walk in another framework."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from experiments.benchmarks.torch_models.ssd import ssd_sequential
from kernels.ssd import IMPLEMENTATIONS, SsdConfig, ssd_gated
from tests.kernels.packed import marked
from tests.kernels.ssd_cases import assert_near

FORMS = ("reference", "xla", "pallas_triton_interpreted")
KERNELS = "pallas_triton_interpreted"
PLAIN = SsdConfig(chunk_size=16, segments=1, heads_per_program=1, width_splits=1, forward_warps=2, backward_warps=2)
# b, l, h, g, p, n
TINY, SMALL, RAGGED = (2, 1, 2, 1, 16, 16), (2, 20, 2, 1, 16, 16), (3, 33, 4, 2, 8, 5)
PAPER_50, PAPER_200, PAPER_256 = (2, 50, 4, 1, 32, 32), (1, 200, 4, 1, 32, 32), (1, 40, 4, 1, 128, 64)
CASES = {
    "one position": (TINY, {}),
    "ragged rows in groups": (RAGGED, {"lengths": (33, 0, 17)}),
    "strong decay": (RAGGED, {"lengths": (33, 1, 32), "step_scale": 3.0, "initial": False}),
    "paper's, 50": (PAPER_50, {"initial": False}),
    "paper's, 200": (PAPER_200, {"initial": False}),
}
CUTS = {
    "heads of two groups": ((1, 33, 4, 2, 16, 16), {"heads_per_program": 2, "chunk_size": 32}),
    "wide heads in splits": (PAPER_256, {"width_splits": 4, "heads_per_program": 2, "chunk_size": 32}),
    "widths that are no powers of two": ((1, 20, 2, 1, 24, 20), {"width_splits": 2}),
    "segments": ((1, 70, 2, 1, 16, 16), {"segments": 3}),
}


def inputs(shape, *, step_scale=1.0, initial=True):
    """Arrays that have gradients, and weights of both outputs in the number that is differentiated."""
    batch, length, heads, groups, width, state = shape
    rng = np.random.default_rng(shape)
    arrays = {
        "x": rng.normal(size=(batch, length, heads, width)),
        "dt": step_scale * rng.normal(size=(batch, length, heads)),
        "A": -np.geomspace(1, 16, heads),
        "B": rng.normal(size=(batch, length, groups, state)),
        "C": rng.normal(size=(batch, length, groups, state)),
        "z": 2 * rng.normal(size=(batch, length, heads, width)),
        "D": rng.normal(size=heads),
        "dt_bias": rng.normal(size=heads),
    }
    if initial:
        arrays["initial_state"] = rng.normal(size=(batch, heads, width, state))
    # Sums of squares count for as much as values.
    weights = rng.normal(size=arrays["x"].shape), rng.normal(size=arrays["dt"].shape) / 8
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (arrays, weights))


def truth(arrays, lengths, weights):
    """u, sums of squares and gradients in float64."""
    leaves = {name: torch.tensor(np.asarray(a, np.float64), requires_grad=True) for name, a in arrays.items()}
    delta = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    if lengths is not None:
        delta = delta * (torch.arange(delta.shape[1]) < torch.tensor(lengths)[:, None])[..., None]
    given = {"D": leaves["D"], "initial_state": leaves.get("initial_state")}
    y, _ = ssd_sequential(leaves["x"], delta, *(leaves[name] for name in "ABC"), **given)
    u = y * torch.nn.functional.silu(leaves["z"])
    outputs = u, (u**2).sum(-1)
    total = sum((o * torch.tensor(np.asarray(w, np.float64))).sum() for o, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(total, list(leaves.values()))
    gradients = {name: g.numpy() for name, g in zip(leaves, gradients, strict=True)}
    return *(o.detach().numpy() for o in outputs), gradients


@functools.cache
def program(implementation, config=None, products=None):
    """Jitted (arrays, lengths or None, weights, starts or None) -> u, sums of squares, gradients."""

    @jax.jit
    def run(arrays, lengths, weights, starts=None):
        def apply(arrays):
            options = {"config": config, "products": products, "implementation": implementation}
            return ssd_gated(**arrays, lengths=lengths, starts=starts, **options)

        outputs, pull = jax.vjp(apply, arrays)
        return *outputs, pull(jax.tree.map(lambda w, o: w.astype(o.dtype), weights, outputs))[0]

    return run


def check(shape, run, *, lengths=None, value=2e-5, gradient=1e-4, **options):
    arrays, weights = inputs(shape, **options)
    u, squares, gradients = run(arrays, None if lengths is None else jnp.array(lengths), weights)
    expected = truth(arrays, lengths, weights)
    assert_near(u, expected[0], value, "u")
    assert_near(squares, expected[1], value, "sums of squares")
    assert set(gradients) == set(arrays)
    for name, actual in gradients.items():
        assert_near(actual, expected[2][name], gradient, f"gradient by {name}")


def test_the_suite_knows_every_implementation():
    assert set(FORMS) == set(IMPLEMENTATIONS) - {"pallas_triton"}


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    shape, options = CASES[name]
    check(shape, program(implementation), **options)


@pytest.mark.parametrize("name", CUTS)
def test_every_cut(name):
    shape, changes = CUTS[name]
    config = dataclasses.replace(PLAIN, **changes)
    check(shape, program(KERNELS, config, "float32" if "groups" in name else None))


PACKED = marked(RAGGED[:2], (0, 15, 16, 30), (7,), (9, 10, 20))
PACKED_CUTS = {
    "heads in one program": {"heads_per_program": 2},
    "segments": {"segments": 3},
}


@pytest.mark.parametrize("name", PACKED_CUTS)
def test_rows_of_several_histories(name):
    """As by the definition, whose output of each history is that of `ssd`."""
    arrays, weights = inputs(RAGGED)
    lengths, config = jnp.array([33, 30, 17]), dataclasses.replace(PLAIN, **PACKED_CUTS[name])
    actual, expected = (
        run(arrays, lengths, weights, PACKED) for run in (program(KERNELS, config), program("reference"))
    )
    assert_near(actual[0], expected[0], 2e-5, "u")
    assert_near(actual[1], expected[1], 2e-5, "sums of squares")
    for array, gradient in expected[2].items():
        assert_near(actual[2][array], gradient, 1e-4, f"gradient by {array}")


@pytest.mark.parametrize("changed", ["x", "dt", "B", "C", "z", "dy"])
def test_no_history_feels_another(changed):
    """Not by one bit, also where a neighbour's values are huge."""
    arrays, weights = inputs(RAGGED)
    config = dataclasses.replace(PLAIN, **PACKED_CUTS["heads in one program"])
    run = program(KERNELS, config)

    def results(arrays):
        arrays = {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
        dy = arrays.pop("dy")
        u, squares, gradients = run(arrays, jnp.array([33, 30, 17]), (dy, weights[1]), PACKED)
        return {"u": u, "squares": squares} | gradients

    given = {name: np.asarray(a) for name, a in (arrays | {"dy": weights[0]}).items()}
    other = {name: np.array(a) for name, a in given.items()}
    # Sums of squares overflow beyond this.
    other[changed][0, 16:30] *= -1e15
    both = [results(a) for a in (other, given)]
    for name in ("u", "squares", "x", "dt", "B", "C", "z"):
        a, b = (np.array(result[name]) for result in both)
        assert np.array_equal(a[0, 16:30], b[0, 16:30]) == (changed == "dy" and name in ("u", "squares"))
        a[0, 16:30] = b[0, 16:30] = 0
        np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(both[0]["initial_state"], both[1]["initial_state"])


def test_only_rows_in_segments_are_gated_after_the_kernels():
    arrays, weights = inputs((1, 70, 2, 1, 16, 16))
    for segments, gated in [(1, True), (3, False)]:
        run = program("pallas_triton", dataclasses.replace(PLAIN, segments=segments)).__wrapped__
        jaxpr = str(jax.make_jaxpr(run)(arrays, None, weights))
        assert ("ssd_gated_forward" in jaxpr, "ssd_gated_backward" in jaxpr) == (gated, gated)
        assert ("ssd_forward" in jaxpr, "ssd_backward" in jaxpr) == (not gated, not gated)


@pytest.mark.parametrize("implementation", FORMS)
def test_float64_storage(implementation, x64):
    arrays, weights = jax.tree.map(lambda a: a.astype(jnp.float64), inputs(SMALL))
    if implementation == KERNELS:
        with pytest.raises(ValueError, match="x is float64; the Triton kernels take float32 or bfloat16"):
            ssd_gated(**arrays, implementation=implementation)
        return
    u, squares, gradients = program(implementation)(arrays, None, weights)
    assert u.dtype == squares.dtype == jnp.float64
    expected = truth(arrays, None, weights)
    assert_near(u, expected[0], 1e-10, "u")
    assert_near(squares, expected[1], 1e-10, "sums of squares")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[2][name], 1e-10, name)


@pytest.mark.parametrize("implementation", FORMS)
def test_bfloat16_keeps_sums_of_squares_in_float32(implementation):
    arrays, weights = inputs(RAGGED)
    stored = {name: a.astype(jnp.bfloat16) if name in ("x", "B", "C", "z") else a for name, a in arrays.items()}
    u, squares, gradients = program(implementation)(stored, None, weights)
    assert (u.dtype, squares.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = weights[0].astype(jnp.bfloat16), weights[1]
    expected = truth(jax.tree.map(lambda a: a.astype(jnp.float32), stored), None, rounded)
    assert_near(u, expected[0], 1e-2, "u")
    assert_near(squares, expected[1], 1e-2, "sums of squares")
    for name, gradient in gradients.items():
        assert gradient.dtype == stored[name].dtype, name
        assert_near(gradient, expected[2][name], 2e-2, name)


@pytest.mark.parametrize("implementation", FORMS)
def test_gates_far_from_zero(implementation):
    arrays, weights = inputs(SMALL)
    far = arrays | {"z": jnp.where(arrays["z"] > 0, 200.0, -200.0)}
    u, squares, gradients = program(implementation)(far, None, weights)
    expected = truth(far, None, weights)
    assert_near(u, expected[0], 2e-5, "u")
    assert_near(gradients["z"], expected[2]["z"], 1e-4, "gradient by z")
    for array in (squares, *gradients.values()):
        assert jnp.isfinite(array).all()


def test_vmap_equals_one_after_the_other():
    arrays, weights = inputs(SMALL)
    pair = arrays, jax.tree.map(lambda a: 0.9 * a, arrays)
    stacked = jax.tree.map(lambda *both: jnp.stack(both), *pair)
    run = program(KERNELS)
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(0, None, None)))(stacked, None, weights)
    for index, single in enumerate(pair):
        expected = run(single, None, weights)
        for actual, wanted in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(actual[index], wanted, rtol=1e-4, atol=1e-5)


def test_the_same_bits_every_run():
    arrays, weights = inputs((2, 40, 4, 1, 16, 16))
    run = program(KERNELS, dataclasses.replace(PLAIN, heads_per_program=2))
    for first, second in zip(*(jax.tree.leaves(run(arrays, None, weights)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)


def sharded_gradients(implementation, *, check_vma):
    """(arrays, weights) -> gradients, with rows spread over all devices."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = {"x", "dt", "B", "C", "z", "initial_state"}

    def loss(arrays, weights):
        outputs = ssd_gated(**arrays, config=PLAIN, implementation=implementation)
        return sum(jnp.sum(o * w) for o, w in zip(outputs, weights, strict=True))[None]

    def total(arrays, weights):
        specs = {name: P("data") if name in split else P() for name in arrays}
        options = {"in_specs": (specs, P("data")), "out_specs": P("data"), "check_vma": check_vma}
        return jnp.sum(jax.shard_map(loss, mesh=mesh, **options)(arrays, weights))

    return jax.jit(jax.grad(total))


def test_inside_shard_map():
    given = inputs((jax.device_count(), *SMALL[1:]))
    # The interpreter itself does not run where JAX checks what varies over the mesh.
    actual = sharded_gradients(KERNELS, check_vma=False)(*given)
    for name, gradient in program(KERNELS, PLAIN)(given[0], None, given[1])[2].items():
        assert_near(actual[name], gradient, 1e-5, name)


def test_inside_a_checked_shard_map():
    given = inputs((jax.device_count(), *SMALL[1:]))
    assert "ssd_gated_backward" in str(sharded_gradients("pallas_triton", check_vma=True).trace(*given).jaxpr)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_what_is_refused(implementation):
    arrays = inputs(SMALL)[0]
    with pytest.raises(ValueError, match=r"z has shape \(2, 20, 32\), expected that of x, \(2, 20, 2, 16\)"):
        ssd_gated(**arrays | {"z": arrays["z"].reshape(2, 20, 32)}, implementation=implementation)
    with pytest.raises(ValueError, match=r"dt has shape \(2, 20\), expected \(2, 20, 2\)"):
        ssd_gated(**arrays | {"dt": arrays["dt"][..., 0]}, implementation=implementation)
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        ssd_gated(**arrays, chunk_size=0, implementation=implementation)


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match=r"implementation='cuda' must be one of \('reference', 'xla', .*\), or None"):
        ssd_gated(**inputs(SMALL)[0], implementation="cuda")
