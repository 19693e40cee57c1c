"""What Gluon kernels share: fragments of the tensor cores and their product, one number per lane, and the launch.

A kernel of W warps works on tensors [W, rows, columns], one matrix per warp, in the layout of the tensor cores' sums
(`fragment`): lane 4 g + q holds rows g and g + 8 of every 16, columns 2 q and 2 q + 1 of every 8. The one product here,
sum + a b^T, takes and gives that layout: which index of a sum is which lane's is free, so that columns 2 q and 2 q + 1
serve as the columns q and q + 4 which the instruction wants, in both factors alike. Nothing moves between lanes, and no
shared memory is used.
"""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.dispatch import varying_axes

# Layouts.


@gluon.constexpr_function
def fragment(warps):
    """Layout of [warps, rows, columns], one matrix per warp."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def fragment_rows(warps):
    """Layout of [warps, rows]: a number per row of a fragment."""
    return gl.SliceLayout(2, fragment(warps))


@gluon.constexpr_function
def fragment_columns(warps):
    """Layout of [warps, columns]: a number per column of a fragment."""
    return gl.SliceLayout(1, fragment(warps))


@gluon.constexpr_function
def per_warp(warps):
    """Layout of [warps]: a number that all lanes of a warp have."""
    return gl.SliceLayout(1, gl.SliceLayout(2, fragment(warps)))


@gluon.constexpr_function
def lanes(warps):
    """Layout of [warps, 16]: a number per lane, the same in both halves of a warp."""
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 0]],
        warp_bases=[[1 << i, 0] for i in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[warps, 16],
    )


# Products.


@gluon.jit
def _to_a(x):
    # TF32 instructions want columns q and q + 4 of a lane, those of 16 bits 2 q and 2 q + 1.
    layout: gl.constexpr = gl.DotOperandLayout(0, x.type.layout, 32 // x.dtype.primitive_bitwidth)
    if x.dtype.primitive_bitwidth == 32:
        w: gl.constexpr = x.shape[0]
        m: gl.constexpr = x.shape[1]
        k: gl.constexpr = x.shape[2]
        x = x.reshape([w, m, k // 8, 4, 2]).permute((0, 1, 2, 4, 3)).reshape([w, m, k])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _to_b(x):
    # x is [w, n, k].
    layout: gl.constexpr = gl.DotOperandLayout(1, x.type.layout, 32 // x.dtype.primitive_bitwidth)
    if x.dtype.primitive_bitwidth == 32:
        w: gl.constexpr = x.shape[0]
        n: gl.constexpr = x.shape[1]
        k: gl.constexpr = x.shape[2]
        x = x.reshape([w, n, k // 8, 4, 2]).permute((0, 1, 2, 4, 3)).reshape([w, n, k])
    return gl.convert_layout(x.permute((0, 2, 1)), layout, assert_trivial=True)


@gluon.jit
def _high(x):
    """What of a float32 number a TF32 factor keeps."""
    return (x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)


@gluon.jit
def product(a, b, total, exact: gl.constexpr):
    """total [w, m, n] + a [w, m, k] b [w, n, k]^T, all fragments.

    m is a multiple of 16, n of 8, k of 8 (float32) or 16 (bfloat16). float32 factors are cut to TF32, or multiplied by
    three products that keep their digits if `exact`; sums are float32.
    """
    if exact and a.dtype == gl.float32:
        a_high = _high(a)
        b_high = _high(b)
        total = mma_v2(_to_a(a - a_high), _to_b(b_high), total, input_precision="tf32")
        total = mma_v2(_to_a(a_high), _to_b(b - b_high), total, input_precision="tf32")
        return mma_v2(_to_a(a_high), _to_b(b_high), total, input_precision="tf32")
    return mma_v2(_to_a(a), _to_b(b), total, input_precision="tf32")


# Arithmetic.


@gluon.jit
def exp2(x):
    """2^x by the special function unit; what is too small for a normal number is 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softplus(x):
    """log(1 + e^x), with its digits also where it is small, and its derivative."""
    tail = exp2(-1.4426950408889634 * gl.abs(x))
    # log(1 + t) = 2 artanh(t / (2 + t)), whose argument is 1/3 at most.
    z = tail / (2.0 + tail)
    s = z * z
    series = 1.0 / 13 + s * (1.0 / 15)
    series = 1.0 / 11 + s * series
    series = 1.0 / 9 + s * series
    series = 1.0 / 7 + s * series
    series = 1.0 / 5 + s * series
    series = 1.0 / 3 + s * series
    value = gl.maximum(x, 0.0) + 2.0 * z * (1.0 + s * series)
    return value, gl.where(x >= 0, 1.0, tail) / (1.0 + tail)


# Numbers that go from lane to lane.


@gluon.constexpr_function
def _shuffles(outputs, inputs):
    """Register i of the output is what the lane numbered by input 1 + i has in input 0."""
    ((value,), *sources), (results,) = inputs, outputs
    return "\n".join(
        f"shfl.sync.idx.b32 {result}, {value}, {source[0]}, 0x1f, -1;"
        for result, source in zip(results, sources, strict=True)
    )


@gluon.constexpr_function
def _shuffle_up(distance):
    return f"shfl.sync.up.b32 $0, $1, {distance}, 0, -1;"


@gluon.constexpr_function
def _shuffle_xor(distance):
    return f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, -1;"


@gluon.jit
def lane_numbers(W: gl.constexpr):
    """[W, 16] in `lanes`: 0 to 15."""
    return gl.arange(0, 16, gl.SliceLayout(0, lanes(W)))[None, :] + gl.zeros([W, 16], gl.int32, lanes(W))


