"""Every implementation of the selective scan against a float64 walk along the sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.selective_scan import IMPLEMENTATIONS, SelectiveScanConfig, selective_scan, step_size, xla
from tests.kernels.op_suite import (
    BATCH,
    TOLERANCES,
    Case,
    RecurrenceSuite,
    assert_all_near,
    assert_near,
    ids_of,
    numbers,
)
from tests.kernels.walks import recurrence as sequential

WIDTH, STATE = 10, 5
# Small blocks: more than one block of channels per row, ends that lie inside a block, and groups that are skipped.
CONFIG = SelectiveScanConfig(chunk=4, group=2, forward_channels=8, backward_channels=4)


class TestSelectiveScan(RecurrenceSuite):
    op = staticmethod(selective_scan)
    implementations = IMPLEMENTATIONS
    sequential = staticmethod(sequential)
    forms = {
        "reference": {"implementation": "reference"},
        "xla-7": {"implementation": "xla", "chunk_size": 7},
        "xla": {"implementation": "xla", "chunk_size": 64},
        "kernels": {"implementation": "pallas_triton", "config": CONFIG},
        "mosaic": {"implementation": "pallas_mosaic"},
    }
    plain, kernels, thorough = (
        ["reference", "xla-7"],
        ["kernels", "mosaic"],
        ["reference", "xla-7", "kernels", "mosaic"],
    )
    slow = ("mosaic",)  # Its interpreter calls back to Python for each load and store.
    kernel_names = ["selective_scan_forward", "selective_scan_backward"]
    small_sizes = ()
    cases = {
        "one position": Case(1),
        "rows that end": Case(31, ((31,), (), (17,))),
        "strong decay, many states": Case(50, ((50,), (1,), (18,)), initial=True, step_scale=3.0, sizes=(WIDTH, 32)),
        "long": Case(101, initial=True),
        "some histories": Case(30, ((13, 1, 6, 10), (29, 1), (30,))),
        "histories at borders of chunks": Case(30, ((4, 4, 20, 2), (7, 7, 7, 9), (5, 4, 4, 17)), initial=True),
        "histories everywhere": Case(30, ((1,) * 30,) * 3, initial=True),
        "histories with strong decay": Case(30, ((5, 15, 10), (1, 1, 1, 27), (24, 6)), initial=True, step_scale=3.0),
        "histories and rows that end": Case(30, ((3, 21, 6), (), (4, 12, 1)), initial=True),
    }
    shapes = {"x": (3, 6, 8), "dt": (3, 6, 8), "A": (8, 5), "B": (3, 6, 5), "C": (3, 6, 5)}
    bad_shapes = [
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
    ]

    @staticmethod
    def draw(case, rng):
        width, state = case.sizes or (WIDTH, STATE)
        return {
            "x": numbers(rng, BATCH, case.length, width),
            "dt": np.float32(case.step_scale * rng.normal(size=(BATCH, case.length, width))).astype(float),
            "A": np.float32(-np.geomspace(1, 16, state) * np.exp(0.1 * rng.normal(size=(width, state)))).astype(float),
            "B": numbers(rng, BATCH, case.length, state),
            "C": numbers(rng, BATCH, case.length, state),
            "D": numbers(rng, width),
            "dt_bias": numbers(rng, width),
        }

    @staticmethod
    def state_shape(case):
        return (BATCH, *(case.sizes or (WIDTH, STATE)))

    @staticmethod
    def shapes_of_ones(length):
        return {"x": (1, length, 1), "dt": (1, length, 1), "A": (1, 1), "B": (1, length, 1), "C": (1, length, 1)}

    @pytest.mark.parametrize(("rows", "tiles"), [(1, (3, 1)), (2, (2, 2)), (3, (1, 3))])
    def test_plain_jax_in_tiles_of_some_rows(self, rows, tiles, monkeypatch, x64):
        # Two tiles of two rows hold one row more than the batch.
        monkeypatch.setattr(xla, "_TILE_VALUES", rows * WIDTH * STATE)
        assert xla._row_tiles(BATCH, WIDTH * STATE) == tiles
        assert xla._row_tiles(0, WIDTH * STATE) == (1, 0)
        for case in (self.cases["rows that end"], self.cases["histories and rows that end"]):
            arrays, weights = self.given(case)

            def values(arrays, ids=case.ids):
                return selective_scan(**arrays, segment_ids=ids, return_final_state=True, chunk_size=7)

            (y, state), pull = jax.vjp(jax.jit(values), {name: jnp.asarray(a) for name, a in arrays.items()})
            gradients = pull(tuple(jnp.asarray(w) for w in weights))[0]
            assert_all_near((y, state, gradients), self.truth(case), TOLERANCES["float64"])

    @pytest.mark.parametrize("state", [1, 16, 100])
    def test_kernels_with_the_tiles_of_a_state_width(self, state):
        case = Case(13, ((13,), (4,), (9,)), initial=True, sizes=(37, state))
        arrays, (dy, dstate) = jax.tree.map(jnp.float32, self.given(case))
        apply = functools.partial(selective_scan, segment_ids=case.ids, return_final_state=True)
        run = jax.jit(lambda a: jax.vjp(lambda a: apply(**a, implementation="pallas_triton"), a)[0])
        gradients = jax.jit(lambda a: jax.vjp(lambda a: apply(**a, implementation="pallas_triton"), a)[1]((dy, dstate)))
        assert_all_near((*run(arrays), gradients(arrays)[0]), self.truth(case), TOLERANCES["float32"])

    def test_small_steps_keep_their_digits(self, form):
        """Steps of 1e-6 to 1e-2: the derivative of softplus there is the step itself."""
        arrays, weights = self.given(Case(6, initial=True))
        arrays = arrays | {"dt_bias": np.linspace(-14, -4, WIDTH).astype(np.float32).astype(np.float64)}
        expected = self.alone(arrays, None, weights)[2]["dt"]
        actual = self.run(form, arrays, None, weights)[2]["dt"]
        for channel in range(WIDTH):
            assert_near(actual[..., channel], expected[..., channel], 1e-4, f"channel {channel}")

    def test_not_even_what_is_no_number_passes(self, form):
        arrays, weights = self.given(Case(30, initial=True))
        ids = ids_of([(9, 21)] * 3, 30)
        broken = arrays | {"x": np.array(arrays["x"])}
        broken["x"][:, :9] = np.nan
        (y, state, _), expected = self.run(form, broken, ids, weights), self.run(form, arrays, ids, weights)
        np.testing.assert_array_equal(y[:, 9:], expected[0][:, 9:])
        np.testing.assert_array_equal(state, expected[1])
        assert jnp.isnan(y[:, :9]).all()


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
    delta = step_size(dt, jnp.array([1.0]), jnp.array([[True, True, False]]))
    assert delta.dtype == jnp.float32
    np.testing.assert_allclose(delta[0, :, 0], [np.log1p(np.e), 101.0, 0.0], rtol=1e-6)
    assert delta[0, 2, 0] == 0
    assert step_size(dt)[0, 2, 0] > 0


def test_configs_out_of_range():
    with pytest.raises(ValueError, match="group=4 must divide chunk=6"):
        SelectiveScanConfig(chunk=6, group=4, forward_channels=8, backward_channels=8)
    with pytest.raises(ValueError, match="backward_channels=12 must be a power of two"):
        SelectiveScanConfig(chunk=6, group=3, forward_channels=8, backward_channels=12)


@pytest.mark.parametrize("interpret", [True, False])
def test_what_the_kernels_do_not_take(interpret):
    given = {name: jnp.ones(shape) for name, shape in TestSelectiveScan.shapes.items()}
    run = functools.partial(selective_scan, implementation="pallas_triton", interpret=interpret)
    with pytest.raises(ValueError, match="dt is float16: the GPU kernels take float32 and bfloat16"):
        run(**given | {"dt": given["dt"].astype(jnp.float16)})
    wide = {"A": jnp.ones((8, 129)), "B": jnp.ones((3, 6, 129)), "C": jnp.ones((3, 6, 129))}
    with pytest.raises(ValueError, match="n=129 of A and B: the GPU kernels hold at most 128 state entries"):
        run(**given | wide)


@pytest.mark.parametrize("interpret", [True, False])
def test_what_the_kernels_on_mosaic_do_not_take(interpret):
    given = {name: jnp.ones(shape) for name, shape in TestSelectiveScan.shapes.items()}
    run = functools.partial(selective_scan, implementation="pallas_mosaic", interpret=interpret)
    with pytest.raises(ValueError, match="dt is float16: the GPU kernels take float32 and bfloat16"):
        run(**given | {"dt": given["dt"].astype(jnp.float16)})
    wide = {"A": jnp.ones((8, 65)), "B": jnp.ones((3, 6, 65)), "C": jnp.ones((3, 6, 65))}
    with pytest.raises(ValueError, match="n=65 of A and B: the kernels on Mosaic GPU hold at most 64 state entries"):
        run(**given | wide)
    with pytest.raises(ValueError, match="implementation='pallas_mosaic' of selective_scan takes no config: leave"):
        run(**given, config=CONFIG)
