"""Runs a JAX function on the PTX of its GPU kernels: they are compiled, interpreted, and the rest is run as it is."""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from tests.kernels.codegen import Kernel, capture
from tests.kernels.ptx.memory import Fault, Memory
from tests.kernels.ptx.program import run


@functools.cache
def compiled(kernel: Kernel, capability: int) -> tuple[str, int]:
    """The PTX of a captured kernel, and the bytes of shared memory that a program of it uses."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        source = pathlib.Path(folder) / "kernel.ttir"
        source.write_text(kernel.text, encoding="utf-8")
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
        result = triton.compile(str(source), target=GPUTarget("cuda", capability, 32), options=options)
    return result.asm["ptx"], result.metadata.shared


def interpret(function: Callable[..., Any], *arguments: Any, capability: int = 80, backwards: bool = False) -> Any:
    """Returns function(*arguments), its Pallas kernels run by the interpreter of PTX.

    Args:
      function: of pytrees of arrays, with Pallas kernels of the Triton backend.
      arguments: what it takes.
      capability: the GPUs to compile for.
      backwards: take the programs and warps of a kernel in the opposite order.

    Raises:
      Fault: for what a kernel may not do.
      ValueError: for kernels inside a loop or a branch of the function.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    leaves = jax.tree.leaves(arguments)
    results = _evaluate(closed.jaxpr, closed.consts, leaves, functools.partial(_launch, capability, backwards))
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _inner(equation: Any) -> list[Jaxpr | ClosedJaxpr]:
    return [value for value in equation.params.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]


def _evaluate(jaxpr: Jaxpr, consts: Any, arguments: Any, launch: Callable[..., Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        name = equation.primitive.name
        if name == "pallas_call":
            outputs = launch(equation, inputs)
        elif name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"):
            (inner,) = (
                i
                for i in _inner(equation)
                if len(i.jaxpr.invars if isinstance(i, ClosedJaxpr) else i.invars) == len(inputs)
            )
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, launch)
        else:
            if "pallas_call" in str(equation):
                raise ValueError(f"a kernel inside {name}: only those that run once can be interpreted")
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _launch(capability: int, backwards: bool, equation: Any, inputs: list[Any]) -> list[Any]:
    (kernel,) = capture(lambda *given: equation.primitive.bind(*given, **equation.params), *inputs)
    text, shared_bytes = compiled(kernel, capability)
    arrays = [np.asarray(a) for a in inputs]
    buffers = [Memory(f"input {i}", a.nbytes, a) for i, a in enumerate(arrays)]
    shapes = [variable.aval for variable in equation.outvars]
    sizes = [int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in shapes]
    outputs = [Memory(f"output {i}", size) for i, size in enumerate(sizes)]
    run(text, buffers + outputs, grid=kernel.grid, shared_bytes=shared_bytes, backwards=backwards)
    for memory in outputs:
        if not memory.written.all():
            raise Fault(f"{kernel.name}: byte {np.argmin(memory.written)} of {memory.name} was never written")
    results = [memory.bytes.view(a.dtype).reshape(a.shape) for memory, a in zip(outputs, shapes, strict=True)]
    return [jax.numpy.asarray(result) for result in results]
