"""Operators on this device against their definitions in float64, values and every gradient, on fresh random inputs.

The definition (`implementation="reference"`) runs on the same device in blocks of rows that fit into memory; gradients
of parameters are added up over the blocks, so that every row counts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu_cases import (
    ODD_CASES,
    OPERATORS,
    PAPER_CASES,
    PRECISIONS,
    TINY_CASES,
    Arrays,
    Case,
    Values,
    both,
    draw,
    forward,
    precisions,
    stored,
)
from experiments.benchmarks.gpu_clock import Budget, Settings, build_all, reason

# Largest errors of y and of a gradient, relative in the norm, and over the largest magnitude. TF32 was seen to reach
# 6e-3 at single places of gradients behind a norm, where float32 kept to 1e-6.
LIMITS = {"float32": (2e-5, 1e-4), "tfloat32": (5e-3, 1e-2), "bfloat16": (2e-2, 2e-2)}
# A recurrence keeps a few states a position for its gradient.
_BLOCK_BYTES = 2**30
# At least so many blocks, where there are rows enough: their gradients of a parameter say how large its addends are.
_LEAST_BLOCKS = 16


def rows_of_a_block(case: Case) -> int:
    """Returns how many rows the definition takes at once: a divisor of b that keeps its states in memory."""
    if case.op == "softmax_cross_entropy":
        return case.sizes["t"]
    rows = case.sizes["b"]
    # The width d comes after the recurrence.
    widths = [size for axis, size in case.sizes.items() if axis not in "bd"]
    limit = max(1, min(_BLOCK_BYTES // (8 * int(np.prod(widths))), rows // _LEAST_BLOCKS))
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


def check(case: Case, implementation: str, wanted: tuple[str, ...], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Checks one case in all precisions; whatever goes wrong is in the records."""
    drawn = draw(case, rng)
    names = precisions(case, wanted)
    values = {name: stored(case, drawn, name) for name in names}

    def build(name: str) -> Any:
        run = jax.jit(both(forward(case, implementation, name)))
        return run.lower(values[name].inputs, values[name].fixed, values[name].dy).compile()

    runs, failed = build_all({name: functools.partial(build, name) for name in names})
    define = jax.jit(both(forward(case, "reference", "float32")))
    records, expected = [], {}
    for name in names:
        record = {"op": case.op, "sizes": case.sizes, "ragged": case.ragged, "precision": name}
        if name in failed:
            records.append(record | {"ok": False, "error": failed[name]})
            continue
        try:
            # Numbers rounded to bfloat16 are another input.
            storage = "bfloat16" if name == "bfloat16" else "float32"
            if storage not in expected:
                with jax.enable_x64(True):
                    wide = jax.tree.map(lambda a: a.astype(np.float64), (values[name].inputs, values[name].dy))
                    wide = Values(wide[0], values[name].fixed, wide[1])
                    expected[storage] = jax.device_get(definition(case, define, wide))
            record |= {"rows_of_a_block": rows_of_a_block(case)}
            record |= _check_precision(case, values[name], name, runs[name], expected[storage])
        except Exception as error:  # One broken kernel must not hide the others.
            record |= {"ok": False, "error": reason(error)}
        records.append(record)
    return records


def run(
    settings: Settings,
    rng: np.random.Generator,
    budget: Budget,
    result: dict[str, Any],
    saved: Callable[[str], None],
) -> None:
    """Checks all cases into `result` and calls `saved` after every step."""
    result.update({"checks": [], "failed": [], "skipped": {}})
    cases = TINY_CASES if settings.tiny else (*PAPER_CASES, *ODD_CASES)
    wanted = PRECISIONS[:1] if settings.tiny else PRECISIONS
    for case in cases:
        label = f"check of {case.label}"
        if not settings.wants(label):
            continue
        if refusal := budget.refusal():
            result["skipped"][label] = refusal
            continue
        try:
            records = check(case, settings.implementation, wanted, rng)
        except Exception as error:  # One broken operator must not hide the others.
            records = [{"op": case.op, "sizes": case.sizes, "precision": "", "ok": False, "error": reason(error)}]
        result["checks"] += records
        result["failed"] += [f"{case.label} {record['precision']}" for record in records if not record["ok"]]
        saved(label)
