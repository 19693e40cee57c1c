"""Several histories in a row of the SSD operator: each as if it were alone, and a history in pieces."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_tail
from kernels.ssd import SsdConfig, ssd
from kernels.ssd import xla as tiles_of
from tests.kernels.packed import alone, marked, same_bits_outside, unlike
from tests.kernels.ssd_cases import BATCH, HEADS, STATE, WIDTH, Case, assert_near, cotangents, inputs, sequential

LENGTH = 50
SHAPE = (BATCH, LENGTH)
# A case, and where histories begin.
CASES = {
    "some": (Case(LENGTH, 2), [(13, 14, 40), (49,), ()]),
    "at position 0, before an initial state": (Case(LENGTH, 2, initial=True), [(0,), (0, 25), (7,)]),
    "at borders of chunks": (Case(LENGTH, 2, initial=True), [(16, 32, 48), (15, 31, 47), (17, 33, 49)]),
    "everywhere": (Case(LENGTH, 2, initial=True), [range(LENGTH)] * 3),
    "strong decay": (Case(LENGTH, 2, initial=True, step_scale=3.0), [(5, 20), (0, 1, 2, 3), (24,)]),
    "rows that end": (Case(LENGTH, None, lengths=(50, 0, 17), initial=True), [(3, 44), (0, 10), (4, 16, 17, 30)]),
}
KERNELS = "pallas_triton_interpreted"
WHOLE = SsdConfig(chunk_size=16, segments=1, heads_per_program=1, width_splits=1, forward_warps=2, backward_warps=2)
PARTS = dataclasses.replace(WHOLE, segments=4, heads_per_program=2)
# An implementation, and its chunk size or how kernels cut up the work.
PLAIN = [("reference", 64), ("xla", 16), ("xla", 64)]
FORMS = [*PLAIN, (KERNELS, WHOLE), (KERNELS, PARTS)]
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}


def form_name(value):
    return f"{value.segments} segments" if isinstance(value, SsdConfig) else str(value)


by_case = pytest.mark.parametrize("name", CASES)
by_form = pytest.mark.parametrize(("implementation", "cut"), FORMS, ids=form_name)
by_implementation = pytest.mark.parametrize(("implementation", "cut"), [FORMS[0], *FORMS[2::2]], ids=form_name)


def options(implementation, cut):
    name = "config" if isinstance(cut, SsdConfig) else "chunk_size"
    return {name: cut, "implementation": implementation, "return_final_state": True}


@functools.cache
def program(implementation, cut):
    """Jitted (arrays, starts, lengths or None, dy, dstate) -> y, final state, gradients."""

    @jax.jit
    def run(arrays, starts, lengths, dy, dstate):
        def apply(arrays):
            return ssd(**arrays, starts=starts, lengths=lengths, **options(implementation, cut))

        (y, state), pull = jax.vjp(apply, arrays)
        return y, state, pull((dy.astype(y.dtype), dstate.astype(state.dtype)))[0]

    return run


@functools.cache
def truth(name):
    case, rows = CASES[name]
    return alone(sequential, inputs(case), marked(SHAPE, *rows), case.lengths, *cotangents(case))


def in_dtype(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def assert_all_near(actual, expected, dtype):
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert_near(actual[0], expected[0], value_tolerance, "y")
    assert_near(actual[1], expected[1], value_tolerance, "final state")
    assert set(actual[2]) == set(expected[2])
    for name, gradient in actual[2].items():
        # Where every history begins anew, nothing passes through a decay and its gradient is 0.
        if expected[2][name].any():
            assert_near(gradient, expected[2][name], gradient_tolerance, f"gradient by {name}")
        else:
            assert not np.asarray(gradient).any(), name


def check(name, dtype, implementation, cut):
    case, rows = CASES[name]
    lengths = None if case.lengths is None else jnp.array(case.lengths)
    arrays, weights = in_dtype((inputs(case), cotangents(case)), dtype)
    actual = program(implementation, cut)(arrays, marked(SHAPE, *rows), lengths, *weights)
    assert_all_near(actual, truth(name), dtype)


@by_form
@by_case
def test_each_history_alone_in_float32(name, implementation, cut):
    check(name, "float32", implementation, cut)


@pytest.mark.parametrize(("implementation", "chunk_size"), PLAIN)
@by_case
def test_each_history_alone_in_float64(name, implementation, chunk_size, x64):
    check(name, "float64", implementation, chunk_size)


@pytest.mark.parametrize(("fit", "rows", "chunks"), [(2, 2, 1), (9, 3, 2)])
def test_tiles_that_overlap(fit, rows, chunks, monkeypatch, x64):
    """Small tiles, of which the last reaches back over positions, and over rows, that are done."""
    case, chunk_size = Case(37, 2, lengths=(37, 33, 2), initial=True), 4
    monkeypatch.setattr(tiles_of, "_TILE_VALUES", fit * HEADS * chunk_size * WIDTH)
    assert tiles_of._cut(BATCH, case.length, HEADS, (WIDTH, STATE), chunk_size)[1:3] == (rows, chunks)
    starts = marked((BATCH, case.length), (8, 15, 31, 34), (0, 31, 32, 33, 34), (1, 20))
    weights = cotangents(case)
    run = program.__wrapped__("xla", chunk_size)
    actual = run(in_dtype(inputs(case), "float64"), starts, jnp.array(case.lengths), *weights)
    assert_all_near(actual, alone(sequential, inputs(case), starts, case.lengths, *weights), "float64")


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(data=st.data())
def test_any_starts_and_lengths(chunk_size, data):
    case = Case(17, 2, initial=True)
    shape = (BATCH, case.length)
    starts = np.array(data.draw(st.lists(st.booleans(), min_size=51, max_size=51))).reshape(shape)
    starts &= np.array(data.draw(st.lists(st.booleans(), min_size=51, max_size=51))).reshape(shape)
    lengths = data.draw(st.tuples(*[st.integers(0, case.length)] * BATCH))
    weights = cotangents(case)
    with jax.enable_x64(True):
        actual = program("xla", chunk_size)(inputs(case), starts, jnp.array(lengths), *weights)
    assert_all_near(actual, alone(sequential, inputs(case), starts, lengths, *weights), "float64")


@pytest.mark.parametrize("changed", ["x", "dt", "B", "C", "dy", None])
@by_form
def test_no_history_feels_another(implementation, cut, changed):
    """Not by one bit, also where a neighbour's values are huge."""
    case, starts = Case(LENGTH, 2, initial=True), marked(SHAPE, (5, 9, 20, 36), (), (48,))
    run = program(implementation, cut)

    def results(arrays):
        arrays = in_dtype(arrays, "float32")
        dy = arrays.pop("dy")
        y, state, gradients = run(arrays, starts, None, dy, jnp.asarray(cotangents(case)[1], jnp.float32))
        by_position = {"y": y} | {name: gradients[name] for name in ("x", "dt", "B", "C")}
        return by_position, (state, gradients["initial_state"])

    arrays = inputs(case) | {"dy": cotangents(case)[0]}
    at = (0, 9, 20)
    other = unlike(arrays, *at, **({} if changed is None else {changed: 1e30}))
    actual, expected = results(other), results(arrays)
    same_bits_outside(actual[0], expected[0], *at)
    for a, b in zip(actual[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(expected))


@by_form
def test_products_across_histories_may_overflow(implementation, cut):
    """Histories that are each in range, though not one's values times another's."""
    case, starts = Case(LENGTH, 2, initial=True), marked(SHAPE, (9, 20), (9, 20), (9, 20))
    arrays = {name: np.array(a) for name, a in inputs(case).items()}
    dy, dstate = (np.array(c) for c in cotangents(case))
    first, second, third = slice(9), slice(9, 20), slice(20, LENGTH)
    for array, part, scale in [
        (arrays["x"], first, 1e10),
        (arrays["B"], first, 1e20),
        (arrays["C"], first, 1e-20),
        (arrays["C"], second, 1e20),
        (dy, third, 1e30),
    ]:
        array[:, part] *= scale
    arrays, dy, dstate = in_dtype((arrays, dy, dstate), "float32")
    outputs = program(implementation, cut)(arrays, starts, None, dy, dstate)
    for array in jax.tree.leaves(outputs):
        assert jnp.isfinite(array).all()


@by_implementation
def test_a_history_does_not_see_the_step_that_leads_to_it(implementation, cut):
    """A step at a start decays nothing, however long: float32 sums that held it would have no digits for the others."""
    case, starts = Case(LENGTH, 2), marked(SHAPE, (0, 20, 40), (9,), (17, 18))
    arrays = inputs(case) | {name: np.array(inputs(case)[name]) for name in ("x", "dt")}
    arrays["dt"][starts], arrays["x"][starts] = 2.0**24, 2.0**-24
    weights = cotangents(case)
    y, state, gradients = program(implementation, cut)(*in_dtype((arrays,), "float32"), starts, None, *weights)
    expected = alone(sequential, arrays, starts, None, *weights)
    assert_near(y, expected[0], 2e-5, "y")
    assert_near(state, expected[1], 2e-5, "final state")
    assert_near(gradients["dt"], expected[2]["dt"], 1e-4, "gradient by dt")


@by_implementation
def test_bfloat16_is_close(implementation, cut):
    case, starts = Case(LENGTH, 1), marked(SHAPE, (13, 14, 40), (0, 49), ())
    arrays = in_dtype(inputs(case), jnp.bfloat16)
    weights = [np.asarray(c, jnp.bfloat16).astype(np.float64) for c in cotangents(case)]
    y, state, gradients = program(implementation, cut)(arrays, starts, None, *in_dtype(weights, "float32"))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    wide = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    expected = alone(sequential, wide, starts, None, *weights)
    assert_near(y, expected[0], 1e-2, "y")
    assert_near(state, expected[1], 1e-2, "final state")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[2][name], 2e-2, f"gradient by {name}")


