"""What the kernels of the cross-entropy over a catalogue compile to: registers, memory, tensor-core instructions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from kernels.softmax_cross_entropy import TritonConfig, softmax_cross_entropy
from kernels.softmax_cross_entropy.config import LoopConfig, triton_config
from kernels.triton import tile_precision
from tests.kernels.codegen import CAPABILITIES, capture, compile_cubin, compile_kernel, for_gpus, gpu_mesh
from tests.kernels.issue_model import read_cubin

KERNELS = [f"softmax_cross_entropy_{name}" for name in ("forward", "d_hidden", "d_embedding")]


@dataclass(frozen=True)
class Case:
    """Sizes t, v, d; the dtype of both sides; how float32 is multiplied; whether items are masked."""

    targets: int
    items: int
    width: int
    dtype: str = "float32"
    precision: str = "default"
    masked: bool = False

    def arguments(self):
        masked = jax.ShapeDtypeStruct((self.items,), jnp.bool_) if self.masked else None
        sides = [jax.ShapeDtypeStruct((rows, self.width), self.dtype) for rows in (self.targets, self.items)]
        return *sides, jax.ShapeDtypeStruct((self.targets,), jnp.int32), masked

    def gradients(self, hidden, embedding, targets, masked):
        def loss(hidden, embedding):
            options = {"precision": self.precision, "implementation": "pallas_triton", "interpret": False}
            return softmax_cross_entropy(hidden, embedding, targets, masked=masked, **options)

        losses, pull = jax.vjp(loss, hidden, embedding)
        return losses, *pull(losses)

    def config(self) -> TritonConfig:
        return triton_config(self.width, jnp.dtype(self.dtype).itemsize, tile_precision(self.precision))


# And for which GPUs; the first for Hopper is part of the usual tests.
CASES = {
    Case(2048, 12102, 64): CAPABILITIES,
    Case(2048, 12102, 64, precision="highest"): (80, 90),
    Case(2048, 12102, 64, dtype="bfloat16"): (80, 90),
    Case(2048, 12102, 64, masked=True): (90,),
    Case(4096, 1_000_000, 64): (90,),
    Case(2048, 12102, 128): (90,),
    Case(2048, 12102, 128, precision="highest"): (90,),
    Case(2048, 12102, 256): CAPABILITIES,
    Case(2048, 12102, 256, precision="highest"): (90,),
    Case(2048, 12102, 256, dtype="bfloat16"): (90,),
}


def most_spills(case, kernel, capability):
    """Instructions on local memory: none, but a few on sm_100 where the gradient by hidden sums rows of 1 KB."""
    return 24 if capability == 100 and case.width == 256 and kernel.name == KERNELS[1] else 0


@pytest.mark.parametrize(
    ("case", "capability"),
    [one for case, gpus in CASES.items() for one in for_gpus(case, gpus, usual=case == next(iter(CASES)))],
)
def test_kernels_stay_in_registers(case, capability):
    kernels = capture(case.gradients, *case.arguments())
    assert [kernel.name for kernel in kernels] == KERNELS
    for kernel in kernels:
        assert kernel.grid[0] >= 120  # Of the 132 multiprocessors of an H100.
        used = compile_kernel(kernel, capability)
        print(
            f"{kernel.name} {case.targets}x{case.items}x{case.width} {case.dtype} {case.precision} "
            f"warps {kernel.num_warps} programs {kernel.grid[0]} sm_{capability}: registers {used.registers} "
            f"shared {used.shared_bytes} local {used.local_accesses} "
            f"tensor-core {used.tensor_core_instructions} instructions {used.instructions}"
        )
        assert used.local_accesses <= most_spills(case, kernel, capability)
        assert used.shared_bytes < 100_000
        assert used.tensor_core_instructions > 0


@pytest.mark.parametrize(
    ("own_rows", "other_rows", "split"),
    [
        # 16 blocks and 24 steps for each of 16 programs: 256 of 264 run at once. 17 would share 379 steps by 23.
        (2048, 12102, (16, 24)),
        # 95 blocks: in two waves three programs each would take 44 steps in turn, two take 32 in one.
        (12102, 2048, (2, 32)),
        (4096, 1_000_000, (8, 3907)),
        # More blocks than run at once need no parts.
        (1_000_000, 4096, (1, 128)),
        (1, 12102, (190, 2)),
        (1, 1, (1, 1)),
    ],
)
def test_loops_are_split_for_whole_waves(own_rows, other_rows, split):
    loop = LoopConfig(128, 32, 64, num_warps=8, num_stages=2)
    parts, steps = loop.split(own_rows, other_rows)
    assert (parts, steps) == split
    all_steps, blocks = pl.cdiv(other_rows, loop.other), loop.blocks(own_rows)
    assert parts * steps >= all_steps > (parts - 1) * steps

    def in_turn(parts):
        return pl.cdiv(blocks * parts, loop.programs) * pl.cdiv(all_steps, parts)

    assert in_turn(parts) <= min(in_turn(1), in_turn(max(1, loop.programs // blocks)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in CASES if 90 in CASES[case]], ids=str)
def test_as_many_programs_share_a_multiprocessor_as_loops_are_split_for(case):
    config = case.config()
    loops = (config.forward, config.d_hidden, config.d_embedding)
    for kernel, loop in zip(capture(case.gradients, *case.arguments()), loops, strict=True):
        compiled = compile_cubin(kernel, 90)
        code = read_cubin(compiled.content, shared_bytes=compiled.shared_bytes, num_warps=kernel.num_warps)
        print(f"{kernel.name} {case}: registers {code.registers} programs {code.programs_per_sm}")
        assert code.programs_per_sm * 132 >= loop.programs


def instructions_of_products(case, loop):
    """Tensor-core instructions of a warp for the two products of a backward step, if no warp repeats another's."""
    per_instruction = 16 * 8 * (16 if case.dtype == "bfloat16" else 8)
    products = 3 if case.precision == "highest" and case.dtype == "float32" else 1
    return 2 * products * loop.own * loop.other * case.width / per_instruction / loop.num_warps


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in CASES if 80 in CASES[case]], ids=str)
def test_warps_share_the_products(case):
    """Exactly at d 64; with the small tiles of wide rows a product of scores may be made by two warps or more."""
    repeated = 1 if case.width == 64 else 2.5
    for kernel in capture(case.gradients, *case.arguments())[1:]:
        used = compile_kernel(kernel, 80)
        assert used.tensor_core_instructions <= repeated * instructions_of_products(case, case.config().d_hidden)


