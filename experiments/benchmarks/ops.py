"""Operators forward and backward on this machine: the plain-JAX forms against other programs, in turns.

ssd             kernels.ssd (chunked), against the PyPI package mamba2-jax where it is installed, and against chunked
                PyTorch; each at the chunk size out of three that suits it best
selective_scan  kernels.selective_scan, against one plain `lax.scan` step a position, and against a PyTorch loop
linear          kernels.ssd on one row of growing length
"""

import argparse
import functools
import importlib.util
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from tim4rec_jax.run_dir import environment

Inputs = dict[str, np.ndarray]
Run = Callable[[], Any]
# One batch of short rows as the recommenders have them, and fewer rows as they grow.
TOKENS = 12_800
LENGTHS = (50, 200, 2048)
SCAN_LENGTHS = (50, 200)
LINEAR_LENGTHS = (256, 1024, 4096, 16_384, 65_536)
HEADS, WIDTH, STATE = 4, 32, 32
CHANNELS = 128
CHUNKS = (16, 32, 64)
# Of the rows of growing length.
CHUNK = 32


def ssd_inputs(length: int, batch: int) -> Inputs:
    """Draws float32 inputs of `ssd` and the gradient of its output."""
    rng = np.random.default_rng(length)
    arrays = {
        "x": rng.normal(size=(batch, length, HEADS, WIDTH)),
        "dt": rng.normal(size=(batch, length, HEADS)) - 3,
        "A": -np.linspace(1, 16, HEADS),
        "B": rng.normal(size=(batch, length, STATE)),
        "C": rng.normal(size=(batch, length, STATE)),
        "D": np.ones(HEADS),
        "dt_bias": np.zeros(HEADS),
        "dy": rng.normal(size=(batch, length, HEADS, WIDTH)),
    }
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def scan_inputs(length: int, batch: int) -> Inputs:
    """Draws float32 inputs of `selective_scan` and the gradient of its output."""
    rng = np.random.default_rng(length)
    arrays = {
        "x": rng.normal(size=(batch, length, CHANNELS)),
        "dt": rng.normal(size=(batch, length, CHANNELS)) - 3,
        "A": -np.broadcast_to(np.arange(1.0, STATE + 1), (CHANNELS, STATE)),
        "B": rng.normal(size=(batch, length, STATE)),
        "C": rng.normal(size=(batch, length, STATE)),
        "D": np.ones(CHANNELS),
        "dt_bias": np.zeros(CHANNELS),
        "dy": rng.normal(size=(batch, length, CHANNELS)),
    }
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def jax_form(apply: Callable[..., jax.Array], inputs: Inputs) -> Run:
    """Returns a function that computes y and every gradient of a JAX form and waits for them."""
    arrays = {name: jnp.asarray(a) for name, a in inputs.items()}
    dy = arrays.pop("dy")

    @jax.jit
    def both(arrays: dict[str, jax.Array], dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda arrays: apply(**arrays), arrays)
        return y, pull(dy)[0]

    return lambda: jax.block_until_ready(both(arrays, dy))


def torch_form(apply: Callable[..., Any], inputs: Inputs) -> Run:
    """Returns the same for a PyTorch form on all cores."""
    import torch

    leaves = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}
    dy = leaves.pop("dy")
    for leaf in leaves.values():
        leaf.requires_grad_()

    def both() -> Any:
        y = apply(**leaves)
        return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

    return both


def torch_ssd(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, *, chunk_size: int = 64) -> Any:
    """Chunked PyTorch."""
    import torch

    from experiments.benchmarks.torch_models.ssd import ssd_chunked

    delta = torch.nn.functional.softplus(dt + dt_bias)
    return ssd_chunked(x, delta, A, B[:, :, None], C[:, :, None], D=D, chunk_size=chunk_size)[0]


def mamba2_jax_ssd(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, *, chunk_size: int = 64) -> jax.Array:
    """The package mamba2-jax, whose maps are one a head."""
    from mamba2_jax.modeling import ssd_forward

    B, C = (jnp.broadcast_to(m[:, :, None], (*m.shape[:2], HEADS, STATE)) for m in (B, C))
    return ssd_forward(x, dt, A, B, C, chunk_size, D, dt_bias, 0.0, float("inf"))[0]


def torch_scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    """A PyTorch step a position."""
    import torch

    from experiments.benchmarks.torch_models.selective_scan import selective_scan_sequential

    delta = torch.nn.functional.softplus(dt + dt_bias)
    return selective_scan_sequential(x, delta, A, B, C, D=D)[0]


def ssd_forms(inputs: Inputs) -> dict[str, Run]:
    """All forms of state space duality at all chunk sizes; the first are ours."""
    makers = {"kernels.ssd": (jax_form, functools.partial(ssd, implementation="xla"))}
    if importlib.util.find_spec("mamba2_jax"):
        makers["mamba2-jax"] = (jax_form, mamba2_jax_ssd)
    makers["PyTorch, chunked"] = (torch_form, torch_ssd)
    return {
        f"{name} / {chunk}": make(functools.partial(apply, chunk_size=chunk), inputs)
        for name, (make, apply) in makers.items()
        for chunk in CHUNKS
    }


