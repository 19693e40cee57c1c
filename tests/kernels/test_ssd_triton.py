"""The GPU kernels of the SSD operator, interpreted: every way to cut up the work, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.ssd import SsdConfig, default_config, ssd
from tests.kernels.ssd_cases import assert_near, sequential

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
def program(config, products=None):
    @jax.jit
    def run(arrays, lengths, dy, dstate):
        def apply(arrays):
            return ssd(
                **arrays, lengths=lengths, return_final_state=True, config=config, products=products,
                implementation="pallas_triton_interpreted",
            )  # fmt: skip

        (y, state), pull = jax.vjp(apply, arrays)
        return y, state, pull((dy.astype(y.dtype), dstate))[0]

    return run


def check(shape, config, *, lengths=None, products=None, **options):
    arrays, dy, dstate = inputs(shape, **options)
    row_lengths = None if lengths is None else jnp.array(lengths)
    y, state, gradients = program(config, products)(arrays, row_lengths, dy, dstate)
    expected = sequential(arrays, lengths, *(np.asarray(c, np.float64) for c in (dy, dstate)))
    assert_near(y, expected[0], 2e-5, "y")
    assert_near(state, expected[1], 2e-5, "final state")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[2][name], 1e-4, f"gradient by {name}")


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_gives_the_same_values_and_gradients(name):
    shape, changes = CUTS[name]
    check(shape, dataclasses.replace(PLAIN, **changes), products="float32" if "groups" in name else None)


def test_strong_decay_through_segments_and_ragged_rows():
    config = dataclasses.replace(PLAIN, segments=3, heads_per_program=2)
    check((3, 90, 2, 1, 16, 16), config, lengths=(90, 0, 41), step_scale=3.0)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("initial", [True, False])
def test_without_a_final_state(segments, initial):
    """Nothing is written for it, nor for a first state that is zero; y and its gradients are the same."""
    arrays, dy, dstate = inputs((2, 50, 2, 1, 16, 16))
    if not initial:
        arrays["initial_state"] = jnp.zeros_like(arrays["initial_state"])
    config = dataclasses.replace(PLAIN, segments=segments, heads_per_program=2)
    given = arrays if initial else {name: a for name, a in arrays.items() if name != "initial_state"}

    @jax.jit
    def run(given):
        apply = functools.partial(ssd, config=config, implementation="pallas_triton_interpreted")
        y, pull = jax.vjp(lambda given: apply(**given), given)
        return y, pull(dy)[0]

    y, gradients = run(given)
    expected = program(config)(arrays, None, dy, jnp.zeros_like(dstate))
    assert_near(y, expected[0], 1e-6, "y")
    for name, gradient in gradients.items():
        assert_near(gradient, expected[2][name], 1e-6, name)


def test_the_same_bits_every_run():
    arrays, dy, dstate = inputs((2, 70, 4, 1, 16, 16))
    run = program(dataclasses.replace(PLAIN, segments=2, heads_per_program=2))
    for first, second in zip(*(jax.tree.leaves(run(arrays, None, dy, dstate)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)


def sharded_loss(implementation, *, check_vma):
    """(arrays, dy, dstate) -> a number, with rows spread over all devices."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = {"x", "dt", "B", "C", "initial_state"}

    def loss(arrays, dy, dstate):
        y, state = ssd(**arrays, return_final_state=True, config=PLAIN, implementation=implementation)
        return (jnp.sum(y * dy) + jnp.sum(state * dstate))[None]

    def total(arrays, *weights):
        specs = {name: P("data") if name in split else P() for name in arrays}
        options = {"in_specs": (specs, P("data"), P("data")), "out_specs": P("data"), "check_vma": check_vma}
        return jnp.sum(jax.shard_map(loss, mesh=mesh, **options)(arrays, *weights))

    return total


def test_inside_shard_map():
    arrays, dy, dstate = inputs((jax.device_count(), 20, 2, 1, 16, 16))
    # The interpreter itself does not run where JAX checks what varies over the mesh.
    loss = sharded_loss("pallas_triton_interpreted", check_vma=False)
    actual = jax.jit(jax.grad(loss))(arrays, dy, dstate)
    for name, gradient in program(PLAIN)(arrays, None, dy, dstate)[2].items():
        assert_near(actual[name], gradient, 1e-5, name)


def test_inside_a_checked_shard_map():
    arguments = inputs((jax.device_count(), 20, 2, 1, 16, 16))
    program = jax.jit(jax.grad(sharded_loss("pallas_triton", check_vma=True))).trace(*arguments)
    assert "ssd_backward" in str(program.jaxpr)


def test_default_configs_fill_a_large_gpu():
    shape = {"heads": 4, "groups": 1, "width": 32, "state_width": 32, "chunk_size": 64}
    short = default_config(batch=2048, length=50, **shape)
    assert (short.segments, short.chunk_size, short.heads_per_program) == (1, 16, 1)
    long = default_config(batch=1, length=65_536, **shape)
    assert long.segments * shape["heads"] >= 1024
    assert long.heads_per_program == 1
    wide = default_config(batch=512, length=200, **shape | {"width": 128, "state_width": 64})
    assert wide.width_splits == 4


@pytest.mark.parametrize("batch", [1, 7, 4096])
@pytest.mark.parametrize("length", [1, 17, 3000])
@pytest.mark.parametrize("width", [5, 16, 128])
@pytest.mark.parametrize("state_width", [3, 64, 128])
@pytest.mark.parametrize("chunk_size", [1, 24, 256])
def test_default_configs_are_valid(batch, length, width, state_width, chunk_size):
    for groups in (1, 3):
        config = default_config(
            batch=batch, length=length, heads=6, groups=groups, width=width, state_width=state_width,
            chunk_size=chunk_size,
        )  # fmt: skip
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
        ssd(**arrays, config=dataclasses.replace(PLAIN, **changes), implementation="pallas_triton_interpreted")


@pytest.mark.parametrize("implementation", ["pallas_triton", "pallas_triton_interpreted"])
def test_what_the_kernels_do_not_take(implementation, x64):
    arrays, _, _ = inputs(PAPER_50)
    with pytest.raises(ValueError, match="x is float64; the Triton kernels take float32 or bfloat16: use"):
        ssd(**arrays | {"x": arrays["x"].astype(jnp.float64)}, implementation=implementation)
    wide, _, _ = inputs((1, 3, 2, 1, 129, 16))
    with pytest.raises(ValueError, match="p=129 is over the 128 of the Triton kernels"):
        ssd(**wide, implementation=implementation)
    wide, _, _ = inputs((1, 3, 2, 1, 16, 130))
    with pytest.raises(ValueError, match="n=130 is over the 128 of the Triton kernels"):
        ssd(**wide, implementation=implementation)
    with pytest.raises(ValueError, match="products='bfloat16': the GPU kernels multiply float32 tiles in one of"):
        ssd(**arrays, implementation=implementation, products="bfloat16")


def test_products_follow_the_default_precision():
    from kernels.triton_call import products

    assert products(None) == products("tfloat32") == "tfloat32"
    with jax.default_matmul_precision("highest"):
        assert products(None) == "float32"
        assert products("tfloat32") == "tfloat32"
    unknown = "jax_default_matmul_precision='BF16_BF16_F32': the GPU kernels multiply"
    with jax.default_matmul_precision("BF16_BF16_F32"), pytest.raises(ValueError, match=unknown):
        products(None)