def test_lowers_for_ragged_shapes():
    for targets, items, width in [(1, 1, 1), (33, 70, 20), (5, 12102, 200)]:
        for masked in (False, True):
            case = Case(targets, items, width, masked=masked)
            assert [kernel.name for kernel in capture(case.gradients, *case.arguments())] == KERNELS


def test_lowers_for_two_dtypes():
    case = Case(2048, 12102, 64)
    hidden, embedding, *rest = case.arguments()
    hidden = jax.ShapeDtypeStruct(hidden.shape, jnp.bfloat16)
    assert [kernel.name for kernel in capture(case.gradients, hidden, embedding, *rest)] == KERNELS


def test_lowers_in_64_bit_mode(x64):
    case = Case(2048, 12102, 64, masked=True)
    assert [kernel.name for kernel in capture(case.gradients, *case.arguments())] == KERNELS


def test_lowers_under_vmap():
    case = Case(256, 341, 64)
    stacked = [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in case.arguments()[:3]]
    kernels = capture(jax.vmap(lambda *arrays: case.gradients(*arrays, None)), *stacked)
    assert [kernel.name for kernel in kernels] == KERNELS


def test_lowers_inside_shard_map():
    """With the check of what differs between devices; the gradient of the embedding, the same on all, is summed."""
    case = Case(2048, 12102, 64)
    rows, same = P("data"), P()
    sharded = jax.shard_map(
        lambda *arrays: case.gradients(*arrays, None),
        mesh=gpu_mesh("data", 4),
        in_specs=(rows, same, rows),
        out_specs=(rows, rows, same),
    )
    arguments = case.arguments()[:3]
    assert [kernel.name for kernel in capture(sharded, *arguments)] == KERNELS
    assert "psum" in str(jax.make_jaxpr(sharded)(*arguments))
