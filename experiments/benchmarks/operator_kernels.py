"""How fast the operators run on a GPU: every backend, over the device's ceilings, cut up in other ways; and others'.

`time_all` (part `ops` of `experiments.benchmark gpu`) times every backend of every operator and says how near each
comes to its floor; `time_cuts` (part `cuts`) times other configs of the kernels; `time_opponents` (part `opponents`)
adds the times of PyTorch, mamba_ssm and causal_conv1d on the same card.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.operator_work import Work, default_kernel_config, floor_seconds, work
from experiments.benchmarks.operators import (
    LARGE_CATALOGUE,
    LONG_CASES,
    OPERATORS,
    PAPER_CASES,
    PRECISIONS,
    TINY_CASES,
    Apply,
    Case,
    Values,
    backends,
    both,
    draw,
    forward,
    implementations,
    matmul_precision,
    precisions,
    stored,
)
from experiments.benchmarks.opponents import mamba2_jax_ssd, torch_forms
from experiments.benchmarks.timing import Budget, Form, Part, Settings, build_all, compiled_form
from kernels.dispatch import find
from kernels.softmax_cross_entropy import TritonConfig
from kernels.ssd import SsdConfig

PASSES = ("forward", "forward_backward")
# Of mamba2-jax on a GPU.
_CHUNK = 64
# Tuning of other people's kernels takes at most this share of what is left of the part.
_TUNING_SHARE = 0.25
# Programs of a loop of the loss: one wave of them, or two, on a GPU of 132 multiprocessors.
_LOSS_PROGRAMS = (190, 256, 264)
# Values that are tried of fields of a config; of other fields the half and the double, or the other of yes and no.
_VALUES: dict[str, tuple[Any, ...]] = {
    "maxnreg": (None, 128, 162),
    "registers": (None, 128, 162),
    "ahead": (0, 1, 2),
    "pairs": (1, 2, 4),
}


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


def bounds_of(part: Part) -> dict[str, Any]:
    """Returns the device's ceilings from the record of the part `ops`, measured now if they are not there yet."""
    ops = part.whole.setdefault("ops", {})
    if "ceilings" not in ops:
        ops["ceilings"] = ceilings(part.settings)
        part.save("ceilings")
    return ops["ceilings"]


@dataclasses.dataclass(frozen=True)
class Built:
    """Programs that were compiled side by side, by name and pass.

    Attributes:
      forms: to time.
      compile_seconds: of each, while others were compiled on the other cores.
      failed: why others are missing.
    """

    forms: dict[str, dict[str, Form]]
    compile_seconds: dict[str, float]
    failed: dict[str, str]

    def time(self, settings: Settings) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Times all of them in turns; returns their records by "name: pass", and why others failed."""
        flat = {f"{name}: {of}": form for name, passes in self.forms.items() for of, form in passes.items()}
        times, untimed = settings.time(flat)
        for name, record in times.items():
            record["compile_seconds"] = self.compile_seconds[name]
        return times, self.failed | untimed


def jax_forms(applies: dict[str, Apply], values: Values, precision: str, passes: tuple[str, ...] = PASSES) -> Built:
    """Compiles all passes of all forms side by side."""
    arguments = {
        "forward": (values.inputs, values.fixed),
        "forward_backward": (values.inputs, values.fixed, values.dy),
    }
    seconds = {}

    def build(name: str, of: str) -> Form:
        apply, began = applies[name], time.perf_counter()
        # Contexts belong to a thread.
        with matmul_precision(precision):
            form = compiled_form(apply if of == "forward" else both(apply), *arguments[of])
        seconds[f"{name}: {of}"] = time.perf_counter() - began
        return form

    keys = list(itertools.product(applies, passes))
    built, failed = build_all({": ".join(key): functools.partial(build, *key) for key in keys})
    forms: dict[str, dict[str, Form]] = {}
    for name, of in keys:
        if f"{name}: {of}" in built:
            forms.setdefault(name, {})[of] = built[f"{name}: {of}"]
    return Built(forms, seconds, failed)


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
    case: Case, precision: str, settings: Settings, bounds: dict[str, Any], drawn: Values, absent: dict[str, str]
) -> dict[str, Any]:
    """Times one operator at one size and precision in every backend, in turns."""
    values = stored(case, drawn, precision)
    applies = {name: forward(case, name, precision) for name in backends(case.op, settings, absent)}
    if case.op == "ssd" and importlib.util.find_spec("mamba2_jax") and not case.ragged:
        applies["mamba2-jax"] = lambda inputs, _: mamba2_jax_ssd(**inputs, chunk_size=_CHUNK)
    built = jax_forms(applies, values, precision)
    first, differences = _differences(built.forms, {})
    times, missing = built.time(settings)
    counts = _fractions(times, work(case, precision), bounds, precision)
    record = {"op": case.op, "sizes": case.sizes, "precision": precision, "forms": times, **counts}
    record |= {"kernel_config": dataclasses.asdict(default_kernel_config(case, precision))}
    return record | {"y_differs": {"from": first, "over_largest": differences}, "missing": missing}


def oppose(
    case: Case, precision: str, settings: Settings, bounds: dict[str, Any], drawn: Values, budget: Budget
) -> dict[str, Any]:
    """Times PyTorch's forms of one operator at one size and precision, in turns; plain JAX says how far y is off."""
    forms, outputs, missing = torch_forms(
        case.op,
        drawn.inputs,
        drawn.fixed,
        drawn.dy,
        narrow=OPERATORS[case.op].stored,
        precision=precision,
        tiny=settings.tiny,
        limit=_TUNING_SHARE * budget.left(),
    )
    ours = jax_forms({"xla": forward(case, "xla", precision)}, stored(case, drawn, precision), precision, PASSES[:1])
    first, differences = _differences(ours.forms, outputs)
    times, untimed = settings.time({f"{name}: {of}": f for name, passes in forms.items() for of, f in passes.items()})
    counts = _fractions(times, work(case, precision), bounds, precision)
    record = {"op": case.op, "sizes": case.sizes, "precision": precision, "forms": times, **counts}
    return record | {"y_differs": {"from": first, "over_largest": differences}, "missing": missing | untimed}


