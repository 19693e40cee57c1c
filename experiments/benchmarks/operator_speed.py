"""How fast the operators run here: against other programs, over the device's ceilings, and cut up in other ways.

`run` (`experiments.benchmark ops`) takes the plain-JAX operators forward and backward against other programs:
ssd             kernels.ssd (chunked), against the PyPI package mamba2-jax where it is installed, and against chunked
                PyTorch; each at the chunk size out of three that suits it best
selective_scan  kernels.selective_scan, against one plain `lax.scan` step per position, and against a PyTorch loop
linear          kernels.ssd on one row of growing length

`time_all` (a part of `experiments.benchmark gpu`) times the kernels in all forms, and says how near each comes to its
floor: what an operator has to move and compute at least, at the speeds that this device reaches.

Bytes are those of device memory. Needed: each input read once and each output written once; forward and backward
together read the inputs and dy and write y and all gradients. Moved: every pass of ours over an array, where programs
that run side by side and share a tile (the heads and width splits of a row, blocks of targets that loop over the same
catalogue) read it once; arrays with one number per row, head or segment are left out, and so is the writing of zeros.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmarks.operators import (
    LARGE_CATALOGUE,
    LONG_CASES,
    OPERATORS,
    PAPER_CASES,
    PRECISIONS,
    TAPS,
    TINY_CASES,
    Apply,
    Case,
    Sizes,
    Values,
    both,
    draw,
    forward,
    matmul_precision,
    precisions,
    stored,
)
from experiments.benchmarks.opponents import (
    mamba2_jax_ssd,
    require_torch,
    torch_form,
    torch_forms,
    torch_scan,
    torch_ssd,
)
from experiments.benchmarks.timing import Budget, Form, Part, Settings, build_all, compiled_form, time_in_turns
from experiments.cli import OptionParser
from kernels.causal_conv1d import pallas_triton as conv_kernels
from kernels.causal_conv1d.config import CausalConv1dConfig
from kernels.causal_conv1d.config import default_config as conv_config
from kernels.selective_scan.config import SelectiveScanConfig
from kernels.selective_scan.config import default_config as scan_config
from kernels.softmax_cross_entropy import TritonConfig
from kernels.softmax_cross_entropy.config import triton_config
from kernels.ssd import SsdConfig, ssd
from kernels.ssd import default_config as ssd_config
from kernels.ssd.tiles import KernelParams
from tim4rec_jax.run_dir import environment

PASSES = ("forward", "forward_backward")
# Of mamba2-jax on a GPU.
_CHUNK = 64
# Tuning of other people's kernels takes at most this share of what is left of the part.
_TUNING_SHARE = 0.25
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
    from matplotlib.figure import Figure

    lengths, seconds = ([row[key] for row in rows] for key in ("length", "median_seconds"))
    figure = Figure(figsize=(6, 4), layout="constrained")
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


FLOAT = 4


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations of one call.

    Attributes:
      needed, needed_both: bytes at least, forward, and forward and backward.
      moved, moved_both: bytes of our kernels; forward alone keeps nothing for a gradient.
      flops, flops_both: of matrix products at least, or 0 where the bytes take longer by far on any GPU.
    """

    needed: int
    needed_both: int
    moved: int
    moved_both: int
    flops: int = 0
    flops_both: int = 0


