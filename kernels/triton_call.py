"""One way to call a Pallas kernel of the Triton backend, shared by the backend files of all operators."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

Products = Literal["tfloat32", "float32"]

_PRODUCTS_OF_PRECISION: dict[str | None, Products] = {
    None: "tfloat32",
    "default": "tfloat32",
    "high": "tfloat32",
    "tensorfloat32": "tfloat32",
    "TF32_TF32_F32": "tfloat32",
    "highest": "float32",
    "float32": "float32",
    "F32_F32_F32": "float32",
    "TF32_TF32_F32_X3": "float32",
}


def products(name: str | None) -> Products:
    """Returns how kernels multiply float32 tiles: as `name` says, or by `jax_default_matmul_precision`.

    "tfloat32" rounds factors to 10 bits of mantissa for the tensor cores; "float32" keeps all 23. Sums are float32.

    Raises:
      ValueError: for another name, or a default precision that the kernels do not offer.
    """
    wanted = name if name is not None else jax.config.jax_default_matmul_precision
    if wanted not in _PRODUCTS_OF_PRECISION and wanted != "tfloat32":
        known = ["tfloat32", *(key for key in _PRODUCTS_OF_PRECISION if key)]
        source = "products" if name is not None else "jax_default_matmul_precision"
        raise ValueError(f"{source}={wanted!r}: the GPU kernels multiply float32 tiles in one of {known}")
    return "tfloat32" if wanted == "tfloat32" else _PRODUCTS_OF_PRECISION[wanted]


def tile_dot(
    a: Array, b: Array, *, products: Products, interpret: bool, trans_a: bool = False, trans_b: bool = False
) -> Array:
    """Multiplies two tiles inside a kernel and sums in float32.

    Args:
      a: [m, k], or [k, m] with `trans_a`; sides are powers of two, 16 at least.
      b: [k, n], or [n, k] with `trans_b`; in the dtype of a.
      products: what becomes of float32 factors; bfloat16 ones are exact anyway.
      interpret: the kernel is interpreted, where every product is float32.

    Returns:
      [m, n] in float32.
    """
    # Named even where it is the default, so that jax_default_matmul_precision has no say here.
    precision = jax.lax.Precision.DEFAULT
    if a.dtype == jnp.float32 and products == "float32":
        # Three products of the tensor cores give what one lacks, several times faster than without tensor cores.
        preset = jax.lax.DotAlgorithmPreset
        precision = preset.F32_F32_F32 if interpret else preset.TF32_TF32_F32_X3
    return pltriton.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)


def power_of_two(size: int, least: int = 16) -> int:
    """Returns the smallest power of two that is at least `size` and `least`; tiles have such sides."""
    return max(least, 1 << (size - 1).bit_length())


def _varying(arrays: Sequence[Array]) -> frozenset[str]:
    """The mesh axes of shard_map over which any of the arrays differs."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def vary_together(*arrays: Array | None) -> tuple[Array | None, ...]:
    """Marks arrays as differing over the same mesh axes of shard_map, as a custom gradient wants its arguments.

    Outside shard_map this does nothing. Its transpose sums the gradient of what was the same everywhere.
    """
    axes = _varying([a for a in arrays if a is not None])

    def mark(a: Array) -> Array:
        missing = axes - _varying([a])
        return jax.lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return tuple(None if a is None else mark(a) for a in arrays)


def triton_call(
    kernel: Callable[..., None],
    arguments: Sequence[Array],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    name: str,
) -> list[Array]:
    """Runs a kernel over a grid; it sees every argument and output whole and loads what it needs.

    Args:
      kernel: takes one reference for each argument, then one for each output.
      arguments: arrays in device memory.
      out_shapes: (shape, dtype) of each output.
      grid: number of programs; keep it one-dimensional, so that `jax.vmap` can add axes.
      num_warps: warps of 32 threads a program.
      num_stages: depth of software pipelining.
      interpret: run as plain JAX, on any platform.
      name: what profilers show.

    Returns:
      The outputs.
    """
    mesh_axes = jax.sharding.ManualAxisType(varying=_varying(arguments))
    outputs = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), manual_axis_type=mesh_axes) for shape, dtype in out_shapes
        ],
        grid=grid,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )(*arguments)
    return list(outputs)