def add_to(comparisons: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Puts what was found of opponents with our times of the same operator, size and precision, if they are there."""
    key = ("op", "sizes", "precision")
    for ours in comparisons:
        if all(ours[name] == found[name] for name in key):
            ours["forms"] |= found["forms"]
            ours["missing"] |= found["missing"]
            ours["opponents_y_differ"] = found["y_differs"]
            return
    comparisons.append(found)


def comparison_jobs(tiny: bool) -> Iterator[tuple[Case, str]]:
    """Yields the case and the precision of what is compared, the most telling first."""
    if tiny:
        yield from ((dataclasses.replace(case, ragged=False), "bfloat16") for case in TINY_CASES[:2])
        return
    usual, exact = PRECISIONS[:2], PRECISIONS[2]
    long_row = next(c for c in LONG_CASES if c.op == "ssd" and c.sizes["b"] == 1)
    first = [case for case in PAPER_CASES if case.op == "ssd"] + [long_row]
    yield from ((case, "tfloat32") for case in first)
    paper = [(case, precision) for case in PAPER_CASES for precision in precisions(case, usual)]
    late = [(case, precision) for case in LONG_CASES for precision in precisions(case, usual)]
    late += [(case, exact) for case in PAPER_CASES if OPERATORS[case.op].has_products]
    late.append((LARGE_CATALOGUE, "tfloat32"))
    yield from (job for job in paper + late if not (job[0] in first and job[1] == "tfloat32"))


def opponent_jobs(tiny: bool) -> Iterator[tuple[Case, str]]:
    """Yields the case and the precision at which others are timed: the published sizes."""
    if tiny:
        yield from comparison_jobs(tiny)
        return
    ordered = sorted(PAPER_CASES, key=lambda case: case.op != "ssd")
    yield from ((case, precision) for case in ordered for precision in precisions(case, PRECISIONS[:1]))
    yield from ((case, "bfloat16") for case in ordered)


def cut_jobs(tiny: bool) -> Iterator[tuple[Case, str]]:
    """Yields the operators and sizes at which other configs of the kernels are tried."""
    if tiny:
        yield dataclasses.replace(TINY_CASES[0], ragged=False), "tfloat32"
        return
    for case, precision in comparison_jobs(tiny):
        # Of long rows the longest.
        if precision == "tfloat32" and (case in PAPER_CASES or case.sizes.get("b") == 1):
            yield case, precision


def _words(case: Case, precision: str) -> dict[str, Any]:
    """What a backend's function of a default config may ask for, by its names."""
    sizes = {
        "batch": case.sizes.get("b"),
        "length": case.sizes.get("l"),
        "heads": case.sizes.get("h"),
        "groups": 1,
        "width": case.sizes.get("p") or case.sizes.get("d"),
        "state_width": case.sizes.get("n"),
        "channels": case.sizes.get("c") or case.sizes.get("e"),
        "chunk_size": 64,
        "exact_products": precision == "float32",
        "precision": precision,
        "itemsize": 2 if precision == "bfloat16" else 4,
    }
    return {name: value for name, value in sizes.items() if value is not None}


def default_config_of(case: Case, precision: str, implementation: str) -> Any:
    """Returns the config that a backend takes where nobody says otherwise, or None where it offers none.

    A backend's module offers it as `default_<backend>_config` or `default_config`, functions of the shape, or as a
    dataclass whose name ends with Config and all of whose fields have defaults.
    """
    if implementation == "pallas_triton":
        return default_kernel_config(case, precision)
    function = find(case.op, implementations(case.op), implementation)
    if "config" not in inspect.signature(function).parameters:
        return None
    module = sys.modules[function.__module__]
    words = _words(case, precision)
    for name in (f"default_{implementation}_config", "default_config"):
        if maker := getattr(module, name, None):
            asked = inspect.signature(maker).parameters
            return maker(**{word: value for word, value in words.items() if word in asked})
    kinds = [kind for name, kind in vars(module).items() if name.endswith("Config") and dataclasses.is_dataclass(kind)]
    for kind in kinds:
        if all(f.default is not dataclasses.MISSING for f in dataclasses.fields(kind)):
            return kind()
    return None


def neighbours(base: Any) -> dict[str, Any]:
    """Returns a config and those that differ from it in one field, by what they say."""
    tried = {"default": base}
    for field in dataclasses.fields(base):
        value = getattr(base, field.name)
        if field.name in _VALUES:
            values = _VALUES[field.name]
        elif isinstance(value, bool):
            values = (not value,)
        elif isinstance(value, int) and value > 0:
            values = (value // 2, 2 * value) if value > 1 else (2,)
        else:
            continue
        for other in values:
            if other != value:
                # What a config refuses at once is not tried.
                with contextlib.suppress(ValueError):
                    tried[f"{field.name} {other}"] = dataclasses.replace(base, **{field.name: other})
    return tried


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


def configs(case: Case, base: Any, tiny: bool) -> dict[str, Any]:
    """Returns the configs of a backend that are tried, by what they say."""
    if isinstance(base, SsdConfig):
        return cuts(case, base, tiny)
    if isinstance(base, TritonConfig):
        loops = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        return {
            f"programs {count}": TritonConfig(
                **{name: dataclasses.replace(loop, programs=count) for name, loop in loops.items()}
            )
            for count in _LOSS_PROGRAMS
        }
    return neighbours(base)


def sweep(case: Case, precision: str, implementation: str, settings: Settings, drawn: Values) -> dict[str, Any] | None:
    """Times forward, and forward and backward, of a backend with many configs; None where it offers none."""
    base = default_config_of(case, precision, implementation)
    if base is None:
        return None
    tried = configs(case, base, settings.tiny)
    applies = {name: forward(case, implementation, precision, config=config) for name, config in tried.items()}
    times, missing = jax_forms(applies, stored(case, drawn, precision), precision).time(settings)
    seconds = {name: record["median_seconds"] for name, record in times.items()}
    best = {of: min((n for n in seconds if n.endswith(f": {of}")), key=seconds.get, default=None) for of in PASSES}
    record = {"op": case.op, "sizes": case.sizes, "precision": precision, "implementation": implementation}
    record |= {
        "default": dataclasses.asdict(base),
        "compile_seconds": {n: t["compile_seconds"] for n, t in times.items()},
    }
    return record | {"median_seconds": seconds, "best": best, "missing": missing}


def _with_drawn(part: Part, jobs: Iterator[tuple[Case, str]], measure: Any) -> Iterator[tuple[str, Any]]:
    """Yields labelled jobs that call `measure(case, precision, values)`; values of the last case are kept."""
    last: list[Any] = [None, None]

    def run(case: Case, precision: str) -> None:
        if last[0] is not case:
            last[:] = case, draw(case, part.rng)
        measure(case, precision, last[1])

    for case, precision in jobs:
        yield f"{case.label} {precision}", functools.partial(run, case, precision)


def time_all(part: Part) -> None:
    """Measures ceilings, and every backend of every operator."""
    comparisons, absent = part.record.setdefault("comparisons", []), part.record.setdefault("absent", {})
    bounds = bounds_of(part)

    def measure(case: Case, precision: str, drawn: Values) -> None:
        comparisons.append(compare(case, precision, part.settings, bounds, drawn, absent))

    part.do_all(_with_drawn(part, comparison_jobs(part.settings.tiny), measure))


def time_cuts(part: Part) -> None:
    """Measures other configs of the kernels."""
    found, absent = part.record.setdefault("sweep", []), part.record.setdefault("absent", {})

    def measure(case: Case, precision: str, drawn: Values) -> None:
        swept = [
            sweep(case, precision, name, part.settings, drawn)
            for name in backends(case.op, part.settings, absent)
            if name != "xla"
        ]
        found.extend(one for one in swept if one is not None)

    part.do_all(_with_drawn(part, cut_jobs(part.settings.tiny), measure))


def time_opponents(part: Part) -> None:
    """Measures PyTorch, mamba_ssm and causal_conv1d at the published sizes."""
    bounds = bounds_of(part)
    comparisons = part.whole["ops"].setdefault("comparisons", [])

    def measure(case: Case, precision: str, drawn: Values) -> None:
        add_to(comparisons, oppose(case, precision, part.settings, bounds, drawn, part.budget))

    part.do_all(_with_drawn(part, opponent_jobs(part.settings.tiny), measure))