def ssd_work(sizes: Sizes, itemsize: int, config: SsdConfig) -> Work:
    """Counts for `kernels.ssd.ssd` with B and C shared by the heads, steps in float32, and all of A, D and dt_bias.

    Args:
      sizes: b, l, h, p, n.
      itemsize: bytes of a number in x, B, C and y.
      config: of our kernels.
    """
    b, l, h, p, n = (sizes[axis] for axis in "blhpn")  # noqa: E741
    plan = KernelParams(b, l, h, 1, p, n, config, "tfloat32", False, False)
    x, dt, maps = b * l * h * p * itemsize, b * l * h * FLOAT, b * l * n * itemsize
    inputs = x + dt + 2 * maps + 3 * h * FLOAT
    needed, needed_both = inputs + x, 2 * (inputs + x)

    one_state = b * h * p * n * FLOAT
    segment_states = plan.segments * one_state
    moved = needed
    if plan.segments > 1:
        # A pass over x, dt and B (later dy, dt and C) finds what segments add to states: written once, then read and
        # written to bring them into line and again to multiply them.
        segment_pass = x + dt + maps + 5 * segment_states
        moved += segment_pass + segment_states
    # The state before a row's first chunk is zero; between segments it is kept like the others.
    chunk_states = (plan.all_chunks - (plan.segments == 1)) * one_state
    splits = config.width_splits
    parts = h // config.heads_per_program * splits
    wide = parts * b * l * n * (itemsize if parts == config.heads_per_program == 1 else FLOAT)
    # Reads inputs, dy and states; writes dx, and parts of the gradients of dt, B and C.
    backward = inputs + x + chunk_states + x + splits * dt + 2 * wide
    if plan.segments > 1:
        backward += segment_pass + segment_states
    # The parts are added up, or only rounded.
    if parts > 1 or wide != maps:
        backward += 2 * (wide + maps)
    backward += (splits + 1) * dt * (splits > 1) + dt
    return Work(needed, needed_both, moved, moved + chunk_states + backward)


def conv_work(sizes: Sizes, itemsize: int, config: CausalConv1dConfig) -> Work:
    """Counts for `kernels.causal_conv1d.causal_conv1d` with float32 weights and bias.

    Args:
      sizes: b, l, c.
      itemsize: bytes of a number in x and y.
      config: of our kernels.
    """
    b, l, c = (sizes[axis] for axis in "blc")  # noqa: E741
    plan = conv_kernels.KernelParams(b, l, c, TAPS, "silu", config, False)
    x, parameters = b * l * c * itemsize, (TAPS + 1) * c * FLOAT
    needed, needed_both = 2 * x + parameters, 4 * x + 2 * parameters
    # Neighbouring segments both read the K - 1 positions between them, of three arrays in the backward pass: x on both
    # sides, dy behind.
    shared = b * (plan.segments - 1) * (TAPS - 1) * c * itemsize
    moved = needed + shared
    sums = plan.strip_blocks * parameters
    return Work(needed, needed_both, moved, moved + 3 * x + 3 * shared + 2 * parameters + 2 * sums)


