"""What the model of `issue_model` says of the kernels at the shapes that were timed on an H100, as a record.

    python -m tests.kernels.issue_model_cases --output=experiments/results/kernel_model.json

Kernels are those of the installed JAX, compiled by the installed Triton; the times were measured with other releases of
both. Neither a GPU nor a quiet machine is needed.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.benchmarks.operator_work import default_kernel_config, floor_seconds, work
from experiments.benchmarks.operators import Case
from kernels.causal_conv1d import causal_conv1d
from kernels.selective_scan import selective_scan
from kernels.softmax_cross_entropy import softmax_cross_entropy
from kernels.ssd import SsdConfig, ssd
from tests.kernels.codegen import Kernel, capture, compile_cubin
from tests.kernels.issue_model import BYTES_PER_SECOND, Estimate, Launch, Trips, estimate, read_cubin

TIMES = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "results" / "gpu_h100_ops.json"
PASSES = ("forward", "forward_backward")
# More of spilled registers than this leaves the first cache, which the model does not know.
MOST_STACK = 500


def _case(op: str, **sizes: int) -> Case:
    return Case(op, sizes)


SSD_50 = _case("ssd", b=2048, l=50, h=4, p=32, n=32)
SSD_200 = _case("ssd", b=1024, l=200, h=4, p=32, n=32)
SSD_WIDE = _case("ssd", b=256, l=200, h=4, p=128, n=64)
CONV_50 = _case("causal_conv1d", b=2048, l=50, c=192)
CONV_200 = _case("causal_conv1d", b=1024, l=200, c=192)
SCAN = _case("selective_scan", b=512, l=200, e=128, n=32)
LOSS = _case("softmax_cross_entropy", t=2048, v=12102, d=64)
CASES = (SSD_50, SSD_200, SSD_WIDE, CONV_50, CONV_200, SCAN, LOSS)
# What instructions are counted per. The last three are what one instruction of a warp may handle.
UNITS = {
    "ssd": "token and head",
    "causal_conv1d": "32 inputs",
    "selective_scan": "32 inputs",
    "softmax_cross_entropy": "32 scores",
}


def units(case: Case) -> float:
    """Returns how many of `UNITS` a case has."""
    axes = {"ssd": "blh", "causal_conv1d": "blc", "selective_scan": "ble", "softmax_cross_entropy": "tv"}[case.op]
    return math.prod(case.sizes[axis] for axis in axes) / (1 if case.op == "ssd" else 32)


def call(case: Case, of: str, options: dict[str, Any], dtype: str = "float32") -> tuple[Callable[..., Any], list[Any]]:
    """Returns the function of a pass, "forward" or "forward_backward", with TF32 products, and what it takes."""

    def array(axes: str, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(case.sizes[axis] for axis in axes), dtype)

    wide = functools.partial(array, dtype="float32")
    if case.op == "ssd":
        inputs = {"x": array("blhp"), "dt": wide("blh"), "A": wide("h"), "B": array("bln"), "C": array("bln")}
        inputs |= {"D": wide("h"), "dt_bias": wide("h")}
        apply, y = functools.partial(ssd, precision="default", **options), inputs["x"]
    elif case.op == "causal_conv1d":
        taps = jax.ShapeDtypeStruct((4, case.sizes["c"]), dtype)
        inputs = {"x": array("blc"), "weight": taps, "bias": array("c")}
        apply, y = functools.partial(causal_conv1d, activation="silu", **options), inputs["x"]
    elif case.op == "selective_scan":
        inputs = {"x": array("ble"), "dt": array("ble"), "A": wide("en"), "B": array("bln"), "C": array("bln")}
        inputs |= {"D": wide("e"), "dt_bias": wide("e")}
        apply, y = functools.partial(selective_scan, **options), inputs["x"]
    else:
        inputs, y = {"hidden": array("td"), "embedding": array("vd")}, wide("t")
        targets = jnp.zeros(case.sizes["t"], jnp.int32)
        apply = functools.partial(softmax_cross_entropy, targets=targets, precision="default", **options)
    if of == "forward":
        return lambda inputs: apply(**inputs), [inputs]

    def both(inputs: Any, dy: Any) -> Any:
        value, pull = jax.vjp(lambda inputs: apply(**inputs), inputs)
        return value, pull(dy)

    return both, [inputs, y]


def captured(case: Case, of: str, *, config: Any = None, dtype: str = "float32") -> list[Kernel]:
    """Returns the kernels of a pass in the Pallas form."""
    function, inputs = call(case, of, {"implementation": "pallas_triton", "interpret": False, "config": config}, dtype)
    return capture(function, *inputs)


def trips(case: Case, kernel: Kernel, config: Any) -> tuple[int, ...]:
    """Returns the turns of a kernel's loops, the outermost first."""
    backward = kernel.name.endswith("backward")
    if case.op == "ssd":
        turns = -(-case.sizes["l"] // config.chunk_size)
        return (config.heads_per_program, turns) if backward and config.heads_per_program > 1 else (turns,)
    if case.op == "causal_conv1d":
        strip = -(-case.sizes["l"] // config.segments)
        return (-(-(strip + 3) // config.backward_unroll) if backward else -(-strip // config.forward_unroll),)
    if case.op == "selective_scan":
        return (-(-case.sizes["l"] // config.chunk),)
    name = kernel.name.removeprefix("softmax_cross_entropy_")
    own, other = ("v", "t") if name == "d_embedding" else ("t", "v")
    return (getattr(config, name).split(case.sizes[own], case.sizes[other])[1],)


def launch(case: Case, kernel: Kernel, config: Any) -> Launch:
    """Compiles a kernel of a case and returns it as the model takes it."""
    cubin = compile_cubin(kernel, 90)
    code = read_cubin(cubin.content, shared_bytes=cubin.shared_bytes, num_warps=kernel.num_warps)
    turns = trips(case, kernel, config)
    return Launch(kernel.name, code, math.prod(kernel.grid), turns, units(case), kernel.array_bytes)


def backward_trips(chunks: int, per_block: int) -> Trips:
    """Returns the turns of the loops of the Gluon backward kernel, which begins with the last block of a row.

    A block of k chunks has a sweep over all but the last one, and k steps back.
    """
    counts = [min(per_block, chunks - first) for first in range(0, chunks, per_block)][::-1]
    inside = (tuple(count - 1 for count in counts), tuple(counts))
    return (len(counts), inside) if len(counts) > 1 else (inside,)


def gluon_launches(case: Case, of: str) -> tuple[list[Launch], float]:
    """Compiles the Gluon kernels of a pass of the SSD; returns them, and the bytes moved to add up their parts."""
    from tests.kernels.gluon_ptx import compiled, interpreted

    b, length, h, p, n = (case.sizes[axis] for axis in "blhpn")
    function, inputs = call(case, of, {"implementation": "gluon"})
    with mock.patch("kernels.dispatch.missing", lambda name: None), interpreted(only_shapes=True) as found:
        jax.eval_shape(function, *inputs)
    launches, outside = [], 0.0
    chunks, values, maps, steps = -(-length // 16), b * length * h * p, b * length * n, b * length * h
    for name, kernel, grid in found.seen:
        constants = dict(kernel.constants)
        _, cubin, shared_bytes = compiled(kernel, 90)
        code = read_cubin(cubin, shared_bytes=shared_bytes, num_warps=kernel.num_warps)
        block = constants.get("BLOCK", 64)
        blocks = -(-length // block)
        kept = b * (blocks - 1) * h * p * n if of != "forward" else 0
        if name == "ssd_forward":
            numbers, turns = 2 * values + 2 * maps + steps + kept, (chunks,)
        else:
            # A program of two warpgroups has a whole head.
            by_head = name == "ssd_backward_wgmma"
            splits = 1 if by_head else -(-p // constants["COLUMNS"])
            parts = h if by_head else h * splits // kernel.num_warps
            numbers = 3 * values + (2 + 2 * parts) * maps + (1 + splits) * steps + kept
            turns = (blocks,) if by_head else backward_trips(chunks, block // 16)
            outside += 4 * 2 * (parts + 1) * maps if parts > 1 else 0
        launches.append(Launch(name, code, grid, turns, units(case), 4 * numbers))
    return launches, outside


@dataclass(frozen=True)
class Prediction:
    """Of one pass of an operator.

    Attributes:
      kernels: what the model says of each.
      outside_seconds: of the bytes that XLA moves to put their results together.
      floor_seconds: of what the pass needs to move, or of its products, at the rates measured on one H100.
    """

    kernels: tuple[Estimate, ...]
    outside_seconds: float
    floor_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return sum(one.seconds for one in self.kernels) + self.outside_seconds

    @property
    def share_of_floor(self) -> float:
        """Floor over predicted time."""
        return self.floor_seconds / self.seconds


def _used(case: Case, of: str, config: Any) -> Any:
    """Returns the cut that a pass uses."""
    config = config or default_kernel_config(case, "tfloat32")
    return config.without_gradient if case.op == "ssd" and of == "forward" else config


def predict(case: Case, of: str, config: Any = None, backend: str = "pallas_triton") -> Prediction:
    """Asks the model about a pass of an operator, with the default cut where there is no config."""
    return _predict(case.op, tuple(case.sizes.items()), of, config, backend)


@functools.cache
def _predict(op: str, sizes: tuple[tuple[str, int], ...], of: str, config: Any, backend: str) -> Prediction:
    case = Case(op, dict(sizes))
    ceilings = json.loads(TIMES.read_text())["ops"]["ceilings"]
    rates = ceilings["bytes_a_second"], ceilings["flops_a_second"]["tfloat32"]
    bytes_of = dataclasses.asdict(work(case, "tfloat32"))
    suffix = "" if of == "forward" else "_both"
    floor = floor_seconds(bytes_of["needed" + suffix], bytes_of["flops" + suffix], *rates)
    if backend == "gluon":
        launches, outside_bytes = gluon_launches(case, of)
        return Prediction(tuple(estimate(one) for one in launches), outside_bytes / BYTES_PER_SECOND, floor)
    kernels = captured(case, of, config=config)
    config = _used(case, of, config)
    estimates = tuple(estimate(launch(case, kernel, config)) for kernel in kernels)
    outside = 0.0
    if case.op == "ssd" and of != "forward":
        # Gradients of B and C come in one part per block of heads and split of their width, and are added up.
        parts = case.sizes["h"] // config.heads_per_program * config.width_splits
        maps = math.prod(case.sizes[axis] for axis in "bln") * 4
        outside = 2 * (parts + 1) * maps / BYTES_PER_SECOND if parts > 1 else 0.0
    elif of != "forward":
        outside = max(0.0, bytes_of["moved_both"] - sum(kernel.array_bytes for kernel in kernels)) / BYTES_PER_SECOND
    return Prediction(estimates, outside, floor)


def measured(case: Case, of: str, config: Any = None) -> float | None:
    """Returns the median time of a pass in this cut on one H100, in seconds, or None where nobody timed it."""
    ops, config = json.loads(TIMES.read_text())["ops"], _used(case, of, config)
    for one in ops["comparisons"]:
        same = one["op"] == case.op and one["sizes"] == case.sizes and one["precision"] in ("tfloat32", "float32")
        if same and _as_timed(config) == one["kernel_config"]:
            return one["forms"][f"pallas_triton: {of}"]["median_seconds"]
    for one in ops["sweep"]:
        if one["op"] == case.op and one["sizes"] == case.sizes and one["precision"] == "tfloat32":
            return one["median_seconds"].get(f"{cut_name(config)}: {of}") if case.op == "ssd" else None
    return None


def _as_timed(config: Any) -> dict[str, Any]:
    """Returns a cut as the timed record has it."""
    fields = dataclasses.asdict(config)
    fields.pop("value_chunk_size", None)
    return fields


def cut_name(config: SsdConfig) -> str:
    """Returns what the timed record calls a cut of the SSD."""
    cut = {"chunk": config.chunk_size, "warps": config.forward_warps, "heads": config.heads_per_program}
    return ", ".join(f"{name} {value}" for name, value in {**cut, "segments": config.segments}.items())


def timed_cuts() -> list[tuple[Case, SsdConfig]]:
    """Returns other cuts of the SSD that were timed: two chunks, one, two or four warps."""
    cuts = [(16, 2), (16, 4), (32, 1), (32, 2), (32, 4)]
    return [(SSD_200, SsdConfig(chunk, 1, 1, 1, forward_warps=warps, backward_warps=warps)) for chunk, warps in cuts]


def row(case: Case, of: str, config: Any = None, backend: str = "pallas_triton") -> dict[str, Any]:
    """Returns a row of the record."""
    found = predict(case, of, config, backend)
    ours = backend == "pallas_triton"
    return {
        "op": case.op,
        "backend": backend,
        "sizes": case.sizes,
        "pass": of,
        "default": config is None,
        "config": dataclasses.asdict(_used(case, of, config)) if ours else None,
        "unit": UNITS[case.op],
        "kernels": [_kernel_row(one) for one in found.kernels],
        "outside_seconds": found.outside_seconds,
        "predicted_seconds": found.seconds,
        "floor_seconds": found.floor_seconds,
        "predicted_share_of_floor": found.share_of_floor,
        "measured_seconds": measured(case, of, config) if ours else None,
    }


def _kernel_row(found: Estimate) -> dict[str, Any]:
    code = found.launch.code
    return {
        "name": found.launch.name,
        "programs": found.launch.grid,
        "programs_per_sm": code.programs_per_sm,
        "num_warps": code.num_warps,
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "shared_bytes": code.shared_bytes,
        "instructions_per_unit": found.instructions_per_unit,
        "memory_cycles_per_unit": found.memory_cycles_per_unit,
        "pipe_seconds": found.pipe_seconds,
        "replay_seconds": found.replay_seconds,
        "byte_seconds": found.byte_seconds,
    }


def factor(rows: Iterable[dict[str, Any]], of: str) -> float:
    """Returns the geometric mean of measured over predicted times of an SSD pass, of cuts that spill little."""
    ratios = [
        math.log(row["measured_seconds"] / row["predicted_seconds"])
        for row in rows
        if row["op"] == "ssd" and row["pass"] == of and row["measured_seconds"] is not None
        if all(kernel["stack_bytes"] < MOST_STACK for kernel in row["kernels"])
    ]
    return math.exp(sum(ratios) / len(ratios))


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    output = parser.parse_args(arguments).output
    rows = [
        row(case, of, config) for case, config in [*((case, None) for case in CASES), *timed_cuts()] for of in PASSES
    ]
    rows += [row(case, of, backend="gluon") for case in CASES if case.op == "ssd" for of in PASSES]
    record = {
        "command": f"python -m tests.kernels.issue_model_cases --output={output}",
        "capability": 90,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "triton")},
        "bytes_per_second": BYTES_PER_SECOND,
        "measured_over_predicted": {of: factor(rows, of) for of in PASSES},
        "rows": rows,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