def test_segments_of_several_chunks():
    """Of 32 positions, two chunks: histories begin at borders of either, and in segments one after the other."""
    case = Case(90, 2, lengths=(90, 85, 40), initial=True)
    starts = marked((BATCH, 90), (32, 64), (16, 31, 63, 70), (5, 33))
    actual = program(KERNELS, dataclasses.replace(PARTS, segments=3))(
        in_dtype(inputs(case), "float32"), starts, jnp.array(case.lengths), *in_dtype(cotangents(case), "float32")
    )
    assert_all_near(actual, alone(sequential, inputs(case), starts, case.lengths, *cotangents(case)), "float32")


@pytest.mark.parametrize(("implementation", "cut"), FORMS[1::3], ids=form_name)
def test_no_starts_are_starts_that_are_false(implementation, cut):
    case = CASES["some"][0]
    arrays, (dy, dstate) = in_dtype((inputs(case), cotangents(case)), "float32")
    run = program(implementation, cut)
    both = run(arrays, jnp.zeros(SHAPE, bool), None, dy, dstate), run(arrays, None, None, dy, dstate)
    for actual, expected in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@by_implementation
def test_vmap_over_starts(implementation, cut):
    case = Case(20, 2)
    arrays, (dy, dstate) = in_dtype((inputs(case), cotangents(case)), "float32")
    starts = np.stack([marked((BATCH, 20), (k, 16), (0, 17 - k), ()) for k in range(3)])
    run = program(implementation, cut)
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(None, 0, None, None, None)))(arrays, starts, None, dy, dstate)
    for index, one in enumerate(starts):
        expected = jax.tree.leaves(run(arrays, one, None, dy, dstate))
        for actual, wanted in zip(jax.tree.leaves(mapped), expected, strict=True):
            np.testing.assert_allclose(actual[index], wanted, rtol=1e-4, atol=1e-5)


