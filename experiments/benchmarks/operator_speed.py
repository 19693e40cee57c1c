"""How fast the operators run here: against other programs, over the device's ceilings, and cut up in other ways.

`run` (`experiments.benchmark ops`) takes the plain-JAX operators forward and backward against other programs:
ssd             kernels.ssd (chunked), against the PyPI package mamba2-jax where it is installed, and against chunked
                PyTorch; each at the chunk size out of three that suits it best
selective_scan  kernels.selective_scan, against one plain `lax.scan` step per position, and against a PyTorch loop
linear          kernels.ssd on one row of growing length
"""

import argparse
import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments.benchmarks.operators import (
    OPERATORS,
    Case,
    Values,
    both,
    draw,
    stored,
)
from experiments.benchmarks.opponents import (
    mamba2_jax_ssd,
    require_torch,
    torch_form,
    torch_scan,
    torch_ssd,
)
from experiments.benchmarks.timing import Form, compiled_form, time_in_turns
from experiments.cli import OptionParser
from kernels.ssd import ssd
from tim4rec_jax.figures import new_figure
from tim4rec_jax.run_dir import environment

# One batch of short rows as the recommenders have them, and fewer rows as they grow.
TOKENS = 12_800
LENGTHS = (50, 200, 2048)
SCAN_LENGTHS = (50, 200)
LINEAR_LENGTHS = (256, 1024, 4096, 16_384, 65_536)
HEADS, WIDTH, STATE = 4, 32, 32
CHANNELS = 128
CHUNKS = (16, 32, 64)
CHUNK_OF_LONG_ROWS = 32


def cpu_case(op: str, length: int, batch: int) -> Case:
    """Returns what `ops` measures at a length."""
    widths = {"h": HEADS, "p": WIDTH, "n": STATE} if op == "ssd" else {"e": CHANNELS, "n": STATE}
    return Case(op, {"b": batch, "l": length} | widths)


def jax_form(apply: Callable[..., jax.Array], values: Values) -> Form:
    """Returns a JAX function of an operator's inputs, forward and backward, as a form."""
    return compiled_form(both(lambda inputs, _: apply(**inputs)), values.inputs, values.fixed, values.dy)


def cpu_forms(case: Case, drawn: Values) -> dict[str, Form]:
    """Returns all forms of an operator, at all chunk sizes; the first are ours."""
    values, function = stored(case, drawn, "float32"), OPERATORS[case.op].function
    if case.op == "selective_scan":
        return {
            "kernels.selective_scan": jax_form(functools.partial(function, implementation="xla"), values),
            "lax.scan": jax_form(functools.partial(function, implementation="reference"), values),
            "PyTorch, loop": torch_form(torch_scan, drawn.inputs, drawn.dy),
        }
    ours = functools.partial(function, implementation="xla")
    makers = {"kernels.ssd": lambda chunk: jax_form(functools.partial(ours, chunk_size=chunk), values)}
    if importlib.util.find_spec("mamba2_jax"):
        makers["mamba2-jax"] = lambda chunk: jax_form(functools.partial(mamba2_jax_ssd, chunk_size=chunk), values)
    plain = functools.partial(torch_form, inputs=drawn.inputs, dy=drawn.dy)
    makers["PyTorch, chunked"] = lambda chunk: plain(functools.partial(torch_ssd, chunk_size=chunk))
    return {f"{name} / {chunk}": make(chunk) for name, make in makers.items() for chunk in CHUNKS}


def largest_difference(forms: dict[str, Form]) -> float:
    """Runs every form and returns the largest difference from the first, as a share of each array's maximum."""

    def arrays(form: Form) -> dict[str, np.ndarray]:
        y, gradients = form.launch()
        found = {"y": y} | gradients
        return {name: np.asarray(a.detach() if hasattr(a, "detach") else a, np.float64) for name, a in found.items()}

    first, *others = (arrays(form) for form in forms.values())
    # NumPy's maximum hands NaN on.
    return float(
        np.max([np.max(np.abs(y - other[name])) / np.max(np.abs(y)) for other in others for name, y in first.items()])
    )


