"""The plan of `experiments.benchmarks.scaling` as Markdown, and a short table for the terminal."""

from typing import Any

from rich.table import Table

_WORDS = {
    "whole": "Table on every GPU, all scores",
    "sharded": "Table sharded, all scores",
    "sampled": "Table sharded, sampled softmax, lazy Adam",
}


_WHEN_ASSUMED = (
    "**Every time, rate and cost here is a prediction; no GPU was used.** Counted bytes, operations and exchanges are "
    "divided by assumed rates, nothing overlaps, and launches of kernels are not counted."
)
_WHEN_MEASURED = (
    "**Every throughput and cost here is a prediction.** One GPU's step is predicted from steps that one GPU was "
    "measured to take; exchanges are counted bytes over assumed rates, for no run has used two. Nothing overlaps."
)


def _count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _cell(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return f"– ({row['memory'] / 1e9:,.0f} GB)"
    shards = f", {row['shards']} shards" if row["shards"] > 1 else ""
    return f"{_count(row['positions a second'])}, ${row['dollars for 1e9 positions']:.3g}, {row['slowest']}{shards}"


def console_table(record: dict[str, Any]) -> Table:
    """Predicted milliseconds of a step."""
    table = Table(title="predicted, H100: ms a step (slowest part)")
    for column in ("items", "GPUs", *_WORDS):
        table.add_column(column, justify="right")
    found = {(row["items"], row["devices"], row["way"]): row for row in record["rows"]}
    for items, devices in sorted({key[:2] for key in found}):
        rows = [found[items, devices, way] for way in _WORDS]
        cells = [f"{1e3 * row['seconds']:.3g} ({row['slowest']})" if row["fits"] else "does not fit" for row in rows]
        table.add_row(f"{items:,}", str(devices), *cells)
    return table


def _from(items: float) -> str:
    return f"from {_count(items)} items on" if items else "at any size, for its latency alone"


def _limit_lines(record: dict[str, Any]) -> list[str]:
    found, load = record["limits"], record["workload"]
    return [
        "- **Memory of a GPU**: the table, its gradient and Adam's two moments fill it at "
        f"{_count(found['memory whole'])} items; sharded over the 8 GPUs of a node at "
        f"{_count(found['memory sharded'])}; without a gradient (lazy Adam) at {_count(found['memory sampled'])}. "
        "Beyond that, shards have to span nodes.",
        f"- **Scores**: from {_count(found['loss'])} items on, scoring all of them takes longer than the encoder, on "
        "any number of GPUs: sharding spreads the table, and not the work a target makes.",
        f"- **Adam**: from {_count(found['optimiser'])} items on, one pass over the whole table and its moments does.",
        "- **Exchange**: summing the whole table's gradient takes longer than the encoder on 8 GPUs "
        f"{_from(found['exchange 8'])}, on 512 {_from(found['exchange 512'])}.",
        f"- **Data**: on 512 GPUs a step takes {_count(found['positions 512'])} positions at "
        f"{load['positions']:,} a GPU. A log of 1,000,000 events then has less than one step an epoch; to keep 1,000 "
        f"steps an epoch it needs {_count(1000 * found['positions 512'])} events, or smaller pieces a GPU, at which "
        f"latency and launches{'' if found['fixed'] else ', not counted here,'} rule.",
        *_launch_lines(found["fixed"]),
    ]


def _launch_lines(positions: float) -> list[str]:
    if not positions:
        return []
    return [
        f"- **Launches**: up to {_count(positions)} positions on a GPU the part of a step that does not depend on its "
        "size takes longer than the encoder: larger batches, or fewer and larger kernels, come before more GPUs."
    ]


def _assumed_rates(record: dict[str, Any]) -> str:
    gpu = record["assumed"]
    if record["measured"]:
        return ""
    return f"{gpu['bandwidth'] / 1e12:.2f} TB/s, {gpu['rate'] / 1e12:.0f} TFLOP/s of TF32 products, "


def _measured_lines(found: dict[str, Any]) -> list[str]:
    large, small = found["steps"]
    records = ", ".join(f"[{name}]({name})" for name in found["records"])
    return [
        "## Measured",
        "",
        f"On one {found['device']} ({records}): a step of {large[0]:,.0f} positions took {1e3 * large[1]:.2f} ms and "
        f"one of {small[0]:,.0f} took {1e3 * small[1]:.2f} ms. Without their losses, a line through both says "
        f"{1e6 * found['position_seconds']:.4f} microseconds a position and {1e3 * found['step_seconds']:.2f} ms a "
        "step of any size: launches, and what is done once. (The large one read whole prefixes, the small one packed "
        f"rows; their encoders are of the same size.) The loss ran at {found['loss_rate'] / 1e12:.1f} TFLOP/s, large "
        f"copies at {found['bandwidth'] / 1e12:.2f} TB/s.",
        "",
    ]


def markdown(record: dict[str, Any]) -> str:
    """Returns the plan: what was counted, what was assumed, predictions, limits."""
    counted, load, gpu, measured = record["counted"], record["workload"], record["assumed"], record["measured"]
    lines = [
        "# From one GPU to 512, from 10^4 items to 10^9",
        "",
        f"{_WHEN_MEASURED if measured else _WHEN_ASSUMED} Made by `python -m experiments.benchmark scaling`; numbers "
        "with all digits and the formulas' inputs are in [benchmark_scaling.json](benchmark_scaling.json), the "
        "formulas in `experiments/benchmarks/scaling.py`.",
        "",
        "## Counted",
        "",
        f"The encoder of `{record['config']}`, forward and backward, by the compiler's account of the plain-JAX "
        f"program on a CPU: {counted['bytes a position']:,.0f} bytes and {counted['operations a position']:,.0f} "
        f"operations a position, {counted['temporary bytes a position']:,.0f} bytes a position held for the backward "
        "pass; "
        f"{counted['parameters beside the table']:,.0f} parameters beside the table. (The GPU kernels move less; "
        f"see kernel_predictions.json.) Measured, on {record['environment']['cpus_allowed']} of "
        f"{record['environment']['cpu_count']} shared processors ({counted['measured on']}): "
        f"{1e6 * counted['measured seconds a position']:.1f} microseconds a position; taken for an H100: "
        f"{1e6 * record['rows'][0]['encoder'] / load['positions']:.3f}.",
        "",
        f"A step on each GPU: {load['positions']:,} positions, {load['targets']:,} targets, width {load['width']}, "
        f"{load['negatives']:,} shared negatives where sampled.",
        "",
        *(_measured_lines(measured) if measured else []),
        "## Assumed",
        "",
        f"H100 SXM, {gpu['memory'] / 1e9:.0f} GB usable, {_assumed_rates(record)}{gpu['inside'] / 1e9:.0f} GB/s a "
        f"GPU inside a node of {gpu['node']}, {gpu['between'] / 1e9:.0f} GB/s between nodes, "
        f"{1e6 * gpu['latency']:.0f} microseconds a doubling of the devices in an exchange, ${gpu['dollars']:.2f} a "
        "GPU hour.",
        "",
        "## Predicted",
        "",
        "Positions a second of all GPUs together, dollars for 10^9 positions, and the part of the step that takes "
        "longest; a dash where a GPU's memory does not hold it (GB that it would take).",
    ]
    found = {(row["items"], row["devices"], row["way"]): row for row in record["rows"]}
    devices = sorted({row["devices"] for row in record["rows"]})
    for way, words in _WORDS.items():
        lines += ["", f"### {words}", ""]
        lines += ["| items | " + " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in devices) + " |"]
        lines += ["| ---: |" + " ---: |" * len(devices)]
        for items in sorted({row["items"] for row in record["rows"]}):
            lines.append(f"| {items:,} | " + " | ".join(_cell(found[items, n, way]) for n in devices) + " |")
    lines += ["", "## Where each resource runs out", "", *_limit_lines(record), ""]
    return "\n".join(lines)
