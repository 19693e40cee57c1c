"""What the kernels of the Pallas Triton backend share: their call, products of tiles, masked loads and stores.

Sides of tiles are powers of two; what lies outside an array is loaded as 0 and not stored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels.dispatch import Precision, precision_name, varying_axes

# The dtypes that kernels read.
DTYPES = ("float32", "bfloat16")
# How float32 tiles are multiplied: factors rounded to 10 bits of mantissa for the tensor cores, or whole. Sums are
# float32.
TilePrecision = Literal["tfloat32", "float32"]
_TILE_PRECISIONS: dict[str | None, TilePrecision] = {
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

_LOG2_E = math.log2(math.e)


def tile_precision(precision: Precision) -> TilePrecision:
    """Returns how kernels multiply float32 tiles: as `precision` says, or by `jax_default_matmul_precision` for None.

    Raises:
      ValueError: for a precision that the kernels do not offer.
    """
    configured = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    wanted = configured if precision is None else precision_name(precision)
    if wanted not in _TILE_PRECISIONS:
        source = "jax_default_matmul_precision" if precision is None else "precision"
        known = [key for key in _TILE_PRECISIONS if key]
        raise ValueError(f"{source}={wanted!r}: the GPU kernels multiply float32 tiles in one of {known}")
    return _TILE_PRECISIONS[wanted]


def tile_dot(
    a: Array, b: Array, *, precision: TilePrecision, interpret: bool, trans_a: bool = False, trans_b: bool = False
) -> Array:
    """Multiplies two tiles inside a kernel and sums in float32.

    Args:
      a: [m, k], or [k, m] with `trans_a`; sides are powers of two, 16 at least.
      b: [k, n], or [n, k] with `trans_b`; in the dtype of a.
      precision: what becomes of float32 factors; bfloat16 ones are exact anyway.
      interpret: the kernel is interpreted, where every product is float32.

    Returns:
      [m, n] in float32.
    """
    # Named even where it is the default, so that jax_default_matmul_precision has no say here.
    of_dot = jax.lax.Precision.DEFAULT
    if a.dtype == jnp.float32 and precision == "float32":
        # Three products of the tensor cores give what one lacks, several times faster than without tensor cores.
        preset = jax.lax.DotAlgorithmPreset
        of_dot = preset.F32_F32_F32 if interpret else preset.TF32_TF32_F32_X3
    return pltriton.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=of_dot)


def exp2(a: Array, interpret: bool) -> Array:
    """Returns 2^a by the one instruction that GPUs have for it; what is under 2^-126 becomes 0."""
    # Inline instructions of a scalar come out with a shape that nothing else takes.
    if interpret or not a.shape:
        return jnp.exp2(a)
    [power] = pltriton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[a],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )
    return power


def exp(a: Array, interpret: bool) -> Array:
    """Returns e^a for float32 by two instructions, where the library's function takes eight.

    Its relative error grows with a, by 2^-24 |a| or so: less than 2^-24 of the largest where that is e^0.
    """
    return jnp.exp(a) if interpret else exp2(a * _LOG2_E, interpret)


@dataclass(frozen=True)
class Span:
    """A run of indices along one axis: first index, power-of-two count, and how many indices the axis has."""

    start: Any
    count: int
    limit: int

    def inside(self) -> Array | None:
        """[count] bool, or None where nothing can lie outside."""
        if isinstance(self.start, int) and self.start + self.count <= self.limit:
            return None
        return self.start + jnp.arange(self.count) < self.limit


def _mask(spans: Sequence[Span], when: Array | None) -> Array | None:
    mask, shape = None, [span.count for span in spans]
    for axis, span in enumerate(spans):
        inside = span.inside()
        if inside is not None:
            inside = jnp.broadcast_to(jnp.expand_dims(inside, [a for a in range(len(spans)) if a != axis]), shape)
            mask = inside if mask is None else mask & inside
    if when is None:
        return mask
    return jnp.broadcast_to(when, shape) if mask is None else mask & when


def _indexer(index: Sequence[Any]) -> tuple[tuple[Any, ...], list[Span]]:
    spans = [i for i in index if isinstance(i, Span)]
    return tuple(pl.ds(i.start, i.count) if isinstance(i, Span) else i for i in index), spans


def load_tile(ref: Any, *index: Any, when: Array | None = None) -> Array:
    """Loads ref at integers and `Span`s; what lies outside the array is 0, and all of it unless `when`."""
    at, spans = _indexer(index)
    mask = _mask(spans, when)
    return pltriton.load(ref.at[at], mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store_tile(ref: Any, tile: Array, *index: Any, when: Array | None = None) -> None:
    """Stores a tile at integers and `Span`s; what lies outside the array is left out, and all of it unless `when`."""
    at, spans = _indexer(index)
    pltriton.store(ref.at[at], tile.astype(ref.dtype), mask=_mask(spans, when))


def triton_call(
    kernel: Callable[..., None],
    arguments: Sequence[Array | None],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: int,
    num_warps: int,
    num_stages: int = 1,
    interpret: bool,
    name: str,
) -> list[Array]:
    """Runs a kernel over a grid; it sees every argument and output whole and loads what it needs.

    Args:
      kernel: takes one reference for each argument that is there, then one for each output.
      arguments: arrays in device memory; those that are None are left out.
      out_shapes: (shape, dtype) of each output.
      grid: number of programs, in one dimension, so that `jax.vmap` can add others.
      num_warps: warps of 32 threads per program.
      num_stages: depth of software pipelining.
      interpret: run as plain JAX, on any platform.
      name: what profilers show.

    Returns:
      The outputs.
    """
    given = [a for a in arguments if a is not None]
    mesh_axes = jax.sharding.ManualAxisType(varying=varying_axes(*given))
    outputs = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), manual_axis_type=mesh_axes) for shape, dtype in out_shapes
        ],
        grid=(grid,),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )(*given)
    return list(outputs)