def over_devices(implementation, cut, *, check_vma):
    """Losses of rows, those of rows spread over all devices, and their arguments: what rows share and what they own."""
    devices = jax.devices()
    arrays = in_dtype(inputs(Case(20, 2, initial=True)), "float32")
    parameters = {"A", "D", "dt_bias"}
    rows = {name: jnp.concatenate([a] * len(devices)) for name, a in arrays.items() if name not in parameters}
    rows["starts"] = jnp.concatenate([marked((BATCH, 20), (2,), (0, 18), ())] * len(devices))
    shared = {name: arrays[name] for name in parameters}

    def row_losses(shared, rows):
        y, state = ssd(**shared, **rows, **options(implementation, cut))
        return (y**2).sum((1, 2, 3)) + (state**3).sum((1, 2, 3))

    split, whole = PartitionSpec("rows"), PartitionSpec()
    specs = {"in_specs": (whole, split), "out_specs": split, "check_vma": check_vma}
    return row_losses, jax.shard_map(row_losses, mesh=Mesh(np.array(devices), ("rows",)), **specs), (shared, rows)


def summed_gradient(losses):
    return jax.value_and_grad(lambda *a: losses(*a).sum(), argnums=(0, 1), allow_int=True)


@by_implementation
def test_rows_over_the_devices_of_a_mesh(implementation, cut):
    # JAX's interpreter of kernels does not mark what differs between devices.
    *both, given = over_devices(implementation, cut, check_vma=implementation != KERNELS)
    results = [jax.jit(summed_gradient(losses))(*given) for losses in both]
    for _, (_, by_rows) in results:
        del by_rows["starts"]
    for actual, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-3)


