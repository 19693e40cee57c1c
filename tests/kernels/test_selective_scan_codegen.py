"""What the kernels of the selective scan compile to: registers, local and shared memory, instructions."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kernels.selective_scan import selective_scan
from kernels.selective_scan.config import default_config
from kernels.tiling import power_of_two
from tests.kernels.codegen import capture, compile_kernel, for_gpus, gpu_mesh

NAMES = ["selective_scan_forward", "selective_scan_backward"]
# (b, l, e, n) and for which GPUs.
SHAPES = [
    *for_gpus((2048, 50, 128, 32)),
    *for_gpus((2048, 200, 512, 16), (90,), usual=False),
    *for_gpus((64, 50, 128, 64), (90,), usual=False),
    *for_gpus((64, 50, 128, 128), (90,), usual=False),
]
# Instructions of a warp for each position and state of a thread; all else that a position needs is counted in.
MOST_INSTRUCTIONS = {"selective_scan_forward": 20, "selective_scan_backward": 45}
# Channels of a program, and positions that its code handles once through.
CUT = {
    "selective_scan_forward": lambda config: (config.forward_channels, config.chunk),
    "selective_scan_backward": lambda config: (config.backward_channels, config.group),
}


def kernels_of(shape, dtype=jnp.float32, *, optional=True, packed=False):
    """Captures the kernels of a value and its gradients."""
    b, length, e, n = shape
    wide = {"A": (e, n)}
    if optional:
        wide |= {"D": (e,), "dt_bias": (e,), "initial_state": (b, e, n)}
    narrow = {"x": (b, length, e), "dt": (b, length, e), "B": (b, length, n), "C": (b, length, n)}
    arrays = {name: jax.ShapeDtypeStruct(s, dtype) for name, s in narrow.items()}
    arrays |= {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in wide.items()}
    segment_ids = jnp.ones((b, length), jnp.int32) if packed else None

    def run(arrays, dy):
        def apply(arrays):
            return selective_scan(
                **arrays,
                segment_ids=segment_ids,
                return_final_state=optional,
                implementation="pallas_triton",
                interpret=False,
            )

        y, pull = jax.vjp(apply, arrays)
        return y, pull((dy, arrays["initial_state"]) if optional else dy)

    return capture(run, arrays, arrays["x"])


def check(kernel, capability, shape):
    used = compile_kernel(kernel, capability)
    channels, positions = CUT[kernel.name](default_config(shape[3]))
    states_a_thread = channels * power_of_two(shape[3]) / 32
    print(
        f"{kernel.name} {shape} warps {kernel.num_warps} programs {kernel.grid[0]} sm_{capability}: "
        f"registers {used.registers} shared {used.shared_bytes} local {used.local_accesses} "
        f"tensor-core {used.tensor_core_instructions} instructions {used.instructions}, "
        f"{used.instructions / positions / states_a_thread:.1f} for a state and position"
    )
    assert used.local_accesses == used.stack_bytes == 0
    assert used.shared_bytes <= 1024
    assert used.instructions <= MOST_INSTRUCTIONS[kernel.name] * positions * states_a_thread


@pytest.mark.parametrize(("shape", "capability"), SHAPES)
def test_kernels_stay_in_registers(shape, capability):
    kernels = kernels_of(shape)
    assert [kernel.name for kernel in kernels] == NAMES
    for kernel in kernels:
        check(kernel, capability, shape)


@pytest.mark.exhaustive
def test_bfloat16_stays_in_registers():
    for kernel in kernels_of((2048, 50, 128, 32), jnp.bfloat16):
        check(kernel, 90, (2048, 50, 128, 32))


def test_histories_cost_no_local_memory():
    for kernel in kernels_of((2048, 50, 128, 32), packed=True):
        check(kernel, 90, (2048, 50, 128, 32))


@pytest.mark.parametrize("shape", [(2048, 200, 128, 32), (1, 65536, 128, 16), (3, 1, 5, 1), (2, 7, 130, 128)], ids=str)
def test_lowers_without_optional_inputs(shape):
    assert [kernel.name for kernel in kernels_of(shape, optional=False)] == NAMES


def test_lowers_in_64_bit_mode(x64):
    assert [kernel.name for kernel in kernels_of((64, 50, 128, 32))] == NAMES


def test_lowers_inside_shard_map():
    def loss(A, x, dt, B, C):
        return selective_scan(x, dt, A, B, C, implementation="pallas_triton", interpret=False).sum((1, 2))

    shapes = [(128, 32), (8, 50, 128), (8, 50, 128), (8, 50, 32), (8, 50, 32)]
    split, whole = PartitionSpec("rows"), PartitionSpec()
    sharded = jax.shard_map(loss, mesh=gpu_mesh("rows", 1), in_specs=(whole, *[split] * 4), out_specs=split)
    gradient = jax.grad(lambda *given: sharded(*given).sum(), argnums=range(5))
    kernels = capture(gradient, *[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    assert [kernel.name for kernel in kernels] == NAMES