def scan_work(sizes: Sizes, itemsize: int, config: SelectiveScanConfig) -> Work:
    """Counts for `kernels.selective_scan.selective_scan` with all of A, D and dt_bias in float32.

    Args:
      sizes: b, l, e, n.
      itemsize: bytes of a number in x, dt, B, C and y.
      config: of our kernels.
    """
    b, l, e, n = (sizes[axis] for axis in "blen")  # noqa: E741
    x, maps, parameters = b * l * e * itemsize, b * l * n * itemsize, (e * n + 2 * e) * FLOAT
    inputs = 2 * x + 2 * maps + parameters
    needed, needed_both = inputs + x, 2 * (inputs + x)
    delta, one_state = b * l * e * FLOAT, b * e * n * FLOAT
    states = -(-l // config.chunk) * one_state
    parts = 2 * -(-e // config.backward_channels) * b * l * n * FLOAT
    kept = delta + states
    # Reads x, delta, B, C, dy and states; writes dx, ddt, parts of dB and dC, and a row's dA and initial gradient.
    backward = 2 * x + 2 * maps + parameters + kept + 2 * x + parts + 2 * one_state
    # Adds up the parts, and A's gradient over rows.
    backward += parts + 2 * maps + one_state + parameters
    return Work(needed, needed_both, needed, needed + kept + backward)


def loss_work(sizes: Sizes, itemsize: int, config: TritonConfig) -> Work:
    """Counts for `kernels.softmax_cross_entropy.softmax_cross_entropy`; its kernels compute the scores three times.

    Args:
      sizes: t, v, d.
      itemsize: bytes of a number in hidden and embedding.
      config: of our kernels.
    """
    t, v, d = (sizes[axis] for axis in "tvd")
    numbers, vector, product = (t + v) * d * itemsize, t * FLOAT, 2 * t * v * d
    # Targets in, loss out; its gradient too.
    needed, needed_both = numbers + 2 * vector, 2 * numbers + 3 * vector
    parts, _ = config.forward.split(t, v)
    # Log-sum-exps of parts are merged; scores at targets are written and read.
    moved = needed + (2 * parts + 2) * vector
    backward = 0
    for loop, own, other in ((config.d_hidden, t, v), (config.d_embedding, v, t)):
        parts, _ = loop.split(own, other)
        # Reads both sides, targets, log-sum-exps and weights.
        backward += numbers + 3 * vector
        backward += own * d * itemsize if parts == 1 else own * d * (2 * parts * FLOAT + itemsize)
    return Work(needed, needed_both, moved, moved + 2 * vector + backward, product, 3 * product)


def default_kernel_config(case: Case, precision: str) -> Any:
    """Returns how our kernels cut a case up where nobody says otherwise."""
    sizes, itemsize = case.sizes, 2 if precision == "bfloat16" else 4
    if case.op == "ssd":
        return ssd_config(
            batch=sizes["b"],
            length=sizes["l"],
            heads=sizes["h"],
            groups=1,
            width=sizes["p"],
            state_width=sizes["n"],
            chunk_size=64,
            exact_products=precision == "float32",
            itemsize=itemsize,
        )
    if case.op == "causal_conv1d":
        return conv_config(batch=sizes["b"], length=sizes["l"], channels=sizes["c"])
    if case.op == "selective_scan":
        return scan_config(sizes["n"])
    return triton_config(sizes["d"], itemsize, "float32" if precision == "float32" else "tfloat32")


_WORK = {
    "ssd": ssd_work,
    "causal_conv1d": conv_work,
    "selective_scan": scan_work,
    "softmax_cross_entropy": loss_work,
}


def work(case: Case, precision: str) -> Work:
    """Returns the counts of a case in our kernels' default cut."""
    itemsize = 2 if precision == "bfloat16" else 4
    return _WORK[case.op](case.sizes, itemsize, default_kernel_config(case, precision))


def floor_seconds(needed: int, flops: int, bytes_a_second: float, flops_a_second: float) -> float:
    """Returns the time under which no version can run: bytes or products, whichever takes longer."""
    return max(needed / bytes_a_second, flops / flops_a_second)


def ceilings(settings: Settings) -> dict[str, Any]:
    """Measures what the device reaches: bytes per second of a large copy, read and written, and products per second."""
    side, numbers = (64, 2**12) if settings.tiny else (8192, 2**28)
    rng = np.random.default_rng(0)
    line = jnp.asarray(rng.standard_normal(numbers, dtype=np.float32))
    square = jnp.asarray(rng.standard_normal((side, side), dtype=np.float32))
    narrow = square.astype(jnp.bfloat16)
    scalar = jnp.float32(1)
    with matmul_precision("tfloat32"):
        builders = {
            "copy": lambda: compiled_form(jnp.copy, line),
            "add": lambda: compiled_form(lambda a: a + 1, line),
            "bfloat16": lambda: compiled_form(jnp.matmul, narrow, narrow),
            "tfloat32": lambda: compiled_form(jnp.matmul, square, square),
            "dispatch": lambda: compiled_form(lambda a: a + 1, scalar),
        }
        forms = {name: build() for name, build in builders.items()}
    with matmul_precision("float32"):
        forms["float32"] = compiled_form(jnp.matmul, square, square)
    times, failed = settings.time(forms)
    seconds = {name: record["median_seconds"] for name, record in times.items()}
    copies = {name: 2 * line.nbytes / seconds[name] for name in ("copy", "add") if name in seconds}
    return {
        "copy_bytes": line.nbytes,
        "bytes_a_second_of": copies,
        "bytes_a_second": max(copies.values()),
        "matmul_side": side,
        "flops_a_second": {name: 2 * side**3 / seconds[name] for name in PRECISIONS if name in seconds},
        "dispatch_seconds": seconds.get("dispatch"),
        "readings": times,
        "failed": failed,
    }


def _jax_applies(case: Case, settings: Settings, precision: str) -> dict[str, Apply]:
    """Returns (inputs, fixed) -> y of every JAX form; ours comes first."""
    forms = {settings.implementation: forward(case, settings.implementation, precision)}
    forms["xla"] = forward(case, "xla", precision)
    if case.op == "ssd" and importlib.util.find_spec("mamba2_jax") and not case.ragged:
        forms["mamba2-jax"] = lambda inputs, _: mamba2_jax_ssd(**inputs, chunk_size=_CHUNK)
    return forms


def jax_forms(
    applies: dict[str, Apply], values: Values, precision: str, passes: tuple[str, ...] = PASSES
) -> tuple[dict[str, dict[str, Form]], dict[str, str]]:
    """Compiles all passes of all forms side by side; returns them by name and pass, and why others failed."""
    arguments = {
        "forward": (values.inputs, values.fixed),
        "forward_backward": (values.inputs, values.fixed, values.dy),
    }

    def build(name: str, of: str) -> Form:
        apply = applies[name]
        # Contexts belong to a thread.
        with matmul_precision(precision):
            return compiled_form(apply if of == "forward" else both(apply), *arguments[of])

    keys = list(itertools.product(applies, passes))
    built, failed = build_all({" ".join(key): functools.partial(build, *key) for key in keys})
    forms: dict[str, dict[str, Form]] = {}
    for name, of in keys:
        if f"{name} {of}" in built:
            forms.setdefault(name, {})[of] = built[f"{name} {of}"]
    return forms, failed


def _differences(
    forms: dict[str, dict[str, Form]], outputs: dict[str, np.ndarray]
) -> tuple[str | None, dict[str, float | str]]:
    """Returns the first form that runs, and how far others' outputs lie from its, over the largest magnitude."""
    first, differences = None, {}
    for name, passes in forms.items():
        # What cannot run says so where it is timed.
        with contextlib.suppress(Exception):
            outputs = {name: np.asarray(passes["forward"].launch(), np.float64)} | outputs
            first = first or name
    for name, y in outputs.items():
        if first is not None and name != first:
            worst = float(np.max(np.abs(outputs[first] - y)) / np.max(np.abs(outputs[first])))
            differences[name] = worst if np.isfinite(worst) else str(worst)
    return first, differences


def _fractions(
    times: dict[str, dict[str, Any]], counts: Work, bounds: dict[str, Any], precision: str
) -> dict[str, Any]:
    """Returns the floors, and what share of its floor each form reaches."""
    rate = bounds["flops_a_second"].get(precision, float("inf"))
    needed = {"forward": (counts.needed, counts.flops), "forward_backward": (counts.needed_both, counts.flops_both)}
    floors = {of: floor_seconds(*needed[of], bounds["bytes_a_second"], rate) for of in PASSES}
    for name, record in times.items():
        record["fraction_of_floor"] = floors[name.rsplit(": ", 1)[1]] / record["median_seconds"]
    return {"floor_seconds": floors, "counts": dataclasses.asdict(counts)}


def compare(
    case: Case, precision: str, settings: Settings, bounds: dict[str, Any], drawn: Values, budget: Budget
) -> dict[str, Any]:
    """Times one operator at one size and precision in all forms, in turns."""
    values = stored(case, drawn, precision)
    forms, failed = jax_forms(_jax_applies(case, settings, precision), values, precision)
    others, outputs, missing = torch_forms(
        case.op,
        drawn.inputs,
        drawn.fixed,
        drawn.dy,
        narrow=OPERATORS[case.op].stored,
        precision=precision,
        tiny=settings.tiny,
        limit=_TUNING_SHARE * budget.left(),
    )
    first, differences = _differences(forms, outputs)
    flat = {f"{name}: {of}": form for name, passes in (forms | others).items() for of, form in passes.items()}
    times, untimed = settings.time(flat)
    counts = _fractions(times, work(case, precision), bounds, precision)
    record = {"op": case.op, "sizes": case.sizes, "precision": precision, "forms": times, **counts}
    record |= {"kernel_config": dataclasses.asdict(default_kernel_config(case, precision))}
    record |= {"y_differs": {"from": first, "over_largest": differences}}
    return record | {"missing": failed | missing | untimed}


def jobs(tiny: bool) -> Iterator[tuple[str, Case, str]]:
    """Yields what is measured (comparisons or sweep), the case and the precision, the most telling first."""
    if tiny:
        plain = [dataclasses.replace(case, ragged=False) for case in TINY_CASES[:2]]
        yield from (("comparisons", case, "bfloat16") for case in plain)
        yield "sweep", plain[0], "tfloat32"
        return
    usual, exact = PRECISIONS[:2], PRECISIONS[2]
    yield from (("comparisons", case, precision) for case in PAPER_CASES for precision in precisions(case, usual))
    long_row = next(case for case in LONG_CASES if case.op == "ssd" and case.sizes["b"] == 1)
    yield from (("sweep", case, "tfloat32") for case in (*PAPER_CASES[:2], long_row))
    yield from (("comparisons", case, precision) for case in LONG_CASES for precision in precisions(case, usual))
    yield from (("comparisons", case, exact) for case in PAPER_CASES if OPERATORS[case.op].has_products)
    yield "comparisons", LARGE_CATALOGUE, "tfloat32"


def cuts(case: Case, base: SsdConfig, tiny: bool) -> dict[str, SsdConfig]:
    """Returns the cuts of an SSD that are tried, by what they say."""
    default = (base.chunk_size, base.forward_warps, base.heads_per_program)
    chunks, warps, heads, segments = (16, 32, 64), (1, 2, 4), (1, case.sizes["h"]), {base.segments}
    if base.segments > 1:
        segments |= {max(1, base.segments // 4), 4 * base.segments}
    if tiny:
        chunks, warps, heads, segments = (base.chunk_size,), (base.forward_warps,), (1,), {2}
    tried = {}
    for chunk, num_warps, count, parts in itertools.product(chunks, warps, heads, sorted(segments)):
        # Other numbers of segments are tried with the default of the rest, not with everything.
        if parts != base.segments and (chunk, num_warps, count) != default:
            continue
        name = f"chunk {chunk}, warps {num_warps}, heads {count}, segments {parts}"
        tried[name] = dataclasses.replace(
            base,
            chunk_size=chunk,
            segments=parts,
            heads_per_program=count,
            forward_warps=num_warps,
            backward_warps=num_warps,
        )
    return tried


def sweep(case: Case, precision: str, settings: Settings, drawn: Values) -> dict[str, Any]:
    """Times forward, and forward and backward, of the SSD kernels cut up in many ways."""
    base = default_kernel_config(case, precision)
    tried = cuts(case, base, settings.tiny)
    applies = {name: forward(case, settings.implementation, precision, config=c) for name, c in tried.items()}
    forms, failed = jax_forms(applies, stored(case, drawn, precision), precision)
    flat = {f"{name}: {of}": form for name, passes in forms.items() for of, form in passes.items()}
    times, untimed = settings.time(flat)
    seconds = {name: record["median_seconds"] for name, record in times.items()}
    best = {of: min((n for n in seconds if n.endswith(f": {of}")), key=seconds.get, default=None) for of in PASSES}
    record = {"op": case.op, "sizes": case.sizes, "precision": precision, "default": dataclasses.asdict(base)}
    return record | {"median_seconds": seconds, "best": best, "missing": failed | untimed}


def time_all(part: Part) -> None:
    """Measures ceilings, comparisons and cuts."""
    record, settings = part.record, part.settings
    record.update({"ceilings": ceilings(settings), "comparisons": [], "sweep": []})
    part.save("ceilings")
    last: tuple[Case | None, Any] = (None, None)

    def measure(kind: str, case: Case, precision: str) -> None:
        nonlocal last
        if last[0] is not case:
            last = case, draw(case, part.rng)
        if kind == "sweep":
            found = sweep(case, precision, settings, last[1])
        else:
            found = compare(case, precision, settings, record["ceilings"], last[1], part.budget)
        record[kind].append(found)

    part.do_all(
        (f"{kind}: {case.label} {precision}", functools.partial(measure, kind, case, precision))
        for kind, case, precision in jobs(settings.tiny)
    )
