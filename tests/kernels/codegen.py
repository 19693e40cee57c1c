"""What a Pallas kernel becomes on a GPU, read without one: lower for CUDA, compile the module, read the cubin."""

import contextlib
import functools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import pytest
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

CAPABILITIES = (80, 90, 100)
_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|OMMA|QMMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")


def for_gpus(case: Any, capabilities: tuple[int, ...] = CAPABILITIES, *, usual: bool = True) -> list[Any]:
    """Returns a case with each GPU generation as parameters of a test; compiling for one takes seconds.

    Args:
      case: the first parameter.
      capabilities: for which to compile; the second parameter.
      usual: Hopper is part of the usual tier; all else is part of the exhaustive one.
    """
    marks = {90: []} if usual else {}
    return [
        pytest.param(case, capability, marks=marks.get(capability, [pytest.mark.exhaustive]), id=f"{case}-{capability}")
        for capability in capabilities
    ]


@dataclass(frozen=True)
class Kernel:
    """A captured kernel.

    Attributes:
      name: the function's name.
      text: its Triton module.
      num_warps, num_stages: how it is launched.
      grid: number of programs.
    """

    name: str
    text: str
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Resources:
    """What the compiled kernel uses.

    Attributes:
      registers: of a thread.
      local_accesses: instructions that touch local memory (spilled registers).
      stack_bytes: of a thread.
      shared_bytes: of a program.
      tensor_core_instructions: in the machine code of one warp.
      instructions: likewise, all.
      loop_instructions: likewise, of the longest loop.
    """

    registers: int
    local_accesses: int
    stack_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    instructions: int
    loop_instructions: int


@contextlib.contextmanager
def some_gpu() -> Iterator[None]:
    """Newer JAX releases want to know the chip when they lower a kernel; the module does not depend on it."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        yield
        return
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def _walk(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _walk(inner.operation)


def capture(function: Callable[..., Any], *arguments: Any) -> list[Kernel]:
    """Lowers jit(function)(*arguments) for CUDA and returns the kernels in it, in order of appearance.

    Args:
      function: anything that calls Triton kernels.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    with some_gpu():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    kernels = []
    for operation in _walk(lowered.compiler_ir("stablehlo").operation):
        attributes = operation.attributes
        if "call_target_name" not in attributes or "triton" not in str(attributes["call_target_name"]):
            continue
        config = attributes["mhlo.backend_config"]
        context = mlir.make_ir_context()
        triton_dialect.register_dialect(context)
        with context:
            text = str(ir.Module.parse(config["ir"].value_bytes))
        sizes = {key: int(config[key].value) for key in ("num_warps", "num_stages", "grid_x", "grid_y", "grid_z")}
        grid = (sizes["grid_x"], sizes["grid_y"], sizes["grid_z"])
        kernels.append(Kernel(config["name"].value, text, sizes["num_warps"], sizes["num_stages"], grid))
    return kernels


def _read(tool: str, *arguments: str) -> str:
    import triton

    binary = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([binary, *arguments], check=True, capture_output=True, text=True).stdout


def _longest_loop(code: str) -> int:
    """Instructions from a label to the last branch back to it, the most of any label."""
    labels: dict[str, int] = {}
    number = longest = 0
    for line in code.splitlines():
        if match := re.match(r"(\.L_\w+):", line):
            labels[match[1]] = number
        if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            number += 1
            # A program ends in a branch to itself, one instruction.
            if (match := re.search(r"\bBRA\b.*\((\.L_\w+)\)", line)) and match[1] in labels:
                longest = max(longest, number - labels[match[1]])
    return longest if longest > 1 else 0


@functools.cache
def compile_kernel(kernel: Kernel, capability: int) -> Resources:
    """Compiles a kernel for one generation of GPUs (80, 90 or 100) and reads what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        source = pathlib.Path(folder) / "kernel.ttir"
        source.write_text(kernel.text, encoding="utf-8")
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
        compiled = triton.compile(str(source), target=GPUTarget("cuda", capability, 32), options=options)
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return read_resources(cubin, compiled.metadata.shared)


def read_resources(cubin: pathlib.Path, shared_bytes: int) -> Resources:
    """Reads what the kernel of a file of machine code uses; its shared memory is known to the compiler alone."""
    usage = _read("cuobjdump", "--dump-resource-usage", str(cubin))
    code = _read("nvdisasm", "-c", str(cubin))
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"no resource usage in {usage!r}")
    instructions = [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    return Resources(
        registers=int(match[1]),
        stack_bytes=int(match[2]),
        shared_bytes=shared_bytes,
        local_accesses=sum(bool(_LOCAL_MEMORY.search(line)) for line in instructions),
        tensor_core_instructions=sum(bool(_TENSOR_CORES.search(line)) for line in instructions),
        instructions=len(instructions),
        loop_instructions=_longest_loop(code),
    )