@gluon.jit
def _thread(W: gl.constexpr):
    """[W, 16] in `lanes`: the lane's own number, 0 to 31 (not the same in both halves)."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r,r", [lane_numbers(W)], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def to_rows(x):
    """[W, 16] from `lanes` to `fragment_rows`."""
    W: gl.constexpr = x.shape[0]
    result: gl.constexpr = gl.distributed_type(x.dtype, [W, 16], fragment_rows(W))
    g = _thread(W) >> 2
    return gl.inline_asm(_shuffles, ("=&r", "r", "r", "r"), [x, g, g + 8], result, is_pure=True)


@gluon.jit
def to_columns(x):
    """[W, 16] from `lanes` to `fragment_columns`."""
    W: gl.constexpr = x.shape[0]
    result: gl.constexpr = gl.distributed_type(x.dtype, [W, 16], fragment_columns(W))
    c = (_thread(W) & 3) * 2
    return gl.inline_asm(_shuffles, ("=&r", "r", "r", "r", "r", "r"), [x, c, c + 1, c + 8, c + 9], result, is_pure=True)


@gluon.constexpr_function
def _move(outputs, inputs):
    return f"mov.b32 {outputs[0][0]}, {inputs[0][0]};"


@gluon.jit
def lane_at(x, index: gl.constexpr):
    """Entry `index` of [W, 16] in `lanes`, in all lanes."""
    return gl.inline_asm(_shuffles, ("=&r", "r", "r"), [x, _thread(x.shape[0]) * 0 + index], x.type, is_pure=True)


@gluon.jit
def same_in_warp(x):
    """[W, 16] in `lanes` as [W] in `per_warp`, of numbers that all lanes of a warp have alike."""
    W: gl.constexpr = x.shape[0]
    return gl.inline_asm(_move, ("=r", "r"), [x], gl.distributed_type(x.dtype, [W], per_warp(W)), is_pure=True)


@gluon.jit
def to_warp(x, index: gl.constexpr):
    """Entry `index` of [W, 16] in `lanes`, as [W] in `per_warp`."""
    return same_in_warp(lane_at(x, index))


@gluon.jit
def lane_up(x, distance: gl.constexpr):
    """What the lane `distance` below has; lanes below `distance` keep an undefined number of their own half."""
    asm: gl.constexpr = _shuffle_up(distance)
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)


@gluon.jit
def lane_xor(x, distance: gl.constexpr):
    """What the lane has whose number differs in the bit `distance`."""
    asm: gl.constexpr = _shuffle_xor(distance)
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)


@gluon.jit
def _add_lane_up(x, numbers, distance: gl.constexpr, packed: gl.constexpr):
    joined = lane_numbers(x.shape[0]) >= distance
    if packed:
        joined &= lane_up(numbers, distance) == numbers
    return x + gl.where(joined, lane_up(x, distance), 0.0)


@gluon.jit
def lane_sums(x, numbers, packed: gl.constexpr):
    """Sums of [W, 16] in `lanes` up to each entry; if `packed` over entries of its own number, which do not fall."""
    x = _add_lane_up(x, numbers, 1, packed)
    x = _add_lane_up(x, numbers, 2, packed)
    x = _add_lane_up(x, numbers, 4, packed)
    return _add_lane_up(x, numbers, 8, packed)


# From JAX.


def launch(
    kernel: Any,
    arguments: Sequence[Array | None],
    out_shapes: Sequence[tuple[tuple[int, ...], Any] | None],
    *,
    grid: int,
    num_warps: int,
    constants: Mapping[str, Any],
    maxnreg: int | None = None,
    name: str,
) -> list[Array | None]:
    """Runs a Gluon kernel over a grid; it has no gradient by itself.

    Args:
      kernel: takes a pointer for each argument, then one for each output, then the constants.
      arguments: arrays in device memory; in place of None the kernel gets a pointer that it must not use.
      out_shapes: (shape, dtype) of each output; None for one that the kernel does not write.
      grid: number of programs.
      num_warps: warps of 32 threads per program.
      constants: the kernel's compile-time parameters, by name.
      maxnreg: registers of a thread at most, or None for the compiler's choice.
      name: what profilers show.

    Returns:
      The outputs, None where none was asked for.

    Raises:
      ValueError: without the package jax-triton.
    """
    try:
        import jax_triton
    except ImportError as error:
        raise ValueError(
            f"Gluon kernels are called by the package jax-triton, for Python 3.12 or newer ({error}): install it, or "
            "name another implementation"
        ) from error
    shapes = [((1,), jnp.dtype(jnp.float32)) if shape is None else shape for shape in out_shapes]
    options = {"enable_fp_fusion": True} | ({} if maxnreg is None else {"maxnreg": maxnreg})

    # The call has no batching rule of its own: under vmap one launch follows another.
    @jax.custom_batching.sequential_vmap
    def call(*given: Array) -> list[Array]:
        return jax_triton.triton_call(
            *given,
            kernel=kernel,
            out_type=[jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes],
            grid=(grid,),
            name=name,
            num_warps=num_warps,
            num_stages=1,
            backend_options=options,
            **constants,
        )

    given = [a for a in arguments if a is not None]
    # Inside shard_map the outputs vary over the same mesh axes as the inputs, which the call does not say.
    axes = tuple(sorted(varying_axes(*given)))
    outputs = call(*(given[0] if a is None else a for a in arguments))
    if axes:
        outputs = [out if varying_axes(out) else jax.lax.pcast(out, axes, to="varying") for out in outputs]
    return [None if shape is None else out for shape, out in zip(out_shapes, outputs, strict=True)]
