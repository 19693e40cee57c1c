"""What the kernels of the causal convolution compile to: registers, local and shared memory, instructions."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels.causal_conv1d import causal_conv1d
from tests.kernels.codegen import capture, compile_kernel, for_gpus, gpu_mesh

KERNELS = ["causal_conv1d_forward", "causal_conv1d_backward"]
# Three backward programs of 256 threads share a multiprocessor's 65,536 registers at 80 a thread.
MOST_REGISTERS = {"causal_conv1d_forward": 48, "causal_conv1d_backward": 80}
CASES = {
    "row 50": ((2048, 50, 192), 4, "silu", jnp.float32),
    "row 200": ((2048, 200, 192), 4, "silu", jnp.float32),
    "row 50, bfloat16": ((2048, 50, 192), 4, "silu", jnp.bfloat16),
    "wide": ((2048, 50, 640), 4, "silu", jnp.float32),
    "hard_swish": ((2048, 50, 128), 4, "hard_swish", jnp.float32),
    "one long row": ((1, 65536, 192), 4, "silu", jnp.float32),
}


def value_and_gradients(activation, dy, *given, segment_ids=None):
    """Runs the kernels, compiled."""
    options = {
        "activation": activation,
        "segment_ids": segment_ids,
        "implementation": "pallas_triton",
        "interpret": False,
    }
    y, pull = jax.vjp(lambda *a: causal_conv1d(*a, **options), *given)
    return [y, *pull(dy)]


def kernels_of(shape, taps, activation, dtype, *, bias=True, packed=False):
    """Captures the kernels of a value and its gradients; with `packed`, of rows that hold several histories."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    parameters = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(taps, shape[2]), (shape[2],)][: 1 + bias]]
    segment_ids = jnp.ones(shape[:2], jnp.int32) if packed else None
    return capture(functools.partial(value_and_gradients, activation, segment_ids=segment_ids), x, x, *parameters)


def check(kernel, capability, shape, most_registers):
    used = compile_kernel(kernel, capability)
    print(
        f"{kernel.name} {shape} warps {kernel.num_warps} programs {kernel.grid[0]} sm_{capability}: "
        f"registers {used.registers} shared {used.shared_bytes} local {used.local_accesses} "
        f"tensor-core {used.tensor_core_instructions} instructions {used.instructions}"
    )
    assert used.local_accesses == used.stack_bytes == 0
    assert used.shared_bytes <= 4096
    assert used.registers <= most_registers


OTHERS = [one for name in CASES if name != "row 50" for one in for_gpus(name, (90,), usual=name == "one long row")]


@pytest.mark.parametrize(("name", "capability"), [*for_gpus("row 50"), *OTHERS])
def test_kernels_stay_in_registers(name, capability):
    kernels = kernels_of(*CASES[name])
    assert [kernel.name for kernel in kernels] == KERNELS
    for kernel in kernels:
        assert kernel.grid[0] >= 2 * 132
        check(kernel, capability, CASES[name][0], MOST_REGISTERS[kernel.name])


@pytest.mark.exhaustive
def test_most_taps_stay_in_registers():
    for kernel in kernels_of((2048, 50, 192), 8, "silu", jnp.float32):
        check(kernel, 90, (2048, 50, 192), 128)


def test_packed_rows_stay_in_registers():
    for kernel in kernels_of((64, 200, 192), 4, "silu", jnp.float32, packed=True):
        # Where histories begin takes some: four forward and two backward programs share a multiprocessor.
        check(kernel, 90, (64, 200, 192), 56 if kernel.name == KERNELS[0] else 104)


def test_lowers_without_bias_and_with_ragged_channels():
    for shape in [(3, 1, 5), (7, 33, 130), (2, 5000, 1)]:
        assert [kernel.name for kernel in kernels_of(shape, 4, "none", jnp.bfloat16, bias=False)] == KERNELS


def test_lowers_in_64_bit_mode(x64):
    assert [kernel.name for kernel in kernels_of((2048, 50, 192), 4, "silu", jnp.float32)] == KERNELS


def test_lowers_inside_shard_map():
    """With the check of what differs between devices; gradients of parameters, the same on all of them, are summed."""
    rows, same = P("devices"), P()
    sharded = jax.shard_map(
        functools.partial(value_and_gradients, "silu"),
        mesh=gpu_mesh("devices", 4),
        in_specs=(rows, rows, same, same),
        out_specs=[rows, rows, same, same],
    )
    x, weight, bias = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2048, 50, 192), (4, 192), (192,)])
    assert [kernel.name for kernel in capture(sharded, x, x, weight, bias)] == KERNELS
    assert "psum" in str(jax.make_jaxpr(sharded)(x, x, weight, bias))