def compare_programs(op: str, length: int, repeats: int) -> dict[str, Any]:
    """Measures one operator at one length.

    Raises:
      FloatingPointError: the forms do not compute the same.
    """
    case = cpu_case(op, length, max(1, TOKENS // length))
    forms = cpu_forms(case, draw(case, np.random.default_rng(length)))
    difference = largest_difference(forms)
    if not difference < 1e-3:
        raise FloatingPointError(f"{op} at length {length}: the forms {list(forms)} differ by {difference:.1e}")
    readings = time_in_turns(forms, repeats=repeats)
    medians: dict[str, float] = {}
    for name, of_form in readings.items():
        program = name.partition(" / ")[0]
        medians[program] = min(medians.get(program, math.inf), of_form.median)
    ours = next(iter(medians))
    return {
        "op": op,
        "batch": case.sizes["b"],
        "length": length,
        "largest_difference": difference,
        "seconds": {name: of_form.seconds for name, of_form in readings.items()},
        "median_seconds": medians,
        "over_ours": {name: median / medians[ours] for name, median in medians.items()},
    }


def linear(repeats: int) -> list[dict[str, Any]]:
    """Measures ours on one row of growing length."""
    rows = []
    for length in LINEAR_LENGTHS:
        case = cpu_case("ssd", length, 1)
        values = stored(case, draw(case, np.random.default_rng(length)), "float32")
        form = jax_form(functools.partial(ssd, chunk_size=CHUNK_OF_LONG_ROWS, implementation="xla"), values)
        ours = time_in_turns({"ours": form}, repeats=repeats)["ours"]
        times = {"seconds": ours.seconds, "median_seconds": ours.median}
        rows.append({"length": length, **times, "microseconds_a_position": 1e6 * ours.median / length})
    return rows


def draw_figure(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws time over length on logarithmic axes, beside a line of constant time per position."""
    lengths, seconds = ([row[key] for row in rows] for key in ("length", "median_seconds"))
    figure = new_figure(6, 4, "constrained")
    axes = figure.add_subplot()
    axes.loglog(lengths, [seconds[-1] * length / lengths[-1] for length in lengths], "--", color="0.6", label="linear")
    axes.loglog(lengths, seconds, "o-", label="kernels.ssd, forward and backward")
    axes.set(
        xlabel="positions of one row",
        ylabel="seconds",
        title=f"h {HEADS}, p {WIDTH}, n {STATE}, chunk {CHUNK_OF_LONG_ROWS}",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def report(comparisons: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Table:
    """The medians and their ratios."""
    table = Table(title="forward and backward, median")
    for column in ("op", "rows x length", "form", "ms", "this / ours"):
        table.add_column(column, justify="right")
    for result in comparisons:
        for name, median in result["median_seconds"].items():
            size = f"{result['batch']} x {result['length']}"
            table.add_row(result["op"], size, name, f"{1e3 * median:.1f}", f"{result['over_ours'][name]:.2f}")
    for row in rows:
        cost = f"{row['microseconds_a_position']:.2f} us per position"
        table.add_row("ssd", f"1 x {row['length']}", "kernels.ssd", f"{1e3 * row['median_seconds']:.1f}", cost)
    return table


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures every operator against other programs; returns the record and its table."""
    parser = OptionParser(prog="experiments.benchmark ops")
    parser.add_argument("--figure", type=pathlib.Path, help="PNG of the cost of long rows")
    figure = parser.parse_args(rest).figure
    require_torch()
    cases = [*(("ssd", length) for length in LENGTHS), *(("selective_scan", length) for length in SCAN_LENGTHS)]
    comparisons = [compare_programs(op, length, options.repeats) for op, length in cases]
    rows = linear(options.repeats)
    if figure:
        draw_figure(rows, figure)
    shape = {
        "heads": HEADS,
        "head_width": WIDTH,
        "state": STATE,
        "channels": CHANNELS,
        "chunks": CHUNKS,
        "chunk_of_long_rows": CHUNK_OF_LONG_ROWS,
    }
    record = {"environment": environment(), "shape": shape, "comparisons": comparisons, "linear": rows}
    return record, report(comparisons, rows)
