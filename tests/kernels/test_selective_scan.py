"""Every implementation of the selective scan against a float64 walk along the sequence in another framework."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels.selective_scan import IMPLEMENTATIONS, SelectiveScanConfig, selective_scan, step_size, xla
from tests.kernels.selective_scan_cases import (
    BATCH,
    STATE,
    WIDTH,
    Case,
    assert_near,
    cotangents,
    inputs,
    sequential,
    truth,
)

KERNELS = "pallas_triton_interpreted"
# Small blocks: more than one block of channels a row, ends that lie inside a block, and groups that are skipped.
CONFIG = SelectiveScanConfig(chunk=4, group=2, forward_channels=8, backward_channels=4)
FORMS = {"reference": [{}], "xla": [{"chunk_size": 7}, {"chunk_size": 64}], KERNELS: [{"config": CONFIG}]}
CASES = [
    Case(1),
    Case(31, lengths=(31, 0, 17)),
    Case(50, lengths=(50, 1, 18), initial=True, step_scale=3.0, state=32),
    Case(101, initial=True),
]
SMALL = Case(7, initial=True)
# Outputs and gradients, as shares of the largest magnitude.
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}

by_form = pytest.mark.parametrize(
    ("implementation", "options"),
    [pytest.param(name, o, id=f"{name}-{i}") for name, options in FORMS.items() for i, o in enumerate(options)],
)
by_implementation = pytest.mark.parametrize("implementation", FORMS)
in_plain_jax = pytest.mark.parametrize("implementation", ["reference", "xla"])


def test_the_suite_knows_every_implementation():
    # The compiled kernels are the interpreted ones; they run on GPUs only.
    assert {*FORMS, "pallas_triton"} == set(IMPLEMENTATIONS)


def in_dtype(arrays, dtype):
    return {name: jnp.asarray(a, dtype) for name, a in arrays.items()}


@functools.cache
def _program(implementation, chunk_size, config):
    @jax.jit
    def run(arrays, lengths, dy, dstate):
        def apply(arrays):
            return selective_scan(
                **arrays,
                lengths=lengths,
                return_final_state=True,
                chunk_size=chunk_size,
                implementation=implementation,
                config=config,
            )

        (y, state), pull = jax.vjp(apply, arrays)
        return y, state, pull((dy.astype(y.dtype), dstate.astype(state.dtype)))[0]

    return run


def program(implementation, chunk_size=4, config=CONFIG):
    """Jitted (arrays, lengths or None, dy, dstate) -> y, final state, gradients."""
    return _program(implementation, chunk_size, config)


def lengths_of(case):
    return None if case.lengths is None else jnp.array(case.lengths, jnp.int32)


def weights_of(case, dtype="float32"):
    return [jnp.asarray(c, dtype) for c in cotangents(case)]


def check(case, dtype, implementation, options):
    arrays = in_dtype(inputs(case), dtype)
    y, state, gradients = program(implementation, **options)(arrays, lengths_of(case), *weights_of(case, dtype))
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
def test_values_and_gradients_in_float32(case, implementation, options):
    check(case, "float32", implementation, options)


@in_plain_jax
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float64(case, implementation, x64):
    check(case, "float64", implementation, FORMS[implementation][0])


@pytest.mark.parametrize(("rows", "cut"), [(1, (3, 1)), (2, (2, 2)), (3, (1, 3))])
def test_plain_jax_in_tiles_of_some_rows(rows, cut, monkeypatch, x64):
    # Two tiles of two rows hold one row more than the batch.
    monkeypatch.setattr(xla, "_TILE_VALUES", rows * WIDTH * STATE)
    assert xla._row_tiles(BATCH, WIDTH * STATE) == cut
    assert xla._row_tiles(0, WIDTH * STATE) == (1, 0)
    _program.cache_clear()
    check(CASES[1], "float64", "xla", {"chunk_size": 7})
    check(CASES[3], "float64", "xla", {"chunk_size": 7})
    _program.cache_clear()


@pytest.mark.parametrize("state", [1, 16, 100])
def test_kernels_with_the_tiles_of_a_state_width(state):
    check(Case(13, lengths=(13, 4, 9), initial=True, width=37, state=state), "float32", KERNELS, {"config": None})


@by_implementation
def test_bfloat16_is_close_and_keeps_states_in_float32(implementation):
    case = CASES[2]
    arrays = in_dtype(inputs(case), jnp.bfloat16)
    for name in ("A", "D", "dt_bias", "initial_state"):
        arrays[name] = arrays[name].astype(jnp.float32)
    dy, dstate = (jnp.asarray(c, jnp.bfloat16).astype(jnp.float32) for c in cotangents(case))
    y, state, gradients = program(implementation)(arrays, lengths_of(case), dy, dstate)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected = sequential(arrays, case.lengths, np.asarray(dy, np.float64), np.asarray(dstate, np.float64))
    assert_near(y, expected[0], 1e-2, "y")
    assert_near(state, expected[1], 1e-2, "final state")
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert_near(gradient, expected[2][name], 2e-2, f"gradient by {name}")


@by_implementation
def test_parameters_may_be_bfloat16(implementation):
    arrays = in_dtype(inputs(SMALL), jnp.bfloat16)
    y, state, gradients = program(implementation)(arrays, None, *weights_of(SMALL))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert {g.dtype for g in gradients.values()} == {jnp.dtype(jnp.bfloat16)}
    expected = sequential(arrays, None, *cotangents(SMALL))
    assert_near(y, expected[0], 1e-2, "y")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[2][name], 2e-2, f"gradient by {name}")


@by_implementation
def test_bfloat16_sums_are_float32(implementation):
    # 1 added to a bfloat16 sum of 256 leaves it at 256.
    length = 400
    ones = jnp.ones((1, length, 1), jnp.bfloat16)
    dt = jnp.full((1, length, 1), np.log(np.e - 1), jnp.float32)
    options = {"implementation": implementation, "return_final_state": True}
    y, state = jax.jit(functools.partial(selective_scan, **options))(ones, dt, jnp.array([[-1e-9]]), ones, ones)
    assert state[0, 0, 0] == pytest.approx(length, rel=1e-2)
    assert float(y[0, -1, 0]) == pytest.approx(length, rel=1e-2)


@by_implementation
def test_extreme_decay_gives_finite_gradients(implementation):
    arrays = in_dtype(inputs(SMALL), "float32") | {"dt": jnp.full((BATCH, SMALL.length, WIDTH), 80.0)}
    y, state, gradients = program(implementation)(arrays, None, *weights_of(SMALL))
    for array in (y, state, *gradients.values()):
        assert jnp.isfinite(array).all()
    # Nothing is left of the past: y = delta x (C . B) + D x.
    x, B, C = (np.asarray(arrays[name], np.float64) for name in ("x", "B", "C"))
    delta = 80 + np.asarray(arrays["dt_bias"])
    expected = (delta * np.einsum("bln,bln->bl", B, C)[..., None] + np.asarray(arrays["D"])) * x
    assert_near(y, expected, 1e-6, "y")


@by_implementation
def test_small_steps_keep_their_digits(implementation):
    """Steps of 1e-6 to 1e-2: the derivative of softplus there is the step itself."""
    small = Case(6, initial=True)
    arrays = inputs(small) | {"dt_bias": np.linspace(-14, -4, WIDTH).astype(np.float32).astype(np.float64)}
    expected = sequential(arrays, None, *cotangents(small))[2]["dt"]
    actual = program(implementation)(in_dtype(arrays, "float32"), None, *weights_of(small))[2]["dt"]
    for channel in range(WIDTH):
        assert_near(actual[..., channel], expected[..., channel], 1e-4, f"channel {channel}")


@by_implementation
def test_two_halves_chained_equal_one_pass(implementation):
    case = Case(12, initial=True)
    arrays = in_dtype(inputs(case), "float32")
    half = case.length // 2

    def part(state, positions):
        sliced = {name: a[:, positions] if name in ("x", "dt", "B", "C") else a for name, a in arrays.items()}
        dy = jnp.zeros((BATCH, half, WIDTH))
        return program(implementation)(sliced | {"initial_state": state}, None, dy, jnp.zeros_like(state))[:2]

    first, state = part(arrays["initial_state"], slice(0, half))
    second, state = part(state, slice(half, None))
    expected_y, expected_state, _ = truth(case)
    assert_near(jnp.concatenate([first, second], axis=1), expected_y, 2e-5, "y")
    assert_near(state, expected_state, 2e-5, "final state")


@by_implementation
def test_padding_leaves_the_state_as_it_is(implementation):
    """Rows of padding alone and rows cut short, whatever their padding holds."""
    arrays = in_dtype(inputs(SMALL), "float32")
    weights = jnp.zeros((BATCH, SMALL.length, WIDTH)), jnp.ones((BATCH, WIDTH, STATE))
    run = program(implementation)
    _, state, gradients = run(arrays, jnp.array([0, 1, 4]), *weights)
    np.testing.assert_array_equal(state[0], arrays["initial_state"][0])
    assert (state[1:] != arrays["initial_state"][1:]).all()
    for name in ("x", "dt", "B", "C"):
        assert not gradients[name][:, 4:].any(), name
    np.testing.assert_array_equal(gradients["initial_state"][0], weights[1][0])
    other = arrays | {name: arrays[name].at[:, 4:].add(3.0) for name in ("x", "dt", "B", "C")}
    np.testing.assert_array_equal(run(other, jnp.array([0, 1, 4]), *weights)[1], state)


@by_implementation
def test_vmap_equals_one_after_the_other(implementation):
    arrays = in_dtype(inputs(SMALL), "float32")
    pair = arrays, jax.tree.map(lambda a: 0.9 * a, arrays)
    run = program(implementation)
    stacked = jax.tree.map(lambda *both: jnp.stack(both), *pair)
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(0, None, None, None)))(stacked, None, *weights_of(SMALL))
    for index, single in enumerate(pair):
        expected = jax.tree.leaves(run(single, None, *weights_of(SMALL)))
        for actual, wanted in zip(jax.tree.leaves(mapped), expected, strict=True):
            np.testing.assert_allclose(actual[index], wanted, rtol=1e-4, atol=1e-5)


@by_implementation
def test_rows_over_the_devices_of_a_mesh(implementation):
    devices = jax.devices()
    arrays = in_dtype(inputs(SMALL), "float32")
    parameters = {"A", "D", "dt_bias"}
    rows = {name: jnp.concatenate([a] * len(devices)) for name, a in arrays.items() if name not in parameters}
    shared = {name: arrays[name] for name in parameters}
    lengths = jnp.array([7, 0, 3] * len(devices))

    def row_losses(shared, rows, lengths):
        y, state = selective_scan(
            **shared, **rows, lengths=lengths, return_final_state=True, implementation=implementation, config=CONFIG
        )
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
        return jax.jit(jax.value_and_grad(lambda *a: losses(*a, lengths).sum(), argnums=(0, 1)))(shared, rows)

    both = value_and_gradients(sharded), value_and_gradients(row_losses)
    for actual, wanted in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-3)


@by_implementation
def test_left_out_inputs_are_zeros(implementation):
    arrays = in_dtype(inputs(SMALL), "float32")
    run = program(implementation)
    zeros = {"D": jnp.zeros(WIDTH), "dt_bias": jnp.zeros(WIDTH)}
    zeros["initial_state"] = jnp.zeros((BATCH, WIDTH, STATE))
    without = {name: a for name, a in arrays.items() if name not in zeros}
    shorter, full = run(without, None, *weights_of(SMALL)), run(without | zeros, None, *weights_of(SMALL))
    for actual, expected in zip(shorter[:2], full[:2], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in shorter[2].items():
        np.testing.assert_allclose(gradient, full[2][name], rtol=1e-5, atol=1e-5, err_msg=name)


@by_implementation
def test_gradient_without_the_final_state(implementation):
    arrays = in_dtype(inputs(SMALL), "float32")
    dy, dstate = weights_of(SMALL)

    @jax.jit
    def gradients(arrays):
        apply = functools.partial(selective_scan, implementation=implementation, config=CONFIG)
        return jax.vjp(lambda arrays: apply(**arrays), arrays)[1](dy)[0]

    expected = program(implementation)(arrays, None, dy, 0 * dstate)[2]
    for name, gradient in gradients(arrays).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_memory_of_the_gradient_is_far_from_a_state_for_each_position():
    batch, width, state = 4, 32, 16

    def temporary_bytes(length):
        shapes = [(batch, length, width)] * 2 + [(width, state)] + [(batch, length, state)] * 2
        given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

        def loss(*given):
            return selective_scan(*given, implementation="xla").sum()

        compiled = jax.jit(jax.value_and_grad(loss, argnums=range(5))).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    more = temporary_bytes(2048) - temporary_bytes(1024)
    # Kept: x, delta, their product, y, B and C, some in two layouts, and a state every 16 positions.
    assert more < 0.8 * 1024 * batch * width * state * 4


def test_step_sizes():
    dt = jnp.array([[[0.0], [100.0], [-20.0]]], jnp.bfloat16)
    delta = step_size(dt, jnp.array([1.0]), jnp.array([2]))
    assert delta.dtype == jnp.float32
    np.testing.assert_allclose(delta[0, :, 0], [np.log1p(np.e), 101.0, 0.0], rtol=1e-6)
    assert delta[0, 2, 0] == 0
    assert step_size(dt)[0, 2, 0] > 0


SHAPES = {"x": (3, 6, 8), "dt": (3, 6, 8), "A": (8, 5), "B": (3, 6, 5), "C": (3, 6, 5)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (3, 6)}, r"x has shape \(3, 6\), expected \[b, l, e\]"),
        ({"x": (3, 0, 8)}, r"x has shape \(3, 0, 8\): its length 0 must be at least 1"),
        ({"dt": (3, 6, 1)}, r"dt has shape \(3, 6, 1\), expected \(3, 6, 8\)"),
        ({"A": (8,)}, r"A has shape \(8,\), expected \[e, n\] with e=8"),
        ({"A": (5, 8)}, r"A has shape \(5, 8\), expected \[e, n\] with e=8"),
        ({"A": (8, 0)}, r"A has shape \(8, 0\), expected \[e, n\] with e=8"),
        ({"B": (3, 6, 4)}, r"B has shape \(3, 6, 4\), expected \(3, 6, 5\)"),
        ({"C": (3, 7, 5)}, r"C has shape \(3, 7, 5\), expected \(3, 6, 5\)"),
        ({"D": (5,)}, r"D has shape \(5,\), expected \(8,\)"),
        ({"dt_bias": (1,)}, r"dt_bias has shape \(1,\), expected \(8,\)"),
        ({"initial_state": (3, 5, 8)}, r"initial_state has shape \(3, 5, 8\), expected \(3, 8, 5\)"),
        ({"lengths": (3, 1)}, r"lengths has shape \(3, 1\), expected \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{name: jnp.ones(shape) for name, shape in (SHAPES | changed).items()})


def test_options_out_of_range():
    given = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        selective_scan(**given, chunk_size=0)
    with pytest.raises(ValueError, match=r"implementation='cuda' must be one of \('reference', .*\), or None"):
        selective_scan(**given, implementation="cuda")
    with pytest.raises(ValueError, match="group=4 must divide chunk=6"):
        SelectiveScanConfig(chunk=6, group=4, forward_channels=8, backward_channels=8)
    with pytest.raises(ValueError, match="backward_channels=12 must be a power of two"):
        SelectiveScanConfig(chunk=6, group=3, forward_channels=8, backward_channels=12)


@pytest.mark.parametrize("implementation", ["pallas_triton", KERNELS])
def test_what_the_kernels_do_not_take(implementation):
    given = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="dt is float16: the GPU kernels take float32 and bfloat16"):
        selective_scan(**given | {"dt": given["dt"].astype(jnp.float16)}, implementation=implementation)
    wide = {"A": jnp.ones((8, 129)), "B": jnp.ones((3, 6, 129)), "C": jnp.ones((3, 6, 129))}
    with pytest.raises(ValueError, match="n=129 of A and B: the GPU kernels hold at most 128 state entries"):
        selective_scan(**given | wide, implementation=implementation)
