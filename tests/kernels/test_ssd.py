"""Every implementation of the SSD operator against a float64 walk along the sequence in another framework."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.ssd import IMPLEMENTATIONS, dense_mask, ssd, ssd_last, step_size
from tests.kernels.ssd_cases import BATCH, HEADS, STATE, WIDTH, Case, assert_near, cotangents, inputs, sequential, truth

FORMS = {"reference": [64], "xla": [16, 64], "pallas_triton_interpreted": [32]}
WIDE_FORMS = ["reference", "xla"]
CASES = [
    Case(1, 1),
    Case(31, 2, lengths=(31, 0, 17)),
    Case(50, 4, initial=True),
    Case(200, None, lengths=(200, 1, 64), initial=True),
    Case(50, 4, initial=True, step_scale=3.0),
]
SMALL = Case(6, 2, initial=True)
# Outputs and gradients, as shares of the largest magnitude.
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}

by_form = pytest.mark.parametrize(
    ("implementation", "chunk_size"), [(name, chunk) for name, chunks in FORMS.items() for chunk in chunks]
)
by_implementation = pytest.mark.parametrize("implementation", FORMS)
by_wide_implementation = pytest.mark.parametrize("implementation", WIDE_FORMS)


def test_the_suite_knows_every_implementation():
    # Without a GPU the compiled kernels are the interpreted ones, and test_ssd_codegen reads what they compile to.
    assert set(FORMS) == set(IMPLEMENTATIONS) - {"pallas_triton"}


def in_dtype(arrays, dtype):
    return {name: jnp.asarray(a, dtype) for name, a in arrays.items()}


@functools.cache
def program(implementation, chunk_size):
    """Jitted (arrays, lengths or None, dy, dstate) -> y, final state, gradients."""

    @jax.jit
    def run(arrays, lengths, dy, dstate):
        def apply(arrays):
            return ssd(
                **arrays,
                lengths=lengths,
                return_final_state=True,
                chunk_size=chunk_size,
                implementation=implementation,
            )

        (y, state), pull = jax.vjp(apply, arrays)
        return y, state, pull((dy.astype(y.dtype), dstate.astype(state.dtype)))[0]

    return run


def lengths_of(case):
    return None if case.lengths is None else jnp.array(case.lengths, jnp.int32)


def check(case, dtype, chunk_size, implementation):
    arrays = in_dtype(inputs(case), dtype)
    dy, dstate = (jnp.asarray(c, dtype) for c in cotangents(case))
    y, state, gradients = program(implementation, chunk_size)(arrays, lengths_of(case), dy, dstate)
    assert y.dtype == state.dtype == dtype
    assert {name: g.dtype for name, g in gradients.items()} == {name: a.dtype for name, a in arrays.items()}
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    expected_y, expected_state, expected_gradients = truth(case)
    assert_near(y, expected_y, value_tolerance, "y")
    assert_near(state, expected_state, value_tolerance, "final state")
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], gradient_tolerance, f"gradient by {name}")


@by_form
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float32(case, implementation, chunk_size):
    check(case, "float32", chunk_size, implementation)


@by_wide_implementation
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float64(case, implementation, x64):
    check(case, "float64", FORMS[implementation][0], implementation)


@by_implementation
def test_bfloat16_is_close_and_keeps_states_in_float32(implementation):
    case = CASES[3]
    arrays = in_dtype(inputs(case), jnp.bfloat16)
    for name in ("A", "D", "dt_bias", "initial_state"):
        arrays[name] = arrays[name].astype(jnp.float32)
    dy, dstate = (jnp.asarray(c, jnp.bfloat16).astype(jnp.float32) for c in cotangents(case))
    y, state, gradients = program(implementation, 64)(arrays, lengths_of(case), dy, dstate)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected = sequential(arrays, case.lengths, np.asarray(dy, np.float64), np.asarray(dstate, np.float64))
    assert_near(y, expected[0], 1e-2, "y")
    assert_near(state, expected[1], 1e-2, "final state")
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert_near(gradient, expected[2][name], 2e-2, f"gradient by {name}")


@by_implementation
def test_bfloat16_products_accumulate_in_float32(implementation):
    # 1 added to a bfloat16 sum of 256 leaves it at 256.
    length = 1000
    ones = jnp.ones((1, length, 1, 1), jnp.bfloat16)
    dt = jnp.full((1, length, 1), np.log(np.e - 1), jnp.float32)
    options = {"chunk_size": length, "implementation": implementation, "return_final_state": True}
    y, state = jax.jit(functools.partial(ssd, **options))(ones, dt, jnp.array([-1e-9]), ones, ones)
    assert state[0, 0, 0, 0] == pytest.approx(length, rel=1e-2)
    assert float(y[0, -1, 0, 0]) == pytest.approx(length, rel=1e-2)


@by_implementation
def test_extreme_decay_gives_finite_gradients(implementation):
    case = CASES[2]
    arrays = in_dtype(inputs(case), "float32") | {"dt": jnp.full((BATCH, case.length, HEADS), 80.0)}
    dy, dstate = (jnp.asarray(c, jnp.float32) for c in cotangents(case))
    y, state, gradients = program(implementation, 64)(arrays, None, dy, dstate)
    for array in (y, state, *gradients.values()):
        assert jnp.isfinite(array).all()
    # Nothing is left of the past: y = delta x (C . B) + D x.
    x, B, C = (np.asarray(arrays[name], np.float64) for name in ("x", "B", "C"))
    delta = 80 + np.asarray(arrays["dt_bias"])[:, None]
    expected = (delta * np.einsum("blhn,blhn->blh", B, C)[..., None] + np.asarray(arrays["D"])[:, None]) * x
    assert_near(y, expected, 1e-6, "y")


@by_implementation
def test_two_halves_chained_equal_one_pass(implementation):
    case = CASES[2]
    arrays = in_dtype(inputs(case), "float32")
    half = case.length // 2

    def part(state, positions):
        sliced = {name: a[:, positions] if name in ("x", "dt", "B", "C") else a for name, a in arrays.items()}
        dy = jnp.zeros((BATCH, half, HEADS, WIDTH))
        run = program(implementation, 16)
        return run(sliced | {"initial_state": state}, None, dy, jnp.zeros_like(state))[:2]

    first, state = part(arrays["initial_state"], slice(0, half))
    second, state = part(state, slice(half, None))
    expected_y, expected_state, _ = truth(case)
    assert_near(jnp.concatenate([first, second], axis=1), expected_y, 2e-5, "y")
    assert_near(state, expected_state, 2e-5, "final state")


@by_implementation
def test_padding_leaves_the_state_as_it_is(implementation):
    """Rows of padding alone and rows cut short, whatever their padding holds."""
    arrays = in_dtype(inputs(SMALL), "float32")
    zeros = jnp.zeros((BATCH, SMALL.length, HEADS, WIDTH)), jnp.zeros((BATCH, HEADS, WIDTH, STATE))
    run = program(implementation, 4)
    _, state, _ = run(arrays, jnp.array([0, 1, 4]), *zeros)
    np.testing.assert_array_equal(state[0], arrays["initial_state"][0])
    assert (state[1:] != arrays["initial_state"][1:]).all()
    other = arrays | {name: arrays[name].at[:, 4:].add(3.0) for name in ("x", "dt", "B", "C")}
    np.testing.assert_array_equal(run(other, jnp.array([0, 1, 4]), *zeros)[1], state)


@by_implementation
def test_vmap_equals_one_after_the_other(implementation):
    arrays = in_dtype(inputs(SMALL), "float32")
    pair = arrays, jax.tree.map(lambda a: 0.9 * a, arrays)
    cotangent = [jnp.asarray(c, jnp.float32) for c in cotangents(SMALL)]
    run = program(implementation, 4)
    stacked = jax.tree.map(lambda *both: jnp.stack(both), *pair)
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(0, None, None, None)))(stacked, None, *cotangent)
    for index, single in enumerate(pair):
        expected = jax.tree.leaves(run(single, None, *cotangent))
        for actual, wanted in zip(jax.tree.leaves(mapped), expected, strict=True):
            np.testing.assert_allclose(actual[index], wanted, rtol=1e-4, atol=1e-5)


@by_implementation
def test_left_out_inputs_are_zeros(implementation):
    arrays = in_dtype(inputs(SMALL), "float32")
    dy, dstate = (jnp.asarray(c, jnp.float32) for c in cotangents(SMALL))
    run = program(implementation, 4)
    zeros = {"D": jnp.zeros(HEADS), "dt_bias": jnp.zeros(HEADS)}
    zeros["initial_state"] = jnp.zeros((BATCH, HEADS, WIDTH, STATE))
    without = {name: a for name, a in arrays.items() if name not in zeros}
    outputs = run(without, None, dy, dstate)[:2], run(without | zeros, None, dy, dstate)[:2]
    for actual, expected in zip(*outputs, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def golden(golden_dir, length):
    with np.load(golden_dir / f"ssd_core_L{length}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    return json.loads(arrays["config_json"].item())["chunk_size"], arrays


def check_golden(golden_dir, length, implementation, dtype):
    chunk_size, arrays = golden(golden_dir, length)
    leaves = {key.removeprefix("in/"): jnp.asarray(a, dtype) for key, a in arrays.items() if key.startswith("in/")}
    dy, dstate = leaves.pop("gy"), leaves.pop("gfinal")
    run = program(implementation, chunk_size)
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    for kept, weights in [("grad_y", (dy, 0 * dstate)), ("grad_final", (0 * dy, dstate))]:
        y, state, gradients = run(leaves, None, *weights)
        assert_near(y, arrays["seq64/y"], value_tolerance, "y")
        assert_near(state, arrays["seq64/final_state"], value_tolerance, "final state")
        assert {f"seq64/{kept}/{name}" for name in gradients} == {k for k in arrays if k.startswith(f"seq64/{kept}/")}
        for name, gradient in gradients.items():
            assert_near(gradient, arrays[f"seq64/{kept}/{name}"], gradient_tolerance, f"{kept} by {name}")


@by_wide_implementation
@pytest.mark.parametrize("length", [1, 31, 32, 50])
def test_stored_vectors_in_float64(golden_dir, length, implementation, x64):
    check_golden(golden_dir, length, implementation, "float64")


@by_implementation
def test_stored_vectors_in_float32(golden_dir, implementation):
    check_golden(golden_dir, 50, implementation, "float32")


@jax.jit
def run_last(arrays, lengths, weight):
    def apply(arrays):
        given = (arrays[name] for name in ("x", "dt", "A", "B", "C_last"))
        return ssd_last(*given, lengths, D=arrays["D"], dt_bias=arrays["dt_bias"])

    y, pull = jax.vjp(apply, arrays)
    return y, pull(weight)[0]


def check_last(case, dtype):
    rows, last = np.arange(BATCH), np.array(case.lengths) - 1
    arrays, dy = inputs(case), cotangents(case)[0]
    at_last = np.zeros_like(dy)
    at_last[rows, last] = dy[rows, last]
    y, _, expected = sequential(arrays, case.lengths, at_last, np.zeros((BATCH, HEADS, WIDTH, STATE)))
    expected["C_last"] = expected.pop("C")[rows, last]
    given = {name: a for name, a in arrays.items() if name != "C"} | {"C_last": arrays["C"][rows, last]}
    actual, gradients = run_last(in_dtype(given, dtype), jnp.array(case.lengths), jnp.asarray(dy[rows, last], dtype))
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert actual.dtype == dtype
    assert_near(actual, y[rows, last], value_tolerance, "y")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[name], gradient_tolerance, f"gradient by {name}")


LAST_CASES = [
    Case(1, 1, lengths=(1, 1, 1)),
    Case(31, 2, lengths=(31, 1, 17)),
    Case(200, None, lengths=(200, 1, 64)),
    Case(50, 4, lengths=(50, 49, 2), step_scale=3.0),
]


@pytest.mark.parametrize("case", LAST_CASES[1::2], ids=str)
def test_the_last_position_alone_in_float32(case):
    check_last(case, "float32")


@pytest.mark.parametrize("case", LAST_CASES, ids=str)
def test_the_last_position_alone_in_float64(case, x64):
    check_last(case, "float64")


def test_the_last_position_alone_in_bfloat16():
    case = LAST_CASES[1]
    rows, last = np.arange(BATCH), np.array(case.lengths) - 1
    arrays = in_dtype(inputs(case), jnp.bfloat16)
    full, _, _ = sequential(arrays, case.lengths, *cotangents(case))
    arrays["C_last"] = arrays.pop("C")[rows, last]
    actual, gradients = run_last(arrays, jnp.array(case.lengths), jnp.ones((BATCH, HEADS, WIDTH), jnp.bfloat16))
    assert actual.dtype == jnp.bfloat16
    assert_near(actual, full[rows, last], 1e-2, "y")
    assert all(g.dtype == jnp.bfloat16 for g in gradients.values())


@pytest.mark.parametrize("case", [Case(31, 2), Case(50, 1, step_scale=3.0)], ids=str)
def test_the_dense_mask_is_the_dual_form(case, x64):
    arrays = inputs(case)
    L = np.asarray(jax.jit(dense_mask)(arrays["dt"], arrays["A"], dt_bias=arrays["dt_bias"]))
    assert L.shape == (BATCH, HEADS, case.length, case.length)
    assert (np.triu(L, 1) == 0).all()
    assert (np.diagonal(L, axis1=2, axis2=3) == 1).all()
    delta = np.logaddexp(0, arrays["dt"] + arrays["dt_bias"])
    B, C = (np.repeat(arrays[m], HEADS // case.groups, axis=2) for m in "BC")
    mixed = L * np.einsum("bihn,bjhn->bhij", C, B)
    y = np.einsum("bhij,bjh,bjhp->bihp", mixed, delta, arrays["x"]) + arrays["D"][:, None] * arrays["x"]
    assert_near(y, truth(case)[0], 1e-10, "y")


def test_step_sizes():
    dt = jnp.array([[[0.0], [100.0], [-20.0]]], jnp.bfloat16)
    delta = step_size(dt, jnp.array([1.0]), jnp.array([2]))
    assert delta.dtype == jnp.float32
    np.testing.assert_allclose(delta[0, :, 0], [np.log1p(np.e), 101.0, 0.0], rtol=1e-6)
    assert delta[0, 2, 0] == 0
    assert step_size(dt)[0, 2, 0] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (3, 6, 32)}, r"x has shape \(3, 6, 32\), expected \[b, l, h, p\]"),
        ({"x": (3, 0, 4, 8)}, r"x has shape \(3, 0, 4, 8\): its length 0 must be at least 1"),
        ({"dt": (3, 6)}, r"dt has shape \(3, 6\), expected \(3, 6, 4\)"),
        ({"A": (4, 1)}, r"A has shape \(4, 1\), expected \(4,\)"),
        ({"B": (3, 5)}, r"B has shape \(3, 5\), expected \[b, l, n\] or \[b, l, g, n\] with g dividing h=4"),
        ({"B": (3, 6, 3, 5)}, r"B has shape \(3, 6, 3, 5\), expected .* g dividing h=4"),
        ({"B": (3, 6, 0, 5)}, r"B has shape \(3, 6, 0, 5\), expected .* g dividing h=4"),
        ({"B": (3, 7, 2, 5)}, r"B has shape \(3, 7, 2, 5\), expected \(3, 6, 2, 5\)"),
        ({"C": (3, 6, 2, 4)}, r"C has shape \(3, 6, 2, 4\), expected \(3, 6, 2, 5\)"),
        ({"C": (3, 6, 5)}, r"C has shape \(3, 6, 5\), expected \(3, 6, 2, 5\)"),
        ({"D": (3,)}, r"D has shape \(3,\), expected \(4,\)"),
        ({"dt_bias": (1,)}, r"dt_bias has shape \(1,\), expected \(4,\)"),
        ({"initial_state": (3, 4, 5, 8)}, r"initial_state has shape \(3, 4, 5, 8\), expected \(3, 4, 8, 5\)"),
        ({"lengths": (3, 1)}, r"lengths has shape \(3, 1\), expected \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(changed, message):
    shapes = {"x": (3, 6, 4, 8), "dt": (3, 6, 4), "A": (4,), "B": (3, 6, 2, 5), "C": (3, 6, 2, 5)} | changed
    with pytest.raises(ValueError, match=message):
        ssd(**{name: jnp.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"C_last": (3, 6, 2, 5)}, r"C_last has shape \(3, 6, 2, 5\), expected \(3, 2, 5\)"),
        ({"lengths": (2,)}, r"lengths has shape \(2,\), expected \(3,\)"),
        ({"dt": (3, 5, 4)}, r"dt has shape \(3, 5, 4\), expected \(3, 6, 4\)"),
        ({"D": (8,)}, r"D has shape \(8,\), expected \(4,\)"),
        ({"dt_bias": (8,)}, r"dt_bias has shape \(8,\), expected \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit_the_last_position(changed, message):
    shapes = {"x": (3, 6, 4, 8), "dt": (3, 6, 4), "A": (4,), "B": (3, 6, 2, 5), "C_last": (3, 2, 5), "lengths": (3,)}
    with pytest.raises(ValueError, match=message):
        ssd_last(**{name: jnp.ones(shape) for name, shape in (shapes | changed).items()})


def test_options_out_of_range():
    given = [jnp.ones(shape) for shape in [(3, 6, 4, 8), (3, 6, 4), (4,), (3, 6, 5), (3, 6, 5)]]
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        ssd(*given, chunk_size=0)
    with pytest.raises(ValueError, match=r"implementation='cuda' must be one of \('reference', 'xla', .*\), or None"):
        ssd(*given, implementation="cuda")
