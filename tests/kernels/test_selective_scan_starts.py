"""Several histories in a row of the selective scan: each as if it were alone."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels.selective_scan import SelectiveScanConfig, selective_scan
from tests.kernels.packed import alone, marked, same_bits_outside, unlike
from tests.kernels.selective_scan_cases import BATCH, Case, assert_near, cotangents, inputs, sequential

KERNELS = "pallas_triton_interpreted"
CONFIG = SelectiveScanConfig(chunk=4, group=2, forward_channels=8, backward_channels=4)
LENGTH = 30
SHAPE = (BATCH, LENGTH)
# A case, and where histories begin.
CASES = {
    "some": (Case(LENGTH), [(13, 14, 20), (29,), ()]),
    "at position 0, before an initial state": (Case(LENGTH, initial=True), [(0,), (0, 25), (7,)]),
    "at borders of chunks": (Case(LENGTH, initial=True), [(4, 8, 28), (7, 14, 21), (5, 9, 13)]),
    "everywhere": (Case(LENGTH, initial=True), [range(LENGTH)] * 3),
    "strong decay": (Case(LENGTH, initial=True, step_scale=3.0), [(5, 20), (0, 1, 2, 3), (24,)]),
    "rows that end": (Case(LENGTH, lengths=(30, 0, 17), initial=True), [(3, 24), (0, 10), (4, 16, 17, 29)]),
}
FORMS = [("reference", 16), ("xla", 7), ("xla", 64), (KERNELS, 16)]
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}

by_case = pytest.mark.parametrize("name", CASES)
by_form = pytest.mark.parametrize(("implementation", "chunk_size"), FORMS)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "xla", KERNELS])


@functools.cache
def program(implementation, chunk_size=4):
    """Jitted (arrays, starts, lengths or None, dy, dstate) -> y, final state, gradients."""
    options = {"chunk_size": chunk_size, "implementation": implementation, "config": CONFIG}

    @jax.jit
    def run(arrays, starts, lengths, dy, dstate):
        def apply(arrays):
            return selective_scan(**arrays, starts=starts, lengths=lengths, return_final_state=True, **options)

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
        assert_near(gradient, expected[2][name], gradient_tolerance, f"gradient by {name}")


def check(name, dtype, implementation, chunk_size):
    case, rows = CASES[name]
    lengths = None if case.lengths is None else jnp.array(case.lengths)
    arrays, weights = in_dtype((inputs(case), cotangents(case)), dtype)
    actual = program(implementation, chunk_size)(arrays, marked(SHAPE, *rows), lengths, *weights)
    assert_all_near(actual, truth(name), dtype)


@by_form
@by_case
def test_each_history_alone_in_float32(name, implementation, chunk_size):
    check(name, "float32", implementation, chunk_size)


@pytest.mark.parametrize(("implementation", "chunk_size"), FORMS[:3])
@by_case
def test_each_history_alone_in_float64(name, implementation, chunk_size, x64):
    check(name, "float64", implementation, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(data=st.data())
def test_any_starts_and_lengths(chunk_size, data):
    case = Case(11, initial=True)
    starts = np.array(data.draw(st.lists(st.booleans(), min_size=33, max_size=33))).reshape(BATCH, case.length)
    starts &= np.array(data.draw(st.lists(st.booleans(), min_size=33, max_size=33))).reshape(BATCH, case.length)
    lengths = data.draw(st.tuples(*[st.integers(0, case.length)] * BATCH))
    weights = cotangents(case)
    with jax.enable_x64(True):
        actual = program("xla", chunk_size)(inputs(case), starts, jnp.array(lengths), *weights)
    assert_all_near(actual, alone(sequential, inputs(case), starts, lengths, *weights), "float64")


@pytest.mark.parametrize("changed", ["x", "dt", "B", "C", "dy", None])
@by_implementation
def test_no_history_feels_another(implementation, changed):
    """Not by one bit, also where a neighbour's values are huge."""
    case, starts = Case(LENGTH, initial=True), marked(SHAPE, (5, 9, 20), (), (28,))
    run = program(implementation)

    def results(arrays):
        arrays = in_dtype(arrays, "float32")
        dy = arrays.pop("dy")
        y, state, gradients = run(arrays, starts, None, dy, jnp.asarray(cotangents(case)[1], jnp.float32))
        by_position = {"y": y} | {name: gradients[name] for name in ("x", "dt", "B", "C")}
        return by_position, (state, gradients["initial_state"])

    arrays = inputs(case) | {"dy": cotangents(case)[0]}
    at = (0, 9, 20)
    actual = results(unlike(arrays, *at, **({} if changed is None else {changed: 1e30})))
    expected = results(arrays)
    same_bits_outside(actual[0], expected[0], *at)
    for a, b in zip(actual[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(expected))


@by_implementation
def test_not_even_what_is_no_number_passes(implementation):
    case, starts = Case(LENGTH, initial=True), marked(SHAPE, (0, 9), (9,), (9,))
    arrays, weights = in_dtype((inputs(case), cotangents(case)), "float32")
    run = program(implementation)
    broken = arrays | {"x": arrays["x"].at[:, :9].set(jnp.nan)}
    (y, state, _), expected = run(broken, starts, None, *weights), run(arrays, starts, None, *weights)
    np.testing.assert_array_equal(y[:, 9:], expected[0][:, 9:])
    np.testing.assert_array_equal(state, expected[1])
    assert jnp.isnan(y[:, :9]).all()


@by_implementation
def test_vmap_over_starts(implementation):
    case = Case(6)
    arrays, weights = in_dtype((inputs(case), cotangents(case)), "float32")
    starts = np.stack([marked((BATCH, 6), (k,), (0, 5 - k), ()) for k in range(3)])
    run = program(implementation)
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(None, 0, None, None, None)))(arrays, starts, None, *weights)
    for index, one in enumerate(starts):
        expected = jax.tree.leaves(run(arrays, one, None, *weights))
        for actual, wanted in zip(jax.tree.leaves(mapped), expected, strict=True):
            np.testing.assert_allclose(actual[index], wanted, rtol=1e-4, atol=1e-5)


