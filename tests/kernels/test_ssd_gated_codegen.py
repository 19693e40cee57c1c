"""What the gated SSD kernels compile to, at the shapes of the published configs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels.ssd import SsdConfig, ssd_gated
from tests.kernels.codegen import CAPABILITIES, capture, compile_kernel
from tests.kernels.test_ssd_codegen import PACKED, PAPER_50, PAPER_200, SHARED_LIMIT, WIDE, report, tiles

KERNELS = ["ssd_gated_forward", "ssd_gated_backward"]
# Bytes of local memory a thread that the backward kernel spills at most, by capability.
SPILLED = {
    "tfloat32": {80: 80, 90: 144, 100: 112},
    "bfloat16": {90: 48},
    "float32": {90: 64},
    "wide": {80: 120, 90: 232},
    "packed": {90: 160},
}


def programs(shape, *, dtype=jnp.float32, products="tfloat32", config=None, packed=False):
    """The kernels of the values and all gradients; with `packed`, of rows that hold several histories."""
    batch, length, heads, width, state = shape

    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    per_head, values, maps = array(heads, dtype=jnp.float32), array(*shape[:4]), array(batch, length, state)
    steps = array(*shape[:3], dtype=jnp.float32)
    arrays = {"x": values, "dt": steps, "A": per_head, "B": maps, "C": maps, "z": values, "D": per_head}
    arrays["dt_bias"] = per_head

    def gradients(arrays, cotangents, starts):
        apply = functools.partial(ssd_gated, implementation="pallas_triton", products=products, config=config)
        return jax.vjp(lambda arrays: apply(**arrays, starts=starts), arrays)[1](cotangents)

    starts = array(batch, length, dtype=jnp.bool_) if packed else None
    return capture(gradients, arrays, (values, steps), starts)


def check(kernels, label, spilled, capabilities=(90,)):
    assert [kernel.name for kernel in kernels] == KERNELS
    for kernel in kernels:
        for capability in capabilities:
            used = report(kernel, capability, label)
            assert used.shared_bytes < SHARED_LIMIT
            assert used.tensor_core_instructions > 0
            if kernel.name == "ssd_gated_backward":
                assert used.stack_bytes <= spilled[capability]
            else:
                assert used.stack_bytes == used.local_accesses == 0


@pytest.mark.parametrize("shape", [PAPER_50, PAPER_200], ids=str)
def test_published_shapes_in_tfloat32(shape):
    # One shape for every generation of GPUs, the others for one: compiling takes seconds.
    check(programs(shape), str(shape), SPILLED["tfloat32"], CAPABILITIES if shape == PAPER_50 else (90,))


@pytest.mark.parametrize(("dtype", "products"), [(jnp.bfloat16, "tfloat32"), (jnp.float32, "float32")])
def test_published_shape_in_other_precisions(dtype, products):
    name = "bfloat16" if dtype == jnp.bfloat16 else products
    check(programs(PAPER_50, dtype=dtype, products=products), f"{PAPER_50} {name}", SPILLED[name])


def test_published_shape_with_wide_heads():
    check(programs(WIDE), str(WIDE), SPILLED["wide"], (80, 90))


def test_packed_rows():
    check(programs(PACKED, packed=True), f"{PACKED} packed", SPILLED["packed"])


# Four warps share the 32 x 32 tiles of an output that is made again by their two blocks of 16 rows.
@pytest.mark.parametrize(("shape", "repeated"), [(PAPER_50, 1), (WIDE, 2)], ids=str)
def test_no_other_product_is_computed_by_two_warps(shape, repeated):
    state, chunk, width = shape[-1], 16 if shape == PAPER_50 else 32, 32
    output = (
        tiles(chunk, chunk, state)  # C B^T
        + tiles(chunk, width, chunk)  # (L o C B^T) delta x
        + tiles(chunk, width, state)  # C S^T
    )
    forward = output + tiles(width, state, chunk)  # x^T B
    backward = repeated * output + (
        tiles(chunk, chunk, state)  # C B^T
        + tiles(chunk, chunk, width)  # dy x^T
        + tiles(chunk, width, chunk)  # M^T dy
        + tiles(chunk, width, state)  # B R^T
        + 2 * tiles(chunk, state, width)  # dy S and x R
        + 2 * tiles(chunk, state, chunk)  # for B and C inside the chunk
        + tiles(width, state, chunk)  # dy^T C
    )
    for kernel, needed in zip(programs(shape), (forward, backward), strict=True):
        assert compile_kernel(kernel, 80).tensor_core_instructions * kernel.num_warps == needed, kernel.name


@pytest.mark.parametrize("shape", [(4096, 200, 2, 16, 128), (4096, 200, 2, 128, 16), (3, 1, 3, 5, 20)], ids=str)
def test_other_widths_lower(shape):
    assert [kernel.name for kernel in programs(shape)] == KERNELS


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_other_chunks_lower(chunk):
    config = SsdConfig(chunk, 1, 4, 1, forward_warps=4, backward_warps=4)
    assert [kernel.name for kernel in programs(PAPER_200, config=config)] == KERNELS
