"""The operators against their definitions in float64: cases, random inputs, values and every gradient on this device.

The definition (`implementation="reference"`) runs on the same device in blocks of rows that fit into memory; gradients
of parameters are added up over the blocks, so that every row counts.
"""

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import Part, Settings, build_all, reason
from kernels.causal_conv1d import causal_conv1d
from kernels.dispatch import Implementations, find
from kernels.selective_scan import selective_scan
from kernels.softmax_cross_entropy import softmax_cross_entropy
from kernels.ssd import ssd

Sizes = dict[str, int]
Arrays = dict[str, Any]
Apply = Callable[[Arrays, Arrays], jax.Array]
TAPS = 4
# How float32 numbers are multiplied, or bfloat16 storage with float32 sums.
PRECISIONS = ("tfloat32", "bfloat16", "float32")


@dataclass(frozen=True)
class Case:
    """An operator at a size.

    Attributes:
      op: its name.
      sizes: by axis letter.
      ragged: rows of many lengths, or targets of which some are missing.
    """

    op: str
    sizes: Sizes
    ragged: bool = False

    @property
    def label(self) -> str:
        """As in "ssd b2048 l50 h4 p32 n32"."""
        sizes = " ".join(f"{axis}{size}" for axis, size in self.sizes.items())
        return f"{self.op} {sizes}{' ragged' if self.ragged else ''}"


@dataclass(frozen=True)
class Values:
    """What an operator is called with.

    Attributes:
      inputs: arrays that have gradients.
      fixed: integer arrays.
      dy: gradient of the output.
    """

    inputs: Arrays
    fixed: Arrays
    dy: Any