@by_implementation
def test_rows_over_the_devices_of_a_mesh(implementation):
    devices = jax.devices()
    arrays = in_dtype(inputs(Case(6, initial=True)), "float32")
    parameters = {"A", "D", "dt_bias"}
    rows = {name: jnp.concatenate([a] * len(devices)) for name, a in arrays.items() if name not in parameters}
    starts = jnp.concatenate([marked((BATCH, 6), (2,), (0, 4), ())] * len(devices))
    shared = {name: arrays[name] for name in parameters}

    def row_losses(shared, rows, starts):
        options = {"implementation": implementation, "config": CONFIG, "return_final_state": True}
        y, state = selective_scan(**shared, **rows, starts=starts, **options)
        return (y**2).sum((1, 2)) + (state**3).sum((1, 2))

    split, whole = PartitionSpec("rows"), PartitionSpec()
    sharded = jax.shard_map(
        row_losses,
        mesh=Mesh(np.array(devices), ("rows",)),
        in_specs=(whole, split, split),
        out_specs=split,
        # JAX's interpreter of kernels does not mark what differs between devices.
        check_vma=implementation != KERNELS,
    )

    def value_and_gradients(losses):
        return jax.jit(jax.value_and_grad(lambda *a: losses(*a, starts).sum(), argnums=(0, 1)))(shared, rows)

    both = value_and_gradients(sharded), value_and_gradients(row_losses)
    for actual, wanted in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-3)


def test_bad_starts():
    shapes = {"x": (3, 6, 8), "dt": (3, 6, 8), "A": (8, 5), "B": (3, 6, 5), "C": (3, 6, 5)}
    given = {name: jnp.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"starts has shape \(3,\), expected \[b, l\] = \(3, 6\)"):
        selective_scan(**given, starts=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="starts is float32, expected bool: true where a history begins"):
        selective_scan(**given, starts=jnp.zeros((3, 6)))
