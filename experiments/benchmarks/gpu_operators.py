"""Time of the operators on this device, the device's ceilings, and how near to them each form comes."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu_cases import (
    LARGE_CATALOGUE,
    LONG_CASES,
    OPERATORS,
    PAPER_CASES,
    PRECISIONS,
    TINY_CASES,
    Case,
    Values,
    both,
    draw,
    forward,
    matmul_precision,
    precisions,
    stored,
)
from experiments.benchmarks.gpu_clock import Budget, Form, Settings, build_all, reason
from experiments.benchmarks.gpu_torch import torch_forms
from experiments.benchmarks.gpu_work import Work, default_kernel_config, floor_seconds, work
from kernels.ssd import SsdConfig

PASSES = ("forward", "forward_backward")
_CHUNK = 64
# Tuning of other people's kernels takes at most this share of what is left of the part.
_TUNING_SHARE = 0.25


def compiled_form(function: Callable[..., Any], *arguments: Any) -> Form:
    """Returns a JAX function, compiled for its arguments, as a form."""
    call = jax.jit(function).lower(*arguments).compile()
    return Form(functools.partial(call, *arguments), jax.block_until_ready)


def ceilings(settings: Settings) -> dict[str, Any]:
    """Measures what the device reaches: bytes a second of a large copy, read and written, and products a second."""
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


def _mamba2_jax(inputs: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> jax.Array:
    """The package mamba2-jax, whose maps are one a head."""
    from mamba2_jax.modeling import ssd_forward

    heads = inputs["x"].shape[2]
    B, C = (jnp.repeat(inputs[name][:, :, None], heads, axis=2) for name in "BC")
    x, dt, A, D, dt_bias = (inputs[name] for name in ("x", "dt", "A", "D", "dt_bias"))
    return ssd_forward(x, dt, A, B, C, _CHUNK, D, dt_bias, 0.0, float("inf"))[0]


def _jax_applies(case: Case, settings: Settings, precision: str) -> dict[str, Callable[..., jax.Array]]:
    """Returns (inputs, fixed) -> y of every JAX form; ours comes first."""
    forms = {settings.implementation: forward(case, settings.implementation, precision)}
    forms["xla"] = forward(case, "xla", precision)
    if case.op == "mixer_end":
        forms[f"{settings.implementation}, norm apart"] = forward(case, settings.implementation, precision, apart=True)
    if case.op == "ssd" and importlib.util.find_spec("mamba2_jax") and not case.ragged:
        forms["mamba2-jax"] = _mamba2_jax
    return forms


def jax_forms(
    applies: dict[str, Callable[..., jax.Array]], values: Values, precision: str, passes: tuple[str, ...] = PASSES
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
        case, drawn, precision, tiny=settings.tiny, limit=_TUNING_SHARE * budget.left()
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
            base, chunk_size=chunk, segments=parts, heads_per_program=count, forward_warps=num_warps,
            backward_warps=num_warps,
        )  # fmt: skip
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


def run(
    settings: Settings,
    rng: np.random.Generator,
    budget: Budget,
    result: dict[str, Any],
    saved: Callable[[str], None],
) -> None:
    """Measures everything into `result` and calls `saved` after every step."""
    result.update({"ceilings": ceilings(settings), "comparisons": [], "sweep": [], "skipped": {}})
    saved("ceilings")
    last: tuple[Case | None, Any] = (None, None)
    for kind, case, precision in jobs(settings.tiny):
        label = f"{kind}: {case.label} {precision}"
        if not settings.wants(label):
            continue
        if refusal := budget.refusal():
            result["skipped"][label] = refusal
            continue
        try:
            if last[0] is not case:
                last = case, draw(case, rng)
            if kind == "sweep":
                record = sweep(case, precision, settings, last[1])
            else:
                record = compare(case, precision, settings, result["ceilings"], last[1], budget)
            result[kind].append(record)
        except Exception as error:  # What cannot be timed must not stop the rest.
            result["skipped"][label] = reason(error)
        saved(label)
