"""What the kernels of the Pallas Mosaic GPU backend share: their call, and vectors and tiles in registers.

A program is one warpgroup, 128 threads of a GPU of compute capability 9.0 or later.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Neither has a public name; without them this module, and so the backend, is not available.
from jax._src.config import _check_vma
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.dispatch import varying_axes

THREADS = 128
# JAX 0.10 asks for an index beside the reference, of which later releases warn.
_NO_INDEX = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty else ()
# The interpreter of JAX 0.10 cannot read a transposed factor of a product.
INTERPRETS_PRODUCTS = not _NO_INDEX
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


class Tiles:
    """Tiles [64, n] in registers as the tensor cores of Hopper hold their sums, and vectors along one of their sides.

    A row of a tile lies in four threads, n / 4 numbers each.

    Attributes:
      columns: n, a multiple of 8.
      interpret: run by the interpreter, which knows no layouts.
    """

    ROWS = 64

    def __init__(self, columns: int, interpret: bool):
        self.columns, self.interpret = columns, interpret
        self._tile = plgpu.Layout.WGMMA
        # What is left of a tile after a sum over its rows or its columns.
        self._along = {0: plgpu.Layout.WGMMA.reduce(1), 1: plgpu.Layout.WGMMA.reduce(0)}

    def _load(self, ref: Any, index: tuple[Any, ...], layout: Any) -> Array:
        options = {"layout": layout, "optimized": False}
        found = ref[index] if self.interpret else plgpu.load(ref.at[index], *_NO_INDEX, **options)
        return found if found.dtype == jnp.int32 else found.astype(jnp.float32)

    def _cast(self, array: Array, layout: Any) -> Array:
        return array if self.interpret else plgpu.layout_cast(array, layout)

    def load(self, ref: Any, *index: Any) -> Array:
        """Loads a tile in float32."""
        return self._load(ref, index, self._tile)

    def load_vector(self, ref: Any, *index: Any, axis: int) -> Array:
        """Loads what lies along an axis of a tile, [64] or [n], in float32, or in int32."""
        return self._load(ref, index, self._along[axis])

    def zeros(self) -> Array:
        """Returns a tile of zeros, such as a loop may carry."""
        return self._cast(jnp.zeros((self.ROWS, self.columns), jnp.float32), self._tile)

    def full_vector(self, value: float) -> Array:
        """Returns [64] equal numbers, such as a loop may carry."""
        return self._cast(jnp.full((self.ROWS,), value, jnp.float32), self._along[0])

    def spread(self, vector: Array, axis: int) -> Array:
        """Repeats a vector that lies along an axis along the other one."""
        return self._cast(jax.lax.broadcast_in_dim(vector, (self.ROWS, self.columns), (axis,)), self._tile)


def operand(rows: int, columns: int, dtype: Any) -> Any:
    """Returns a place in shared memory from which tensor cores read a factor; its rows are multiples of 128 bytes."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM((rows, columns), dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


def fetch(places: Sequence[tuple[Any, Any]], barrier: Any) -> None:
    """Copies (part of device memory, place in shared memory) and waits; the barrier expects as many arrivals."""
    for source, place in places:
        plgpu.copy_gmem_to_smem(source, place, barrier)
    plgpu.barrier_wait(barrier)


def add_product(total: Any, a: Any, b: Any) -> None:
    """Adds a [m, k] times b [n, k] transposed to an accumulator; float32 factors lose all but 10 bits of mantissa."""
    plgpu.wgmma(total, a, b.transpose((1, 0)))
    plgpu.wgmma_wait(0)


def product(a: Any, b: Any) -> Array:
    """Returns a [m, k] times b [n, k] transposed, of factors in shared memory, in float32."""

    def multiply(total: Any) -> Array:
        add_product(total, a, b)
        return total[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32))


def lanes(block: Array, width: int) -> Any:
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
    scratch: Mapping[str, Any] | None = None,
    scratch_bytes: int = 0,
    interpret: bool,
    name: str,
) -> list[Array]:
    """Runs a kernel over a grid; it sees every argument and output whole, in device memory.

    Args:
      kernel: takes one reference for each argument that is there, then one for each output.
      arguments: arrays in device memory; those that are None are left out.
      out_shapes: (shape, dtype) of each output.
      grid: programs along each named axis, for `program_index`.
      scratch: what the kernel takes by keyword: shared memory of `operand`, barriers.
      scratch_bytes: shared memory for sums over the rows of a tile.
      interpret: run by JAX's interpreter of Mosaic GPU kernels, which is slow, on the CPU.
      name: what profilers show.

    Returns:
      The outputs.
    """
    given = [a for a in arguments if a is not None]
    axes = varying_axes(*given)
    mesh_axes = jax.sharding.ManualAxisType(varying=axes)
    run = plgpu.kernel(
        kernel,
        out_type=tuple(
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), manual_axis_type=mesh_axes) for shape, dtype in out_shapes
        ),
        scratch_types=dict(scratch or {}),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=scratch_bytes
        ),
        kernel_name=name,
        interpret=InterpretGPUParams() if interpret else False,
    )
    # Inside shard_map kernels are traced without marks of what differs between devices, and their outputs lack them.
    with _check_vma(False):
        outputs = run(*given)

    def mark(output: Array) -> Array:
        missing = axes - varying_axes(output)
        return jax.lax.pcast(output, tuple(sorted(missing)), to="varying") if missing else output

    return [mark(output) for output in outputs]