@dataclass(frozen=True)
class Operator:
    """How an operator is called.

    Attributes:
      function: the public one.
      draw: sizes, generator and whether ragged -> values in float32.
      stored: inputs that are bfloat16 where storage is; the rest stays float32.
      parameters: inputs without rows, whose gradients are sums over rows.
      has_products: it multiplies matrices, so that TF32 is another thing than float32.
      options: further arguments.
    """

    function: Callable[..., jax.Array]
    draw: Callable[[Sizes, np.random.Generator, bool], Values]
    stored: tuple[str, ...]
    parameters: tuple[str, ...]
    has_products: bool
    options: dict[str, Any] = field(default_factory=dict)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _segment_ids(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Arrays:
    if not ragged:
        return {}
    lengths = rng.integers(1, sizes["l"] + 1, sizes["b"])
    return {"segment_ids": (np.arange(sizes["l"]) < lengths[:, None]).astype(np.int32)}


def _draw_ssd(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    b, l, h, p, n = (sizes[axis] for axis in "blhpn")  # noqa: E741
    inputs = {
        "x": _normal(rng, b, l, h, p),
        "dt": _normal(rng, b, l, h) - 3,
        "A": -np.linspace(1, 16, h, dtype=np.float32),
        "B": _normal(rng, b, l, n),
        "C": _normal(rng, b, l, n),
        "D": 1 + _normal(rng, h),
        "dt_bias": _normal(rng, h),
    }
    return Values(inputs, _segment_ids(sizes, rng, ragged), _normal(rng, b, l, h, p))


def _draw_scan(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    b, l, e, n = (sizes[axis] for axis in "blen")  # noqa: E741
    inputs = {
        "x": _normal(rng, b, l, e),
        "dt": _normal(rng, b, l, e) - 3,
        "A": -np.tile(np.arange(1, n + 1, dtype=np.float32), (e, 1)),
        "B": _normal(rng, b, l, n),
        "C": _normal(rng, b, l, n),
        "D": 1 + _normal(rng, e),
        "dt_bias": _normal(rng, e),
    }
    return Values(inputs, _segment_ids(sizes, rng, ragged), _normal(rng, b, l, e))


def _draw_conv(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    b, l, c = (sizes[axis] for axis in "blc")  # noqa: E741
    inputs = {"x": _normal(rng, b, l, c), "weight": _normal(rng, TAPS, c) / 2, "bias": _normal(rng, c)}
    return Values(inputs, {}, _normal(rng, b, l, c))


def _draw_loss(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    t, v, d = (sizes[axis] for axis in "tvd")
    targets = rng.integers(0, v, t).astype(np.int32)
    if ragged:
        targets[rng.random(t) < 0.2] = -1
    # Scores of standard deviation 2.
    inputs = {"hidden": 2 * d**-0.5 * _normal(rng, t, d), "embedding": _normal(rng, v, d)}
    return Values(inputs, {"targets": targets}, _normal(rng, t))


OPERATORS = {
    "ssd": Operator(ssd, _draw_ssd, ("x", "B", "C"), ("A", "D", "dt_bias"), True),
    "causal_conv1d": Operator(causal_conv1d, _draw_conv, ("x",), ("weight", "bias"), False, {"activation": "silu"}),
    "selective_scan": Operator(selective_scan, _draw_scan, ("x", "dt", "B", "C"), ("A", "D", "dt_bias"), False),
    "softmax_cross_entropy": Operator(softmax_cross_entropy, _draw_loss, ("hidden", "embedding"), ("embedding",), True),
}

_SSD, _SSD_WIDE = {"h": 4, "p": 32, "n": 32}, {"h": 4, "p": 128, "n": 64}
_SCAN, _CHANNELS = {"e": 128, "n": 32}, {"c": 192}
# Rows and positions of the recommenders' batches.
_BEAUTY, _ML_1M = {"b": 2048, "l": 50}, {"b": 1024, "l": 200}
PAPER_CASES = (
    Case("ssd", _BEAUTY | _SSD),
    Case("ssd", _ML_1M | _SSD),
    Case("ssd", {"b": 256, "l": 200} | _SSD_WIDE),
    Case("causal_conv1d", _BEAUTY | _CHANNELS),
    Case("causal_conv1d", _ML_1M | _CHANNELS),
    Case("selective_scan", {"b": 512, "l": 200} | _SCAN),
    Case("softmax_cross_entropy", {"t": 2048, "v": 12_102, "d": 64}),
)
# As many tokens as the batches above, in ever fewer rows.
_LONG = ({"b": 50, "l": 2048}, {"b": 6, "l": 16_384}, {"b": 1, "l": 65_536})
LONG_CASES = tuple(
    Case(op, rows | widths)
    for rows in _LONG
    for op, widths in [("ssd", _SSD), ("causal_conv1d", _CHANNELS), ("selective_scan", _SCAN)]
)
LARGE_CATALOGUE = Case("softmax_cross_entropy", {"t": 4096, "v": 1_000_000, "d": 64})
ODD_CASES = (
    Case("ssd", _BEAUTY | _SSD, ragged=True),
    Case("ssd", {"b": 64, "l": 1} | _SSD),
    Case("ssd", {"b": 64, "l": 17} | _SSD, ragged=True),
    Case("ssd", {"b": 64, "l": 33} | _SSD_WIDE, ragged=True),
    # Few long rows are cut into segments.
    Case("ssd", {"b": 2, "l": 4099} | _SSD, ragged=True),
    Case("ssd", {"b": 1, "l": 65_536} | _SSD),
    Case("causal_conv1d", {"b": 64, "l": 1} | _CHANNELS),
    Case("causal_conv1d", {"b": 33, "l": 17, "c": 100}),
    Case("causal_conv1d", {"b": 2, "l": 4099} | _CHANNELS),
    Case("selective_scan", {"b": 64, "l": 1} | _SCAN),
    Case("selective_scan", {"b": 33, "l": 17, "e": 100, "n": 20}, ragged=True),
    Case("selective_scan", {"b": 64, "l": 33} | _SCAN, ragged=True),
    Case("softmax_cross_entropy", {"t": 33, "v": 1001, "d": 64}, ragged=True),
)
TINY_CASES = (
    Case("ssd", {"b": 2, "l": 17, "h": 2, "p": 16, "n": 16}, ragged=True),
    Case("causal_conv1d", {"b": 2, "l": 5, "c": 16}),
    Case("selective_scan", {"b": 2, "l": 4, "e": 8, "n": 4}),
    Case("softmax_cross_entropy", {"t": 16, "v": 40, "d": 16}, ragged=True),
)


def draw(case: Case, rng: np.random.Generator) -> Values:
    """Draws float32 values of a case; those of one that is not ragged have no segment ids."""
    return OPERATORS[case.op].draw(case.sizes, rng, case.ragged)


def stored(case: Case, values: Values, precision: str) -> Values:
    """Returns the values on the device, in the storage of a precision."""
    narrow = OPERATORS[case.op].stored if precision == "bfloat16" else ()
    inputs = {name: jnp.asarray(a, jnp.bfloat16 if name in narrow else a.dtype) for name, a in values.inputs.items()}
    # A loss is float32 or wider; other outputs have the dtype of x.
    dy_dtype = jnp.bfloat16 if "x" in narrow else values.dy.dtype
    return Values(inputs, jax.tree.map(jnp.asarray, values.fixed), jnp.asarray(values.dy, dy_dtype))


def precisions(case: Case, wanted: tuple[str, ...]) -> list[str]:
    """Returns the precisions that differ for a case; without products TF32 is float32."""
    if OPERATORS[case.op].has_products:
        return list(wanted)
    return list(dict.fromkeys("float32" if name == "tfloat32" else name for name in wanted))


def matmul_precision(precision: str) -> Any:
    """Returns the context in which plain JAX multiplies so; "default" is TF32 on GPUs."""
    return jax.default_matmul_precision("highest" if precision == "float32" else "default")


def implementations(op: str) -> Implementations:
    """Returns an operator's mapping of names to backends."""
    return importlib.import_module(f"kernels.{op}").IMPLEMENTATIONS


def backends(op: str, settings: Settings, absent: dict[str, str]) -> list[str]:
    """Returns the backends of an operator that can be imported here, plain JAX last and without the definition.

    Args:
      op: its name.
      settings: which ones are asked for.
      absent: where to note why others are missing.
    """
    names = [name for name in implementations(op) if name not in ("reference", "xla")]
    found = []
    for name in [*names, "xla"]:
        if settings.implementations and name not in settings.implementations:
            continue
        try:
            find(op, implementations(op), name)
        except ValueError as error:
            absent[f"{op}: {name}"] = str(error)
            continue
        found.append(name)
    return found


def forward(case: Case, implementation: str, precision: str, **options: Any) -> Apply:
    """Returns (inputs, fixed) -> y by an implementation of the operator."""
    operator = OPERATORS[case.op]
    arguments = operator.options | options | {"implementation": implementation}
    if operator.has_products:
        arguments["precision"] = "highest" if precision == "float32" else "default"

    def apply(inputs: Arrays, fixed: Arrays) -> jax.Array:
        with matmul_precision(precision):
            return operator.function(**arguments, **inputs, **fixed)

    return apply


def both(apply: Apply) -> Callable[..., tuple[jax.Array, Arrays]]:
    """Returns (inputs, fixed, dy) -> y and the gradients of all inputs."""

    def run(inputs: Arrays, fixed: Arrays, dy: jax.Array) -> tuple[jax.Array, Arrays]:
        y, pull = jax.vjp(lambda inputs: apply(inputs, fixed), inputs)
        return y, pull(dy.astype(y.dtype))[0]

    return run


# Largest errors of y and of a gradient, relative in the norm, and over the largest magnitude. TF32 was seen to reach
# 6e-3 at single places of gradients behind a norm, where float32 kept to 1e-6.
LIMITS = {"float32": (2e-5, 1e-4), "tfloat32": (5e-3, 1e-2), "bfloat16": (2e-2, 2e-2)}
# A recurrence keeps a few states per position for its gradient.
_BLOCK_BYTES = 2**30
# At least so many blocks, where there are rows enough: their gradients of a parameter say how large its addends are.
_LEAST_BLOCKS = 16


def rows_of_a_block(case: Case) -> int:
    """Returns how many rows the definition takes at once: a divisor of b that keeps its states in memory."""
    if case.op == "softmax_cross_entropy":
        return case.sizes["t"]
    rows = case.sizes["b"]
    numbers = int(np.prod(list(case.sizes.values()))) // rows
    limit = max(1, min(_BLOCK_BYTES // (8 * numbers), rows // _LEAST_BLOCKS))
    return max(size for size in range(1, limit + 1) if rows % size == 0)


def definition(
    case: Case, run: Callable[..., tuple[jax.Array, Arrays]], values: Values
) -> tuple[jax.Array, Arrays, Arrays]:
    """Computes y and all gradients in blocks of rows; call it in 64-bit mode.

    Args:
      case: which operator.
      run: (inputs, fixed, dy) -> y and gradients by the definition.
      values: float64 inputs and dy.

    Returns:
      y, the gradients, and of each parameter's gradient the root of the sum of squares over the blocks.
    """
    parameters = OPERATORS[case.op].parameters
    rows, size = values.dy.shape[0], rows_of_a_block(case)
    blocks = []
    for start in range(0, rows, size):
        block = slice(start, start + size)
        inputs = {name: a if name in parameters else a[block] for name, a in values.inputs.items()}
        blocks.append(run(inputs, {name: a[block] for name, a in values.fixed.items()}, values.dy[block]))
    y = jnp.concatenate([y for y, _ in blocks])
    gradients = {
        name: sum(g[name] for _, g in blocks) if name in parameters else jnp.concatenate([g[name] for _, g in blocks])
        for name in values.inputs
    }
    spreads = {name: jnp.sqrt(sum(g[name] ** 2 for _, g in blocks)) for name in parameters}
    return y, gradients, spreads


def _errors(out: np.ndarray, expected: np.ndarray, spread: np.ndarray | None) -> tuple[float, float]:
    """Error in the norm and at the worst place, over the expected array's own; absolute where that is 0.

    A sum over rows may by chance lie near 0, while its rounding goes with its addends: `spread` is then the measure.
    """
    difference = (out.astype(np.float64) - expected).ravel()
    measures = [expected] if spread is None else [expected, spread]
    norm = max(np.linalg.norm(measure.ravel()) for measure in measures)
    largest = max(np.max(np.abs(measure)) for measure in measures)
    return np.linalg.norm(difference) / (norm or 1.0), np.max(np.abs(difference)) / (largest or 1.0)


def _same_bits(first: Any, second: Any) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def judge(results: tuple[Any, Arrays], expected: tuple[Any, Arrays, Arrays], precision: str) -> dict[str, Any]:
    """Compares y and gradients with the definition's; NaN never passes."""
    value_limit, gradient_limit = LIMITS[precision]
    pairs = {"y": (results[0], expected[0], value_limit)}
    pairs |= {f"d {name}": (g, expected[1][name], gradient_limit) for name, g in results[1].items()}
    errors, ok = {}, True
    for name, (out, wanted, limit) in pairs.items():
        norm, largest = _errors(out, wanted, expected[2].get(name.removeprefix("d ")) if name != "y" else None)
        good = bool(norm <= limit and largest <= limit)
        ok = ok and good
        # JSON has no NaN.
        errors[name] = {"norm": _finite(norm), "largest": _finite(largest), "limit": limit, "ok": good}
    return {"errors": errors, "ok": ok}


def _finite(number: float) -> float | str:
    return float(number) if np.isfinite(number) else str(number)


def _check_precision(case: Case, values: Values, precision: str, run: Any, expected: Any) -> dict[str, Any]:
    first, second = (jax.device_get(run(values.inputs, values.fixed, values.dy)) for _ in range(2))
    record = judge(first, expected, precision)
    record["same_bits"] = _same_bits(first, second)
    record["ok"] = record["ok"] and record["same_bits"]
    return record


class Refused(ValueError):
    """A backend does not offer this, and says so before anything is compiled."""


def _compiled(case: Case, implementation: str, precision: str, values: Values) -> tuple[Any, float]:
    """Compiles value and gradients; returns the program and the seconds, while others are compiled on other cores.

    Raises:
      Refused: the backend does not offer it.
    """
    began = time.perf_counter()
    arguments = (values.inputs, values.fixed, values.dy)
    try:
        traced = jax.jit(both(forward(case, implementation, precision))).trace(*arguments)
    except ValueError as error:
        raise Refused(str(error)) from error
    return traced.lower().compile(), time.perf_counter() - began


def check(case: Case, names: list[str], wanted: tuple[str, ...], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Checks one case in all backends and precisions; whatever goes wrong is in the records."""
    drawn = draw(case, rng)
    values = {precision: stored(case, drawn, precision) for precision in precisions(case, wanted)}
    keys = [(precision, name) for precision in values for name in names]
    builders = {f"{p} {name}": functools.partial(_compiled, case, name, p, values[p]) for p, name in keys}
    runs, failed = build_all(builders)
    define = jax.jit(both(forward(case, "reference", "float32")))
    records, expected = [], {}
    for precision, name in keys:
        record: dict[str, Any] = {"op": case.op, "sizes": case.sizes, "ragged": case.ragged}
        record |= {"precision": precision, "implementation": name}
        if why := failed.get(f"{precision} {name}"):
            refused = why.startswith("Refused")
            records.append(record | {"ok": refused, "refused" if refused else "error": why})
            continue
        try:
            # Numbers rounded to bfloat16 are another input.
            storage = "bfloat16" if precision == "bfloat16" else "float32"
            if storage not in expected:
                with jax.enable_x64(True):
                    wide = jax.tree.map(
                        lambda a: a.astype(np.float64), (values[precision].inputs, values[precision].dy)
                    )
                    wide = Values(wide[0], values[precision].fixed, wide[1])
                    expected[storage] = jax.device_get(definition(case, define, wide))
            run, seconds = runs[f"{precision} {name}"]
            record |= {"rows_of_a_block": rows_of_a_block(case), "compile_seconds": seconds}
            record |= _check_precision(case, values[precision], precision, run, expected[storage])
        except Exception as error:  # One broken kernel must not hide the others.
            record |= {"ok": False, "error": reason(error)}
        records.append(record)
    return records


def check_all(part: Part) -> None:
    """Checks all cases in every backend."""
    checks, failed = part.record.setdefault("checks", []), part.record.setdefault("failed", [])
    absent, settings = part.record.setdefault("absent", {}), part.settings

    def check_case(case: Case) -> None:
        try:
            names = backends(case.op, settings, absent)
            records = check(case, names, PRECISIONS[:1] if settings.tiny else PRECISIONS, part.rng)
        except Exception as error:  # An operator that is broken as a whole has failed, too.
            records = [{"op": case.op, "sizes": case.sizes, "precision": "", "ok": False, "error": reason(error)}]
        checks.extend(records)
        failed.extend(
            f"{case.label} {record['precision']} {record.get('implementation', '')}".rstrip()
            for record in records
            if not record["ok"]
        )

    # The SSD, which has most backends, comes first.
    cases = TINY_CASES if settings.tiny else sorted((*PAPER_CASES, *ODD_CASES), key=lambda case: case.op != "ssd")
    part.do_all((f"check of {case.label}", functools.partial(check_case, case)) for case in cases)
