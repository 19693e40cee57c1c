"""What the kernels of the Pallas Mosaic GPU backend share: their call, and vectors of one number per thread.

A program is one warpgroup, 128 threads of a GPU of compute capability 9.0 or later.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# The interpreter of such kernels has no public name; without it this module, and so the backend, is not available.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from kernels.dispatch import varying_axes

THREADS = 128
# The dtypes that kernels read.
DTYPES = ("float32", "bfloat16")


def program_index(axis: str) -> Array:
    """Returns a program's place along an axis of the grid."""
    return jax.lax.axis_index(axis)


def strided(array: Array, interpret: bool) -> Array:
    """Gives a constant [128] the layout of a loaded one, number i in thread i, as what a loop carries must have."""
    return array if interpret else plgpu.layout_cast(array, plgpu.Layout.WG_STRIDED((THREADS,), 1))


def select(condition: Array, array: Array) -> Array:
    """Returns an array where a scalar condition holds and exact zeros elsewhere, whatever the array holds there."""
    return jnp.where(jnp.broadcast_to(condition, array.shape), array, jnp.zeros_like(array))


def lanes(block: Array, width: int) -> pl.Slice:
    """Returns a block's 128 of `width` columns; the last block begins sooner, so that it ends where the columns do.

    Columns that two blocks have in common are written by both, with the same bits.
    """
    start = block * THREADS
    return pl.ds(start if width % THREADS == 0 else jnp.minimum(start, width - THREADS), THREADS)


def lane_blocks(width: int) -> int:
    """Returns the number of blocks of `lanes`."""
    return -(-width // THREADS)


def pad_lanes(array: Array | None) -> Array | None:
    """Pads the last axis with zeros to 128, the least that `lanes` takes."""
    if array is None or array.shape[-1] >= THREADS:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, THREADS - array.shape[-1])])


def mosaic_call(
    kernel: Callable[..., None],
    arguments: Sequence[Array | None],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: Mapping[str, int],
    interpret: bool,
    name: str,
) -> list[Array]:
    """Runs a kernel over a grid; it sees every argument and output whole, in device memory.

    Args:
      kernel: takes one reference for each argument that is there, then one for each output.
      arguments: arrays in device memory; those that are None are left out.
      out_shapes: (shape, dtype) of each output.
      grid: programs along each named axis, for `program_index`.
      interpret: run by JAX's interpreter of Mosaic GPU kernels, which is slow, on the CPU.
      name: what profilers show.

    Returns:
      The outputs.
    """
    given = [a for a in arguments if a is not None]
    mesh_axes = jax.sharding.ManualAxisType(varying=varying_axes(*given))
    run = plgpu.kernel(
        kernel,
        out_type=tuple(
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), manual_axis_type=mesh_axes) for shape, dtype in out_shapes
        ),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
        interpret=InterpretGPUParams() if interpret else False,
    )
    return list(run(*given))
