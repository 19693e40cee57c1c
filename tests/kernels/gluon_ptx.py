"""Runs Gluon kernels without a GPU: they are compiled for one, and the interpreter of PTX runs what comes out."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.codegen import Cubin, Resources
from tests.kernels.codegen import resources as read_cubin
from tests.kernels.ptx.memory import Memory
from tests.kernels.ptx.program import run

_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}


@dataclasses.dataclass(frozen=True)
class GluonKernel:
    """What is compiled: a kernel, the dtypes of its arrays, its constants, warps and most registers."""

    kernel: Any
    dtypes: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    maxnreg: int | None = None


@functools.cache
def compiled(kernel: GluonKernel, capability: int) -> tuple[str, bytes, int]:
    """PTX, machine code, and bytes of shared memory; arrays begin at multiples of 16 bytes, as XLA's do."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.kernel.arg_names
    constants = dict(kernel.constants)
    signature = dict(zip([n for n in names if n not in constants], [_TYPES[d] for d in kernel.dtypes], strict=True))
    signature = {name: signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    options = {"num_warps": kernel.num_warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": kernel.maxnreg}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        source = GluonASTSource(kernel.kernel, signature, constants, aligned)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return result.asm["ptx"], result.asm["cubin"], result.metadata.shared


def resources(kernel: GluonKernel, capability: int) -> Resources:
    """What a compiled kernel uses."""
    _, cubin, shared = compiled(kernel, capability)
    return read_cubin(Cubin(cubin, shared))


def run_kernel(
    kernel: GluonKernel,
    arrays: Sequence[np.ndarray],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: int,
    capability: int = 80,
    backwards: bool = False,
) -> list[np.ndarray]:
    """Interprets a kernel on arrays; outputs that it does not write are filled with NaN, or -1 if integers.

    Args:
      kernel: what to run.
      arrays: its arguments.
      out_shapes: shape and dtype of its outputs.
      grid: number of programs.
      capability: the GPUs to compile for.
      backwards: take programs and warps in the opposite order.
    """
    text, _, shared = compiled(kernel, capability)
    inputs = [Memory(f"input {i}", np.asarray(a)) for i, a in enumerate(arrays)]
    # All bits set are a NaN in every dtype of numbers with a point.
    outputs = [
        Memory(f"output {i}", np.full((*shape, jnp.dtype(dtype).itemsize), 255, np.uint8), written=False)
        for i, (shape, dtype) in enumerate(out_shapes)
    ]
    run(text, inputs + outputs, grid=(grid, 1, 1), shared_bytes=shared, backwards=backwards)
    pairs = zip(outputs, out_shapes, strict=True)
    return [memory.bytes.view(jnp.dtype(dtype)).reshape(shape) for memory, (shape, dtype) in pairs]


@dataclasses.dataclass
class Launches:
    """Stands in for `kernels.gluon.launch`: interprets the kernels, or with `only_shapes` just notes them.

    Attributes:
      capability, backwards: as in `run_kernel`.
      only_shapes: run nothing; outputs are not defined.
      seen: (name, kernel, grid) of each call.
    """

    capability: int = 80
    backwards: bool = False
    only_shapes: bool = False
    seen: list[tuple[str, GluonKernel, int]] = dataclasses.field(default_factory=list)

    def __call__(
        self,
        kernel: Any,
        arguments: Sequence[Any],
        out_shapes: Sequence[tuple[tuple[int, ...], Any] | None],
        *,
        grid: int,
        num_warps: int,
        constants: Mapping[str, Any],
        maxnreg: int | None = None,
        name: str,
    ) -> list[Any]:
        given = [a for a in arguments if a is not None]
        arrays = [given[0] if a is None else a for a in arguments]
        shapes = [((1,), np.float32) if shape is None else shape for shape in out_shapes]
        dtypes = tuple(jnp.dtype(a.dtype).name for a in (*arrays, *(jax.ShapeDtypeStruct(*s) for s in shapes)))
        what = GluonKernel(kernel, dtypes, tuple(constants.items()), num_warps, maxnreg)
        self.seen.append((name, what, grid))
        results = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
        if self.only_shapes:
            outputs = [jnp.zeros(r.shape, r.dtype) for r in results]
        else:
            options = {"grid": grid, "capability": self.capability, "backwards": self.backwards}
            outputs = jax.pure_callback(
                lambda *a: tuple(run_kernel(what, a, shapes, **options)), tuple(results), *arrays
            )
        return [None if shape is None else out for shape, out in zip(out_shapes, outputs, strict=True)]


@contextlib.contextmanager
def interpreted(**options: Any) -> Iterator[Launches]:
    """Within, Gluon kernels are interpreted; yields what is launched."""
    launches = Launches(**options)
    with mock.patch("kernels.gluon.launch", launches):
        yield launches
