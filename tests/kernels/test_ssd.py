"""Every implementation of the SSD operator against a float64 walk along the sequence."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_tail
from kernels.ssd import IMPLEMENTATIONS, SsdConfig, dense_mask, ssd, ssd_last, ssd_step, xla
from tests.kernels.op_suite import (
    BATCH,
    BY_POSITION,
    PARAMETERS,
    TOLERANCES,
    Case,
    RecurrenceSuite,
    assert_all_near,
    assert_near,
    ids_of,
    in_dtype,
    numbers,
)
from tests.kernels.walks import recurrence as sequential

HEADS, WIDTH, STATE = 4, 8, 5
WHOLE = SsdConfig(chunk_size=16, segments=1, heads_per_program=1, width_splits=1, forward_warps=2, backward_warps=2)
PARTS = dataclasses.replace(WHOLE, segments=4, heads_per_program=2)
# What follows sizes of a case: groups of heads, or 0 for maps without that axis.
SHARED, PAIRS, ALL = (0,), (2,), (4,)
HISTORIES = Case(50, ((13, 1, 26, 10), (25, 24, 1), (50,)), initial=True, sizes=PAIRS)
# Standard deviations of the raw steps, or "mixed"; decay rates are up to the second number.
STEPS = [(1.0, 16.0), (10.0, 16.0), (100.0, 50.0), (1e4, 50.0), ("mixed", 1.0), ("mixed", 50.0), ("mixed", 1e4)]
STEP_CASES = [
    Case(1, initial=True, sizes=(1,)),
    Case(31, ((31,), (), (17,)), sizes=PAIRS),
    Case(32, initial=True, sizes=SHARED),
    HISTORIES,
    Case(200, ((200,), (1,), (64,)), initial=True, sizes=SHARED),
]


class TestSsd(RecurrenceSuite):
    op = staticmethod(ssd)
    # The Gluon kernels run nowhere but on a GPU: test_ssd_gluon has their own tests.
    implementations = {name: function for name, function in IMPLEMENTATIONS.items() if name != "gluon"}
    sequential = staticmethod(sequential)
    forms = {
        "reference": {"implementation": "reference"},
        "xla-7": {"implementation": "xla", "chunk_size": 7},
        "xla-16": {"implementation": "xla", "chunk_size": 16},
        "xla": {"implementation": "xla", "chunk_size": 64},
        "kernels": {"implementation": "pallas_triton", "config": WHOLE},
        "kernels in segments": {"implementation": "pallas_triton", "config": PARTS},
    }
    plain, kernels = ["reference", "xla-16", "xla"], ["kernels", "kernels in segments"]
    thorough = ["reference", "xla-16", *kernels]
    kernel_names = ["ssd_forward", "ssd_backward"]
    small_sizes = PAIRS
    cases = {
        "one position": Case(1, sizes=(1,)),
        "rows that end": Case(31, ((31,), (), (17,)), sizes=PAIRS),
        "initial state": Case(50, initial=True, sizes=PAIRS),
        "long rows that end": Case(200, ((200,), (1,), (64,)), initial=True, sizes=SHARED),
        "strong decay": Case(50, initial=True, step_scale=3.0, sizes=PAIRS),
        "some histories": HISTORIES,
        "histories at borders of chunks": Case(
            50, ((16, 16, 16, 2), (15, 16, 16, 3), (17, 16, 16, 1)), initial=True, sizes=PAIRS
        ),
        "histories everywhere": Case(50, ((1,) * 50,) * 3, initial=True, sizes=PAIRS),
        "histories with strong decay": Case(
            50, ((5, 15, 30), (1, 1, 1, 47), (24, 26)), initial=True, step_scale=3.0, sizes=PAIRS
        ),
        "histories and rows that end": Case(50, ((3, 41, 6), (), (4, 12, 1)), initial=True, sizes=SHARED),
    }
    shapes = {"x": (3, 6, 4, 8), "dt": (3, 6, 4), "A": (4,), "B": (3, 6, 2, 5), "C": (3, 6, 2, 5)}
    bad_shapes = [
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
    ]

    @staticmethod
    def draw(case, rng):
        maps = [BATCH, case.length, *(g for g in case.sizes or (1,) if g), STATE]
        dt = np.float32(case.step_scale * rng.normal(size=(BATCH, case.length, HEADS)))
        return {
            "x": numbers(rng, BATCH, case.length, HEADS, WIDTH),
            "dt": dt.astype(np.float64),
            "A": np.float32(-np.geomspace(1, 16, HEADS)).astype(np.float64),
            "B": numbers(rng, *maps),
            "C": numbers(rng, *maps),
            "D": numbers(rng, HEADS),
            "dt_bias": numbers(rng, HEADS),
        }

    @staticmethod
    def state_shape(case):
        return BATCH, HEADS, WIDTH, STATE

    @staticmethod
    def shapes_of_ones(length):
        ones = (1, length, 1)
        return {"x": (*ones, 1), "dt": ones, "A": (1,), "B": ones, "C": ones}

    @pytest.mark.parametrize("form", ["reference", "xla-16", "kernels"])
    def test_a_map_for_every_head(self, form):
        case = Case(20, initial=True, sizes=ALL)
        arrays, weights = self.given(case)
        assert_all_near(self.run(form, arrays, None, weights), self.truth(case), TOLERANCES["float32"])

    @pytest.mark.parametrize("steps", STEPS, ids=str)
    def test_steps_that_are_large_or_large_beside_small(self, any_form, steps):
        """As near to float64 as the walk step by step, whose largest error over all cases is 6e-6."""
        self.check_steps(any_form, steps, STEP_CASES[3], "float32", 1e-5)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("of_steps", STEP_CASES[:3] + STEP_CASES[4:], ids=lambda case: f"length {case.length}")
    @pytest.mark.parametrize("steps", STEPS, ids=str)
    def test_such_steps_in_other_shapes(self, any_form, steps, of_steps):
        self.check_steps(any_form, steps, of_steps, "float32", 1e-5)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("steps", STEPS, ids=str)
    def test_such_steps_in_bfloat16(self, form, steps):
        self.check_steps(form, steps, STEP_CASES[3], jnp.bfloat16, 3e-2)

    def check_steps(self, form, steps, case, dtype, tolerance):
        """Mixed steps are small ones with 10, 100 and 10,000 strewn in."""
        scale, rate = steps
        rng, (arrays, weights) = np.random.default_rng(7), self.given(case)
        shape = arrays["dt"].shape
        if scale == "mixed":
            large = rng.choice([0, 10, 100, 1e4], p=[0.85, 0.05, 0.05, 0.05], size=shape)
            dt = np.where(large, large, rng.normal(size=shape) - 3)
        else:
            dt = scale * rng.normal(size=shape)
        arrays = arrays | {"dt": dt, "A": -np.geomspace(rate / 16, rate, HEADS)}
        given = {name: jnp.asarray(a, dtype if name in BY_POSITION else "float32") for name, a in arrays.items()}
        actual = self.program(form)(given, case.ids, *in_dtype(weights, "float32"))
        assert_all_near(actual, self.alone(given, case.ids, weights), (tolerance, tolerance))

    def test_products_across_histories_may_overflow(self, any_form):
        """Histories that are each in range, though not one's values times another's."""
        arrays, (dy, dstate) = self.given(dataclasses.replace(HISTORIES, rows=None))
        arrays, dy = {name: np.array(a) for name, a in arrays.items()}, np.array(dy)
        first, second, third = slice(9), slice(9, 20), slice(20, 50)
        for array, part, scale in [
            (arrays["x"], first, 1e10),
            (arrays["B"], first, 1e20),
            (arrays["C"], first, 1e-20),
            (arrays["C"], second, 1e20),
            (dy, third, 1e30),
        ]:
            array[:, part] *= scale
        for array in jax.tree.leaves(self.run(any_form, arrays, ids_of([(9, 11, 30)] * 3, 50), (dy, dstate))):
            assert jnp.isfinite(array).all()

    def test_what_overflows_in_a_history_stays_there(self, any_form):
        """Its neighbours in the same chunk keep the bits of all their gradients."""
        arrays, weights = self.given(dataclasses.replace(HISTORIES, rows=None))
        arrays, ids = {name: np.array(a) for name, a in arrays.items()}, ids_of([(5, 8, 30, 7)] * 3, 50)
        large, part = {name: np.array(a) for name, a in arrays.items()}, slice(5, 13)
        for name in ("x", "B", "C"):
            large[name][:, part] *= 1e15
        found = [self.run(any_form, given, ids, weights) for given in (arrays, large)]
        for name in ("x", "dt", "B", "C"):
            alone, beside = (np.delete(gradients[name], np.s_[part], axis=1) for _, _, gradients in found)
            np.testing.assert_array_equal(alone, beside, err_msg=name)

    def test_a_history_does_not_see_the_step_that_leads_to_it(self, form):
        """It decays nothing, however long: float32 sums that held it would have no digits for the others."""
        arrays, weights = self.given(Case(50, sizes=PAIRS))
        ids = ids_of([(1, 19, 20, 10), (9, 41), (17, 1, 32)], 50)
        starts = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
        arrays = arrays | {name: np.array(arrays[name]) for name in ("x", "dt")}
        arrays["dt"][starts], arrays["x"][starts] = 2.0**24, 2.0**-24
        y, state, gradients = self.run(form, arrays, ids, weights)
        expected = self.alone(arrays, ids, weights)
        assert_near(y, expected[0], 2e-5, "y")
        assert_near(state, expected[1], 2e-5, "final state")
        assert_near(gradients["dt"], expected[2]["dt"], 1e-4, "gradient by dt")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_ends_where_a_history_begins_in_a_later_chunk(self, plain, value):
        arrays, weights = self.given(Case(48, initial=True, sizes=PAIRS))
        ids, spoiled = ids_of([(20, 13, 15)] * 3, 48), arrays | {"x": np.array(arrays["x"])}
        spoiled["x"][0, 5] = value
        # One chunk of 64 holds the whole row.
        sound = {"reference": 20, "xla-16": 33, "xla": 48}[plain]
        clean, found = (self.run(plain, a, ids, weights)[0] for a in (arrays, spoiled))
        assert not jnp.isfinite(found[0, 5:20]).any()
        np.testing.assert_array_equal(found[0, sound:], clean[0, sound:])
        np.testing.assert_array_equal(found[1:], clean[1:])

    @pytest.mark.parametrize(("fit", "rows", "chunks"), [(2, 2, 1), (9, 3, 2)])
    def test_tiles_that_overlap(self, fit, rows, chunks, monkeypatch, x64):
        """Small tiles, of which the last reaches back over positions, and over rows, that are done."""
        case = Case(37, ((8, 7, 16, 3, 3), (31, 1, 1), (1, 1)), initial=True, sizes=PAIRS)
        monkeypatch.setattr(xla, "_TILE_VALUES", fit * HEADS * 4 * WIDTH)
        assert xla._tiling(BATCH, case.length, HEADS, (WIDTH, STATE), 4, None)[1:3] == (rows, chunks)
        arrays, weights = self.given(case)

        @jax.jit
        def run(arrays):
            apply = functools.partial(ssd, segment_ids=case.ids, return_final_state=True, chunk_size=4)
            outputs, pull = jax.vjp(lambda arrays: apply(**arrays), arrays)
            return *outputs, pull(tuple(jnp.asarray(w) for w in weights))[0]

        assert_all_near(run(arrays), self.truth(case), TOLERANCES["float64"])

    def check_golden(self, golden_dir, length, form, dtype):
        with np.load(golden_dir / f"ssd_core_L{length}.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
        assert json.loads(arrays["config_json"].item())["chunk_size"] >= 1
        leaves = {key.removeprefix("in/"): jnp.asarray(a, dtype) for key, a in arrays.items() if key.startswith("in/")}
        dy, dstate = leaves.pop("gy"), leaves.pop("gfinal")
        value_tolerance, gradient_tolerance = TOLERANCES[dtype]
        for kept, weights in [("grad_y", (dy, 0 * dstate)), ("grad_final", (0 * dy, dstate))]:
            y, state, gradients = self.program(form)(leaves, None, *weights)
            assert_near(y, arrays["seq64/y"], value_tolerance, "y")
            assert_near(state, arrays["seq64/final_state"], value_tolerance, "final state")
            names = {f"seq64/{kept}/{name}" for name in gradients}
            assert names == {key for key in arrays if key.startswith(f"seq64/{kept}/")}
            for name, gradient in gradients.items():
                assert_near(gradient, arrays[f"seq64/{kept}/{name}"], gradient_tolerance, f"{kept} by {name}")

    @pytest.mark.parametrize("length", [1, 31, 32, 50])
    def test_stored_vectors_in_float64(self, golden_dir, length, plain, x64):
        self.check_golden(golden_dir, length, plain, "float64")

    def test_stored_vectors_in_float32(self, golden_dir, form):
        self.check_golden(golden_dir, 50, form, "float32")


@jax.jit
def run_last(arrays, last, weight):
    def apply(arrays):
        given = (arrays[name] for name in ("x", "dt", "A", "B", "C_last"))
        return ssd_last(*given, last, D=arrays["D"], dt_bias=arrays["dt_bias"])

    y, pull = jax.vjp(apply, arrays)
    return y, pull(weight)[0]


LAST_CASES = [
    (Case(1, sizes=(1,)), (0, 0, 0)),
    (Case(31, sizes=PAIRS), (30, 0, 16)),
    (Case(200, sizes=SHARED), (199, 0, 63)),
    (Case(50, step_scale=3.0, sizes=ALL), (49, 48, 1)),
]


def check_last(case, last, dtype, tolerances):
    rows, last = np.arange(BATCH), np.array(last)
    arrays, (dy, dstate) = TestSsd.given(case)
    if dtype == jnp.bfloat16:
        arrays, dy = jax.tree.map(lambda a: np.asarray(jnp.asarray(a, dtype), np.float64), (arrays, dy))
    at_last = np.zeros_like(dy)
    at_last[rows, last] = dy[rows, last]
    y, _, expected = TestSsd.alone(arrays, ids_of([(n + 1,) for n in last], case.length), (at_last, 0 * dstate))
    expected["C_last"] = expected.pop("C")[rows, last]
    given = {name: a for name, a in arrays.items() if name != "C"} | {"C_last": arrays["C"][rows, last]}
    actual, gradients = run_last(in_dtype(given, dtype), jnp.array(last), jnp.asarray(dy[rows, last], dtype))
    assert {actual.dtype, *(g.dtype for g in gradients.values())} == {jnp.dtype(dtype)}
    assert_near(actual, y[rows, last], tolerances[0], "y")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[name], tolerances[1], f"gradient by {name}")


@pytest.mark.parametrize(("case", "last"), LAST_CASES[1::2])
def test_the_last_position_alone_in_float32(case, last):
    check_last(case, last, "float32", TOLERANCES["float32"])


@pytest.mark.parametrize(("case", "last"), LAST_CASES)
def test_the_last_position_alone_in_float64(case, last, x64):
    check_last(case, last, "float64", TOLERANCES["float64"])


def test_the_last_position_alone_in_bfloat16():
    check_last(*LAST_CASES[1], jnp.bfloat16, (1e-2, 5e-2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"C_last": (3, 6, 2, 5)}, r"C_last has shape \(3, 6, 2, 5\), expected \(3, 2, 5\)"),
        ({"last": (2,)}, r"last has shape \(2,\), expected \(3,\)"),
        ({"dt": (3, 5, 4)}, r"dt has shape \(3, 5, 4\), expected \(3, 6, 4\)"),
        ({"D": (8,)}, r"D has shape \(8,\), expected \(4,\)"),
        ({"dt_bias": (8,)}, r"dt_bias has shape \(8,\), expected \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit_the_last_position(changed, message):
    shapes = {"x": (3, 6, 4, 8), "dt": (3, 6, 4), "A": (4,), "B": (3, 6, 2, 5), "C_last": (3, 2, 5), "last": (3,)}
    with pytest.raises(ValueError, match=message):
        ssd_last(**{name: jnp.ones(shape) for name, shape in (shapes | changed).items()})


def one_position(dtype="float64", sizes=PAIRS, without=()):
    """Positional arguments of `ssd_step` and its optional ones."""
    arrays = dict(TestSsd.given(Case(1, initial=True, sizes=sizes))[0])
    narrow = {name: jnp.asarray(arrays[name], dtype) for name in BY_POSITION}
    wide = in_dtype(
        {name: arrays[name] for name in (*PARAMETERS, "initial_state")}, jnp.promote_types(dtype, "float32")
    )
    given = narrow | wide
    options = {name: given[name] for name in ("D", "dt_bias") if name not in without}
    return [given[name] for name in ("x", "dt", "A", "B", "C", "initial_state")], options


def step_by_definition(x, dt, A, B, C, state, **options):
    return ssd(x, dt, A, B, C, initial_state=state, return_final_state=True, implementation="reference", **options)


@pytest.mark.parametrize("sizes", [SHARED, PAIRS])
@pytest.mark.parametrize("without", [(), ("D", "dt_bias")])
def test_one_step_is_the_definition_at_length_one(x64, sizes, without):
    arrays, options = one_position(sizes=sizes, without=without)

    def both(step):
        outputs, pull = jax.vjp(lambda *a: step(*a, **options), *arrays)
        return *outputs, *pull(jax.tree.map(jnp.cos, outputs))

    for found, wanted in zip(both(ssd_step), both(step_by_definition), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_rows_without_a_position_keep_their_bits():
    arrays, options = one_position("float32")
    state = arrays[-1]
    _, after = ssd_step(*arrays, segment_ids=jnp.array([[1], [0], [1]]), **options)
    assert np.asarray(after[1]).tobytes() == np.asarray(state[1]).tobytes()
    assert (after[::2] != state[::2]).any(axis=(1, 2, 3)).all()


def test_one_step_of_narrow_values_keeps_a_wide_state():
    arrays, options = one_position(jnp.bfloat16)
    y, after = ssd_step(*arrays, **options)
    assert y.dtype == jnp.bfloat16 and after.dtype == jnp.float32
    expected, expected_state = ssd_step(*in_dtype(arrays, "float32"), **options)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(after, expected_state, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_one_step():
    (x, dt, A, B, C, state), _ = one_position("float32", SHARED)
    with pytest.raises(ValueError, match=r"x \(3, 2, 4, 8\) and dt \(3, 1, 4\) must be \[b, 1, h, p\] and \[b, 1, h\]"):
        ssd_step(jnp.repeat(x, 2, axis=1), dt, A, B, C, state)
    with pytest.raises(ValueError, match=r"B \(3, 1, 1, 7\) and C \(3, 1, 1, 5\) must be \[b, 1, g, n\]"):
        ssd_step(x, dt, A, jnp.zeros((3, 1, 7)), C, state)


@pytest.mark.parametrize("case", [Case(31, sizes=PAIRS), Case(50, step_scale=3.0, sizes=(1,))], ids=str)
def test_the_dense_mask_is_the_dual_form(case, x64):
    arrays, _ = TestSsd.given(case)
    L = np.asarray(jax.jit(dense_mask)(arrays["dt"], arrays["A"], dt_bias=arrays["dt_bias"]))
    assert L.shape == (BATCH, HEADS, case.length, case.length)
    assert (np.triu(L, 1) == 0).all()
    assert (np.diagonal(L, axis1=2, axis2=3) == 1).all()
    delta = np.logaddexp(0, arrays["dt"] + arrays["dt_bias"])
    B, C = (np.repeat(arrays[m], HEADS // case.sizes[0], axis=2) for m in "BC")
    mixed = L * np.einsum("bihn,bjhn->bhij", C, B)
    y = np.einsum("bhij,bjh,bjhp->bihp", mixed, delta, arrays["x"]) + arrays["D"][:, None] * arrays["x"]
    assert_near(y, TestSsd.truth(case)[0], 1e-10, "y")


def test_the_dense_mask_keeps_small_steps_beside_large_ones(x64):
    dt = np.full((1, 40, 1), 0.5)
    dt[0, 5] = 1e6
    small = dense_mask(jnp.asarray(dt, jnp.float32), jnp.array([-1.0], jnp.float32))
    wide = dense_mask(jnp.asarray(dt, jnp.float64), jnp.array([-1.0], jnp.float64))
    np.testing.assert_allclose(small, wide, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("length", "chunk"), [(200, 40), (50, 25), (64, 32), (7, 7), (33, 33), (97, 32), (1000, 40), (20, 20)]
)
def test_chunks_divide_the_length_where_a_near_number_does(length, chunk):
    assert xla._tiling(2, length, 4, (8, 8), 32, None).chunk == chunk


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

    def piece(carry, given, dt, B, C, ids=None):
        tail, state = carry
        options = {"implementation": implementation}
        x = causal_conv1d(given, weight, activation="silu", initial=tail, **options)
        x = x.reshape(*x.shape[:2], HEADS, WIDTH)
        options |= {"initial_state": state, "segment_ids": ids, "return_final_state": True}
        y, state = ssd(x, dt, B=B, C=C, **parameters, **options)
        return (causal_conv1d_tail(given, taps, ids, tail), state), y

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
        ids = ids_of([(n,) for n in lengths], size)
        carry, y = run(carry, *map(take, (given, dt, B, C)), ids)
        for row, real in enumerate(lengths):
            outputs[row, at[row] : at[row] + real] = y[row, :real]
        at = at + lengths
    assert (at == length).all()
    np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(carry, expected_carry, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)