def test_kernels_inside_a_checked_shard_map():
    _, sharded, given = over_devices("pallas_triton", PARTS, check_vma=True)
    program = str(jax.make_jaxpr(summed_gradient(sharded))(*given))
    for kernel in ("ssd_segments", "ssd_forward", "ssd_requests", "ssd_backward"):
        assert kernel in program, kernel


@pytest.mark.parametrize("pieces", [(1,) * 4, (3, 1, 17, 2, 27), (49, 1)], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_history_in_pieces_equals_one_pass(implementation, pieces, x64):
    """Convolution and recurrence, each handing on what the next piece needs; rows of a piece differ in length."""
    taps, length = 4, sum(pieces)
    rng = np.random.default_rng(len(pieces))
    given = rng.normal(size=(BATCH, length, HEADS * WIDTH))
    weight = rng.normal(size=(taps, HEADS * WIDTH))
    dt, B, C = (rng.normal(size=(BATCH, length, size)) for size in (HEADS, STATE, STATE))
    parameters = {"A": -np.geomspace(0.1, 2, HEADS), "D": np.ones(HEADS)}

    def piece(carry, given, dt, B, C, lengths=None):
        tail, state = carry
        options = {"implementation": implementation}
        x = causal_conv1d(given, weight, activation="silu", initial=tail, **options)
        x = x.reshape(*x.shape[:2], HEADS, WIDTH)
        y, state = ssd(
            x, dt, B=B, C=C, **parameters, initial_state=state, lengths=lengths, return_final_state=True, **options
        )
        return (causal_conv1d_tail(given, taps, lengths, tail), state), y

    run = jax.jit(piece)
    nothing = jnp.zeros((BATCH, taps - 1, HEADS * WIDTH)), jnp.zeros((BATCH, HEADS, WIDTH, STATE))
    expected_carry, expected = run(nothing, given, dt, B, C)
    carry, at = nothing, np.zeros(BATCH, int)
    outputs = np.zeros(expected.shape)
    for size in (*pieces, *pieces):
        # Of each piece a row takes as much as it has left: the first all, the second half, the last a third.
        lengths = np.minimum([size, size - size // 2, size - size // 3], length - at)
        picked = np.minimum(at[:, None] + np.arange(size), length - 1)
        take = functools.partial(np.take_along_axis, indices=picked[..., None], axis=1)
        carry, y = run(carry, *map(take, (given, dt, B, C)), jnp.array(lengths))
        for row, real in enumerate(lengths):
            outputs[row, at[row] : at[row] + real] = y[row, :real]
        at = at + lengths
    assert (at == length).all()
    np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(carry, expected_carry, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)


def test_bad_starts():
    shapes = {"x": (3, 6, 4, 8), "dt": (3, 6, 4), "A": (4,), "B": (3, 6, 5), "C": (3, 6, 5)}
    given = {name: jnp.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"starts has shape \(3, 5\), expected \[b, l\] = \(3, 6\)"):
        ssd(**given, starts=jnp.zeros((3, 5), bool))
    with pytest.raises(ValueError, match="starts is int32, expected bool: true where a history begins"):
        ssd(**given, starts=jnp.zeros((3, 6), jnp.int32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("implementation", "cut"), [FORMS[0], FORMS[1]], ids=form_name)
def test_what_is_not_finite_ends_where_a_history_begins_in_a_later_chunk(implementation, cut, value):
    rng = np.random.default_rng(4)
    x, dt, B, C = (jnp.asarray(rng.normal(size=(2, 48, *shape)), jnp.float32) for shape in ((2, 4), (2,), (8,), (8,)))
    starts = jnp.zeros((2, 48), bool).at[:, jnp.array([0, 20, 33])].set(True)
    clean, spoiled = (
        ssd(x, dt, -jnp.ones(2), B, C, starts=starts, **options(implementation, cut))[0]
        for x in (x, x.at[0, 5].set(value))
    )
    assert not jnp.isfinite(spoiled[0, 5:20]).any()
    np.testing.assert_array_equal(spoiled[0, 33:], clean[0, 33:])
    np.testing.assert_array_equal(spoiled[1], clean[1])