def scan_forms(inputs: Inputs) -> dict[str, Run]:
    """All forms of the selective scan; the first is ours."""
    return {
        "kernels.selective_scan": jax_form(functools.partial(selective_scan, implementation="xla"), inputs),
        "lax.scan": jax_form(functools.partial(selective_scan, implementation="reference"), inputs),
        "PyTorch, loop": torch_form(torch_scan, inputs),
    }


def largest_difference(forms: dict[str, Run]) -> float:
    """Runs every form and returns the largest difference from the first, as a share of each array's maximum."""
    (y, gradients), *others = [run() for run in forms.values()]
    worst = 0.0
    for other_y, other_gradients in others:
        pairs = [(y, other_y), *((gradients[name], other_gradients[name]) for name in gradients)]
        for ours, theirs in pairs:
            ours, theirs = (
                np.asarray(ours, np.float64),
                theirs.detach().numpy() if hasattr(theirs, "detach") else theirs,
            )
            worst = max(worst, float(np.max(np.abs(ours - np.asarray(theirs))) / np.max(np.abs(ours))))
    return worst


def measure(forms: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Times all forms in turns, after one run of each."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _, (name, run) in itertools.product(range(repeats), forms.items()):
        began = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(op: str, length: int, repeats: int) -> dict[str, Any]:
    """Measures one operator at one length.

    Raises:
      FloatingPointError: the forms do not compute the same.
    """
    batch = max(1, TOKENS // length)
    make_inputs, make_forms = (ssd_inputs, ssd_forms) if op == "ssd" else (scan_inputs, scan_forms)
    forms = make_forms(make_inputs(length, batch))
    difference = largest_difference(forms)
    if not difference < 1e-3:
        raise FloatingPointError(f"{op} at length {length}: the forms {list(forms)} differ by {difference:.1e}")
    seconds = measure(forms, repeats)
    medians: dict[str, float] = {}
    for name, times in seconds.items():
        program = name.partition(" / ")[0]
        medians[program] = min(medians.get(program, float("inf")), statistics.median(times))
    ours = next(iter(medians))
    return {
        "op": op,
        "batch": batch,
        "length": length,
        "largest_difference": difference,
        "seconds": seconds,
        "median_seconds": medians,
        "over_ours": {name: median / medians[ours] for name, median in medians.items()},
    }


def linear(repeats: int) -> list[dict[str, Any]]:
    """Measures ours on one row of growing length."""
    rows = []
    for length in LINEAR_LENGTHS:
        run = jax_form(functools.partial(ssd, chunk_size=CHUNK, implementation="xla"), ssd_inputs(length, 1))
        run()
        seconds = measure({"ours": run}, repeats)["ours"]
        median = statistics.median(seconds)
        cost = 1e6 * median / length
        rows.append({"length": length, "seconds": seconds, "median_seconds": median, "microseconds_a_position": cost})
    return rows


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws time over length on logarithmic axes, beside a line of constant time a position."""
    from matplotlib.figure import Figure

    lengths, seconds = ([row[key] for row in rows] for key in ("length", "median_seconds"))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(lengths, [seconds[-1] * length / lengths[-1] for length in lengths], "--", color="0.6", label="linear")
    axes.loglog(lengths, seconds, "o-", label="kernels.ssd, forward and backward")
    axes.set(xlabel="positions of one row", ylabel="seconds", title=f"h {HEADS}, p {WIDTH}, n {STATE}, chunk {CHUNK}")
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
        cost = f"{row['microseconds_a_position']:.2f} us a position"
        table.add_row("ssd", f"1 x {row['length']}", "kernels.ssd", f"{1e3 * row['median_seconds']:.1f}", cost)
    return table


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures every operator; returns the record and its table."""
    parser = argparse.ArgumentParser(prog="experiments.benchmark ops", allow_abbrev=False)
    parser.add_argument("--figure", type=pathlib.Path, help="PNG of the cost of long rows")
    figure = parser.parse_args(rest).figure
    cases = [*(("ssd", length) for length in LENGTHS), *(("selective_scan", length) for length in SCAN_LENGTHS)]
    comparisons = [compare(op, length, options.repeats) for op, length in cases]
    rows = linear(options.repeats)
    if figure:
        draw(rows, figure)
    shape = {
        "heads": HEADS,
        "head_width": WIDTH,
        "state": STATE,
        "channels": CHANNELS,
        "chunks": CHUNKS,
        "chunk_of_long_rows": CHUNK,
    }
    record = {"environment": environment(), "shape": shape, "comparisons": comparisons, "linear": rows}
    return record, report(comparisons, rows)
