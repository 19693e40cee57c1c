"""Hardware counters of the SSD's kernels by Nsight Compute, where it is installed.

`count_all` (part `counters` of `experiments.benchmark gpu`) runs this module under ncu, once per backend and size:

    ncu --csv ... python -m experiments.benchmarks.gpu_counters gluon 1
"""

import csv
import functools
import io
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.operators import PAPER_CASES, TINY_CASES, Case, backends, both, draw, forward, stored
from experiments.benchmarks.timing import Part

METRICS = (
    "gpu__time_duration.sum",
    "l1tex__data_pipe_lsu_wavefronts.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__t_sector_hit_rate.pct",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
)
_MOST_LAUNCHES = 8


def cases(tiny: bool) -> tuple[Case, ...]:
    """Returns the sizes of the SSD whose kernels are looked at."""
    return tuple(case for case in (TINY_CASES if tiny else PAPER_CASES) if case.op == "ssd")


def command(ncu: str, implementation: str, index: int, tiny: bool) -> list[str]:
    """Returns the command that counts one backend at one size; clocks are left as they are."""
    options = ["--csv", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    options += ["--kernel-name", "regex:ssd", "--launch-count", str(_MOST_LAUNCHES)]
    own = [sys.executable, "-m", __name__, implementation, str(index), *(["tiny"] if tiny else [])]
    return [ncu, *options, *own]


def read_counters(text: str) -> list[dict[str, Any]]:
    """Returns each launch's kernel and metrics from what ncu prints as CSV among the program's own lines."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[first:]))) if first is not None else ():
        if row.get("Metric Name") and row.get("Metric Value"):
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "metrics": {}, "units": {}})
            value = row["Metric Value"].replace(",", "")
            launch["metrics"][row["Metric Name"]] = float(value) if value[-1].isdigit() else value
            launch["units"][row["Metric Name"]] = row.get("Metric Unit")
    return list(launches.values())


def count_all(part: Part) -> None:
    """Counts every backend of the SSD but plain JAX, at the published sizes; the record says so where ncu is absent."""
    ncu = shutil.which("ncu")
    if ncu is None:
        part.record["absent"] = {"ncu": "ncu is not on the PATH"}
        return
    absent, found = part.record.setdefault("absent", {}), part.record.setdefault("launches", [])

    def count(name: str, index: int, case: Case) -> None:
        ran = subprocess.run(
            command(ncu, name, index, part.settings.tiny),
            capture_output=True,
            text=True,
            timeout=max(part.budget.left(), 1.0),
        )
        launches = read_counters(ran.stdout)
        if not launches:
            said = (ran.stderr.strip() or ran.stdout.strip()).splitlines()
            raise RuntimeError(f"ncu counted nothing (exit code {ran.returncode}): {said[-1] if said else ''}")
        found.append({"op": case.op, "sizes": case.sizes, "implementation": name, "launches": launches})

    names = [name for name in backends("ssd", part.settings, absent) if name != "xla"]
    part.do_all(
        (f"{case.label} {name}", functools.partial(count, name, index, case))
        for index, case in enumerate(cases(part.settings.tiny))
        for name in names
    )


def main(implementation: str, index: str, tiny: str = "") -> None:
    """Runs value and gradients once; what ncu looks at."""
    case = cases(bool(tiny))[int(index)]
    values = stored(case, draw(case, np.random.default_rng(0)), "tfloat32")
    run = jax.jit(both(forward(case, implementation, "tfloat32")))
    jax.block_until_ready(run(values.inputs, values.fixed, values.dy))


if __name__ == "__main__":
    main(*sys.argv[1:])
