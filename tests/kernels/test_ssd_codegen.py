"""What the GPU kernels of the SSD operator compile to, at the shapes of the published configs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels.ssd import SsdConfig, ssd
from tests.kernels.codegen import capture, compile_kernel, for_gpus

# b, l, h, p, n
PAPER_50, PAPER_200 = (2048, 50, 4, 32, 32), (2048, 200, 4, 32, 32)
WIDE = (512, 200, 4, 128, 64)
LONG = (1, 65_536, 4, 32, 32)
# Rows of several histories, as they are trained on at every position.
PACKED = (64, 200, 4, 32, 32)
SHORT_KERNELS = ["ssd_forward", "ssd_backward"]
LONG_KERNELS = ["ssd_segments", "ssd_forward", "ssd_requests", "ssd_backward"]
# Bytes of local memory a thread that the backward kernel spills at most, by capability: the compiler hoists loads until
# it runs out of its 255 registers. Times on an H100, not these bytes, chose the cut of small heads with TF32.
# Gradients of log decays that are exact at large steps cost some of them; no GPU has timed that form.
SPILLED = {
    "tfloat32": {80: 8, 90: 120, 100: 80},
    "bfloat16": {90: 128},
    "float32": {90: 8},
    "long": {90: 400},
    "wide": {80: 32, 90: 152},
    "packed": {90: 104},
}
SHARED_LIMIT = 100 * 1024


def programs(shape, *, dtype=jnp.float32, precision="default", config=None, packed=False):
    """The kernels of the value and all gradients; with `packed`, of rows that hold several histories."""
    batch, length, heads, width, state = shape

    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    per_head = array(heads, dtype=jnp.float32)
    arrays = {
        "x": array(batch, length, heads, width),
        "dt": array(batch, length, heads, dtype=jnp.float32),
        "A": per_head,
        "B": array(batch, length, state),
        "C": array(batch, length, state),
        "D": per_head,
        "dt_bias": per_head,
    }

    def gradients(arrays, dy, segment_ids):
        apply = functools.partial(
            ssd, implementation="pallas_triton", interpret=False, precision=precision, config=config
        )
        return jax.vjp(lambda arrays: apply(**arrays, segment_ids=segment_ids), arrays)[1](dy)

    segment_ids = array(batch, length, dtype=jnp.int32) if packed else None
    return capture(gradients, arrays, arrays["x"], segment_ids)


def report(kernel, capability, label):
    """Compiles, prints the table's row, and returns what the kernel uses."""
    used = compile_kernel(kernel, capability)
    print(
        f"{kernel.name:12} {label} warps {kernel.num_warps} programs {kernel.grid[0]} sm_{capability}: registers "
        f"{used.registers} local {used.stack_bytes} B shared {used.shared_bytes} B "
        f"tensor-core {used.tensor_core_instructions} of {used.instructions}"
    )
    return used


def check(kernels, label, spilled, capability=90):
    for kernel in kernels:
        used = report(kernel, capability, label)
        assert used.shared_bytes < SHARED_LIMIT
        assert used.tensor_core_instructions > 0
        if kernel.name == "ssd_backward":
            assert used.stack_bytes <= spilled[capability]
        else:
            assert used.stack_bytes == used.local_accesses == 0


@pytest.mark.parametrize(("shape", "capability"), [*for_gpus(PAPER_50), *for_gpus(PAPER_200, (90,), usual=False)])
def test_published_shapes_in_tfloat32(shape, capability):
    kernels = programs(shape)
    assert [kernel.name for kernel in kernels] == SHORT_KERNELS
    check(kernels, str(shape), SPILLED["tfloat32"], capability)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("dtype", "precision"), [(jnp.bfloat16, "default"), (jnp.float32, "highest")])
def test_published_shape_in_other_precisions(dtype, precision):
    name = "bfloat16" if dtype == jnp.bfloat16 else "float32"
    check(programs(PAPER_50, dtype=dtype, precision=precision), f"{PAPER_50} {name}", SPILLED[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
def test_published_shape_with_wide_heads(capability):
    check(programs(WIDE), str(WIDE), SPILLED["wide"], capability)


def test_packed_rows():
    check(programs(PACKED, packed=True), f"{PACKED} packed", SPILLED["packed"])


def test_one_long_row_fills_the_card():
    kernels = programs(LONG)
    assert [kernel.name for kernel in kernels] == LONG_KERNELS
    assert all(kernel.grid[0] >= 4 * 132 for kernel in kernels)
    check(kernels, str(LONG), SPILLED["long"])


def tiles(rows, columns, inner):
    """Tensor-core instructions of one TF32 product of tiles, 16 x 8 x 8 each."""
    return rows // 16 * (columns // 8) * (inner // 8)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("shape", "width"), [(PAPER_50, 32), (WIDE, 32)], ids=str)
def test_no_product_is_computed_by_two_warps(shape, width):
    state, chunk = shape[-1], 16 if shape == PAPER_50 else 32
    forward = (
        tiles(chunk, chunk, state)  # C B^T
        + tiles(chunk, width, chunk)  # (L o C B^T) x
        + tiles(chunk, width, state)  # C S^T
        + tiles(width, state, chunk)  # x^T B
    )
    backward = (
        tiles(chunk, chunk, state)  # C B^T
        + tiles(chunk, chunk, width)  # dy x^T
        + tiles(chunk, width, chunk)  # M^T dy
        + tiles(chunk, width, state)  # B R^T
        + 2 * tiles(chunk, state, width)  # dy S and x R
        + 2 * tiles(chunk, state, chunk)  # for B and C inside the chunk
        + tiles(width, state, chunk)  # dy^T C
    )
    # Hopper and Blackwell may use larger instructions; Ampere has the one size.
    for kernel, needed in zip(programs(shape), (forward, backward), strict=True):
        assert compile_kernel(kernel, 80).tensor_core_instructions * kernel.num_warps == needed, kernel.name


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("state", [16, 64, 128])
def test_other_widths_lower(width, state):
    assert [kernel.name for kernel in programs((4096, 200, 2, width, state))] == SHORT_KERNELS


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_other_chunks_lower(chunk):
    config = SsdConfig(chunk, 1, 4, 1, forward_warps=4, backward_warps=4)
    assert [kernel.name for kernel in programs(PAPER_200, config=config)] == SHORT_KERNELS


def test_odd_shapes_lower():
    assert [kernel.name for kernel in programs((3, 1, 3, 5, 20))] == SHORT_KERNELS
