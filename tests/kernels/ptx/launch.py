"""Runs a JAX function on the PTX of its GPU kernels: they are compiled, interpreted, and the rest is run as it is."""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

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
      Fault: for what a kernel may not do, or when the function reads outputs that no kernel wrote.
      ValueError: for kernels inside a loop or a branch of the function.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    leaves = jax.tree.leaves(arguments)
    results = _evaluate(closed.jaxpr, closed.consts, leaves, functools.partial(_launch, capability, backwards))
    return jax.tree.unflatten(jax.tree.structure(shape), [_finished(result) for result in results])


@dataclass
class _Unfinished:
    """A kernel's output of which some bytes were never written; only another kernel may have it."""

    kernel: str
    array: np.ndarray
    written: np.ndarray


def _finished(value: Any) -> Any:
    if isinstance(value, _Unfinished):
        raise Fault(f"{value.kernel} never wrote byte {np.argmin(value.written)} of an output {value.array.shape}")
    return value


def _evaluate(jaxpr: Any, consts: Any, arguments: Any, launch: Callable[..., Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [value(variable) for variable in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name == "pallas_call":
            outputs = launch(equation, inputs)
        elif equation.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"):
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, launch)
        else:
            if "pallas_call" in str(equation):
                raise ValueError(f"a kernel inside {equation.primitive.name}: not interpreted")
            outputs = equation.primitive.bind(*(_finished(a) for a in inputs), **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _launch(capability: int, backwards: bool, equation: Any, inputs: list[Any]) -> list[Any]:
    shapes = [variable.aval for variable in equation.invars]
    (kernel,) = capture(lambda *given: equation.primitive.bind(*given, **equation.params), *shapes)
    text, shared_bytes = compiled(kernel, capability)
    memories = []
    for number, given in enumerate(inputs):
        unfinished = isinstance(given, _Unfinished)
        memories.append(Memory(f"input {number}", np.asarray(given.array if unfinished else given)))
        if unfinished:
            memories[-1].written[:] = given.written
    outputs = []
    for number, variable in enumerate(equation.outvars):
        outputs.append(Memory(f"output {number}", np.zeros(variable.aval.shape, variable.aval.dtype), written=False))
    run(text, memories + outputs, grid=kernel.grid, shared_bytes=shared_bytes, backwards=backwards)
    results = []
    for memory, variable in zip(outputs, equation.outvars, strict=True):
        array = memory.bytes.view(variable.aval.dtype).reshape(variable.aval.shape)
        whole = memory.written.all()
        results.append(jax.numpy.asarray(array) if whole else _Unfinished(kernel.name, array, memory.written))
    return results
