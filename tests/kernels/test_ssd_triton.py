"""The GPU kernels of the SSD operator, interpreted: every way to cut up the work, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.ssd import SsdConfig, default_config, ssd
from kernels.triton import tile_precision
from tests.kernels.op_suite import assert_near, ids_of
from tests.kernels.test_ssd import sequential

PLAIN = SsdConfig(chunk_size=16, segments=1, heads_per_program=1, width_splits=1, forward_warps=2, backward_warps=2)
# b, l, h, g, p, n
PAPER_50 = (2, 50, 4, 1, 32, 32)
PAPER_256 = (1, 40, 4, 1, 128, 64)
# A shape and how to cut it up.
CUTS = {
    "one program a head": (PAPER_50, {"chunk_size": 32}),
    "chunks that divide the row": ((1, 64, 2, 1, 16, 16), {}),
    "all heads in one program": (PAPER_50, {"heads_per_program": 4}),
    "heads of two groups": ((1, 33, 4, 2, 16, 16), {"heads_per_program": 2, "chunk_size": 32}),
    "width in splits": (PAPER_256, {"width_splits": 4, "heads_per_program": 2, "chunk_size": 32}),
    "widths that are no powers of two": ((1, 20, 2, 1, 24, 20), {"width_splits": 2}),
    "segments": ((1, 130, 2, 1, 16, 16), {"segments": 4}),
    "segments and heads": ((2, 100, 4, 2, 24, 16), {"segments": 3, "heads_per_program": 2, "width_splits": 2}),
    "more segments than chunks": ((1, 20, 2, 1, 16, 16), {"segments": 7}),
}


def inputs(shape, *, step_scale=1.0, seed=0):
    batch, length, heads, groups, width, state = shape
    rng = np.random.default_rng([seed, *shape])
    arrays = {
        "x": rng.normal(size=(batch, length, heads, width)),
        "dt": step_scale * rng.normal(size=(batch, length, heads)),
        "A": -np.geomspace(1, 16, heads),
        "B": rng.normal(size=(batch, length, groups, state)),
        "C": rng.normal(size=(batch, length, groups, state)),
        "D": rng.normal(size=heads),
        "dt_bias": rng.normal(size=heads),
        "initial_state": rng.normal(size=(batch, heads, width, state)),
    }
    dy, dstate = rng.normal(size=arrays["x"].shape), rng.normal(size=arrays["initial_state"].shape)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (arrays, dy, dstate))


@functools.cache
def program(config, precision=None):
    @jax.jit
    def run(arrays, ids, dy, dstate):
        def apply(arrays):
            return ssd(
                **arrays,
                segment_ids=ids,
                return_final_state=True,
                config=config,
                precision=precision,
                implementation="pallas_triton",
            )

        (y, state), pull = jax.vjp(apply, arrays)
        return y, state, pull((dy.astype(y.dtype), dstate))[0]

    return run


def check(shape, config, *, lengths=None, precision=None, **options):
    arrays, dy, dstate = inputs(shape, **options)
    ids = None if lengths is None else ids_of([(n,) for n in lengths], shape[1])
    y, state, gradients = program(config, precision)(arrays, ids, dy, dstate)
    expected = sequential(arrays, lengths or (shape[1],) * shape[0], *(np.asarray(c, np.float64) for c in (dy, dstate)))
    assert_near(y, expected[0], 2e-5, "y")
    assert_near(state, expected[1], 2e-5, "final state")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[2][name], 1e-4, f"gradient by {name}")


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_gives_the_same_values_and_gradients(name):
    shape, changes = CUTS[name]
    check(shape, dataclasses.replace(PLAIN, **changes), precision="highest" if "groups" in name else None)


def test_strong_decay_through_segments_and_ragged_rows():
    config = dataclasses.replace(PLAIN, segments=3, heads_per_program=2)
    check((3, 90, 2, 1, 16, 16), config, lengths=(90, 0, 41), step_scale=3.0)


def test_the_same_bits_every_run():
    arrays, dy, dstate = inputs((2, 70, 4, 1, 16, 16))
    run = program(dataclasses.replace(PLAIN, segments=2, heads_per_program=2))
    for first, second in zip(*(jax.tree.leaves(run(arrays, None, dy, dstate)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)


def test_value_alone_may_have_chunks_of_its_own():
    """With segments and several histories too, whose numbers are padded for the longer chunks."""
    arrays, _, _ = inputs((2, 70, 4, 1, 16, 16))
    segment_ids = jnp.repeat(jnp.arange(1, 8), 10)[None].repeat(2, axis=0)
    apply = functools.partial(ssd, **arrays, segment_ids=segment_ids, implementation="pallas_triton", interpret=True)
    config = dataclasses.replace(PLAIN, segments=2)
    other = dataclasses.replace(config, value_chunk_size=64)
    assert other.without_gradient == dataclasses.replace(config, chunk_size=64)
    expected = apply(config=config, precision="highest")
    assert "f32[64,64]" in str(jax.make_jaxpr(functools.partial(apply, config=other))())
    np.testing.assert_allclose(apply(config=other, precision="highest"), expected, rtol=1e-4, atol=1e-5)


def test_default_configs_fill_a_large_gpu():
    shape = {"heads": 4, "groups": 1, "width": 32, "state_width": 32, "chunk_size": 64}
    short = default_config(batch=2048, length=50, **shape)
    assert (short.segments, short.chunk_size, short.heads_per_program) == (1, 16, 1)
    assert short.without_gradient.chunk_size == 32
    assert default_config(batch=2048, length=16, **shape).without_gradient.chunk_size == 16
    long = default_config(batch=1, length=65_536, **shape)
    assert long.segments * shape["heads"] >= 1024
    assert long.heads_per_program == 1
    wide = default_config(batch=512, length=200, **shape | {"width": 128, "state_width": 64})
    assert wide.width_splits == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch", [1, 7, 4096])
@pytest.mark.parametrize("length", [1, 17, 3000])
@pytest.mark.parametrize("width", [5, 16, 128])
@pytest.mark.parametrize("state_width", [3, 64, 128])
@pytest.mark.parametrize("chunk_size", [1, 24, 256])
def test_default_configs_are_valid(batch, length, width, state_width, chunk_size):
    for groups in (1, 3):
        config = default_config(
            batch=batch,
            length=length,
            heads=6,
            groups=groups,
            width=width,
            state_width=state_width,
            chunk_size=chunk_size,
        )
        config.check(heads_per_group=6 // groups, width=width)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 24}, "chunk_size=24 must be a power of two from 16 to 128"),
        ({"chunk_size": 256}, "chunk_size=256 must be a power of two from 16 to 128"),
        ({"width_splits": 4}, "width_splits=4 must be a power of two from 1 to 2"),
        ({"forward_warps": 3}, "forward_warps=3 must be a power of two from 1 to 16"),
        ({"backward_warps": 32}, "backward_warps=32 must be a power of two from 1 to 16"),
        ({"segments": 0}, "segments=0 and num_stages=1 must be at least 1"),
        ({"heads_per_program": 3}, "heads_per_program=3 must divide the 4 heads of a group"),
    ],
)
def test_cuts_that_do_not_fit(changes, message):
    arrays, _, _ = inputs(PAPER_50)
    with pytest.raises(ValueError, match=message):
        ssd(**arrays, config=dataclasses.replace(PLAIN, **changes), implementation="pallas_triton")


@pytest.mark.parametrize("interpret", [True, False])
def test_what_the_kernels_do_not_take(interpret, x64):
    run = functools.partial(ssd, implementation="pallas_triton", interpret=interpret)
    arrays, _, _ = inputs(PAPER_50)
    with pytest.raises(ValueError, match="x is float64; the Triton kernels take float32 or bfloat16: use"):
        run(**arrays | {"x": arrays["x"].astype(jnp.float64)})
    wide, _, _ = inputs((1, 3, 2, 1, 129, 16))
    with pytest.raises(ValueError, match="p=129 is over the 128 of the Triton kernels"):
        run(**wide)
    wide, _, _ = inputs((1, 3, 2, 1, 16, 130))
    with pytest.raises(ValueError, match="n=130 is over the 128 of the Triton kernels"):
        run(**wide)
    with pytest.raises(ValueError, match="precision='bfloat16': the GPU kernels multiply float32 tiles in one of"):
        run(**arrays, precision="bfloat16")


def test_precision_follows_the_default():
    assert tile_precision(None) == tile_precision("default") == tile_precision(jax.lax.Precision.HIGH) == "tfloat32"
    assert tile_precision(jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3) == "float32"
    with jax.default_matmul_precision("highest"):
        assert tile_precision(None) == "float32"
        assert tile_precision("default") == "tfloat32"
    unknown = "jax_default_matmul_precision='BF16_BF16_F32': the GPU kernels multiply"
    with jax.default_matmul_precision("BF16_BF16_F32"), pytest.raises(ValueError, match=unknown):
        tile_precision(None)
