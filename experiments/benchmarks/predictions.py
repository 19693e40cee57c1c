"""What the GPU kernels should cost, from their compiled code and the bytes that they move; no GPU takes part.

Every number is a prediction: registers, spills and shared memory are those of the `triton` package's compiler, which
need not be the one inside JAX, and times are bytes over an assumed bandwidth, as if nothing else took time.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmarks.gpu_cases import LONG_CASES, OPERATORS, PAPER_CASES, Case, both, draw, forward, stored
from experiments.benchmarks.gpu_work import Work, work
from tim4rec_jax.run_dir import environment

# An H100 with HBM3: 3.35 TB/s by its data sheet, of which large copies usually reach nine tenths.
ASSUMED_BYTES_A_SECOND = 0.9 * 3.35e12
PRECISIONS = ("tfloat32", "bfloat16")


def fused_norm_bytes(
    inner: int, state: int, heads: int, chunk: int, width: int, itemsize: int = 4, projected: int = 0
) -> dict[str, int]:
    """Counts bytes a token of a Mamba-2 mixer's SSD, gate and norm, apart and as `kernels.ssd.ssd_gated`.

    Apart, the norm reads y and z and writes its output, and its gradient reads y, z and the output's gradient and
    writes those of y and z. In one kernel y is never written; the backward pass makes it again from the states. The
    norm's factor then comes after the projection: at most one more pass over its output, and over its output and
    gradient.

    Args:
      inner: e.
      state: n.
      heads: h.
      chunk: c, positions between two states that are kept.
      width: p.
      itemsize: bytes of a number; steps and states take 4.
      projected: d, width of the projection's output.
    """
    inputs = (inner + 2 * state) * itemsize + 4 * heads
    states = 4 * heads * width * state // chunk
    ssd_forward, ssd_backward = inputs + inner * itemsize + states, 2 * inputs + inner * itemsize + states
    norm_forward, norm_backward = 3 * inner * itemsize, 5 * inner * itemsize
    return {
        "apart_forward": ssd_forward + norm_forward,
        "apart_backward": ssd_backward + norm_backward,
        "fused_forward": ssd_forward + inner * itemsize,
        "fused_backward": ssd_backward + 2 * inner * itemsize,
        "norm_after_projection_forward": 2 * projected * itemsize,
        "norm_after_projection_backward": 3 * projected * itemsize,
    }


def _both_passes(counts: dict[str, int], form: str) -> int:
    return counts[f"{form}_forward"] + counts[f"{form}_backward"]


def bytes_and_seconds(case: Case, precision: str) -> dict[str, Any]:
    """Returns the bytes of a case and the time that moving them would take."""
    counts: Work = work(case, precision)
    return {
        "case": case.label,
        "precision": precision,
        **dataclasses.asdict(counts),
        "predicted_forward_microseconds": 1e6 * counts.moved / ASSUMED_BYTES_A_SECOND,
        "predicted_both_microseconds": 1e6 * counts.moved_both / ASSUMED_BYTES_A_SECOND,
        "predicted_share_of_floor_both": counts.needed_both / counts.moved_both,
    }


def kernel_resources(case: Case, precision: str, capabilities: tuple[int, ...]) -> list[dict[str, Any]]:
    """Compiles the kernels of a case's value and gradients and returns what they use."""
    from tests.kernels.codegen import capture, compile_kernel

    small = dataclasses.replace(case, sizes=case.sizes | {axis: 1 for axis in "bt" if axis in case.sizes})
    values = stored(small, draw(small, np.random.default_rng(0)), precision)
    rows = case.sizes.get("b", case.sizes.get("t"))

    def whole(name: str, array: jax.Array) -> jax.ShapeDtypeStruct:
        has_rows = name not in OPERATORS[case.op].parameters
        return jax.ShapeDtypeStruct((rows, *array.shape[1:]) if has_rows else array.shape, array.dtype)

    inputs, fixed = ({n: whole(n, a) for n, a in group.items()} for group in (values.inputs, values.fixed))
    function = both(forward(case, "pallas_triton", precision))
    kernels = capture(function, inputs, fixed, whole("dy", jnp.asarray(values.dy)))
    return [
        {
            "case": case.label,
            "precision": precision,
            "kernel": kernel.name,
            "warps": kernel.num_warps,
            "programs": kernel.grid[0],
            "capability": capability,
            **dataclasses.asdict(compile_kernel(kernel, capability)),
        }
        for kernel in kernels
        for capability in capabilities
    ]


def report(costs: list[dict[str, Any]], resources: list[dict[str, Any]]) -> Table:
    """The predicted times, and the registers on Hopper."""
    table = Table(title="predictions, H100")
    for column in ("case", "precision", "forward us", "both us", "needed / moved", "registers (spilled bytes)"):
        table.add_column(column, justify="right")
    for cost in costs:
        used = ", ".join(
            f"{row['kernel']} {row['registers']} ({row['stack_bytes']})"
            for row in resources
            if (row["case"], row["precision"], row["capability"]) == (cost["case"], cost["precision"], 90)
        )
        times = (f"{cost[f'predicted_{name}_microseconds']:.0f}" for name in ("forward", "both"))
        table.add_row(cost["case"], cost["precision"], *times, f"{cost['predicted_share_of_floor_both']:.2f}", used)
    return table


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Counts and compiles; returns the record and its table."""
    argparse.ArgumentParser(prog="experiments.benchmark predictions", allow_abbrev=False).parse_args(rest)
    cases = [*PAPER_CASES, *LONG_CASES]
    costs = [bytes_and_seconds(case, precision) for case in cases for precision in PRECISIONS]
    resources = [
        row
        for case in PAPER_CASES
        for precision in PRECISIONS
        for row in kernel_resources(case, precision, (80, 90, 100))
    ]
    record = {
        "prediction": True,
        "note": "No GPU was used. Times are bytes over an assumed bandwidth and nothing else.",
        "environment": environment(),
        "assumed_bytes_a_second": ASSUMED_BYTES_A_SECOND,
        "costs": costs,
        "resources": resources,
        "ssd_gate_norm_bytes_a_token": {
            "d 64": fused_norm_bytes(inner=128, state=32, heads=4, chunk=32, width=32, projected=64),
            "d 256": fused_norm_bytes(inner=512, state=64, heads=4, chunk=32, width=128, projected=256),
        },
    }
    table = report(costs, resources)
    table.caption = "; ".join(
        f"SSD, gate and norm at {size}: {_both_passes(counts, 'apart')} bytes a token apart, "
        f"{_both_passes(counts, 'fused')} in one, {_both_passes(counts, 'norm_after_projection')} for the norm then"
        for size, counts in record["ssd_gate_norm_bytes_a_token"].items()
    )
    return record, table
