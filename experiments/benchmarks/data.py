"""From a Parquet log to training batches: memory, time and rows per second, at several sizes of the log.

A log is made for each size: ids are text, events are in order of time with users mixed, item popularity falls off, and
users and items grow with the log (20 events per user on average) unless --users and --items say how many there are. A
fresh process reads, cleans and caches it; another one opens the cached log, splits it and takes batches of the Grain
loader through one shuffled epoch, at least --seconds and two batches. Each says its peak resident memory (VmHWM),
imports included, which "start" gives alone. CPU seconds are those of all threads: on a busy machine they tell the cost
of a row, where wall time tells the load.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table

from experiments.command_line import OptionParser
from tim4rec_jax.config import DataConfig
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.loader import Loader, PrefixSampler
from tim4rec_jax.data.splits import leave_one_out

EVENTS_PER_USER = 20
ROWS_PER_ITEM = 50
MOST_ITEMS = 100_000
START = 978_300_000
YEARS = 5 * 365 * 86_400
_PIECE = 2**20


def write_log(
    path: pathlib.Path, num_rows: int, seed: int, num_users: int | None = None, num_items: int | None = None
) -> None:
    """Writes a synthetic log of `num_rows` rows: user (text), item (text), timestamp (seconds, ascending)."""
    rng = np.random.default_rng(seed)
    num_users = num_users or max(1, num_rows // EVENTS_PER_USER)
    num_items = num_items or min(MOST_ITEMS, max(1, num_rows // ROWS_PER_ITEM))
    first, frames = 0, []
    while first < num_rows:
        size = min(_PIECE, num_rows - first)
        users = pl.Series(rng.integers(0, num_users, size)).cast(pl.String).str.zfill(12)
        items = pl.Series((num_items * rng.random(size) ** 2).astype(np.int64)).cast(pl.String).str.zfill(10)
        times = START + YEARS * np.arange(first, first + size) // num_rows
        frames.append(pl.LazyFrame({"user": "U" + users, "item": "B" + items, "timestamp": times}))
        first += size
    pl.concat(frames).sink_parquet(path)


def peak_bytes() -> int:
    """The most memory this process has held; 0 where the system does not say."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _settings(path: str, cache: str) -> DataConfig:
    return DataConfig(name="custom", path=path, cache_dir=cache, timestamp_precision="int64", loader="grain")


def ingest(path: str, cache: str) -> dict[str, Any]:
    """Reads, cleans and caches a log in this process."""
    start_bytes, began, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    log = load_log(_settings(path, cache))
    return {
        "start_bytes": start_bytes,
        "peak_bytes": peak_bytes(),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "rows_read": log.statistics.rows_read,
        "rows": log.num_rows,
        "users": log.num_users,
        "items": log.num_items,
        "fingerprint": log.fingerprint,
    }


def load_batches(path: str, cache: str, batch_size: str, max_len: str, seconds: str) -> dict[str, Any]:
    """Takes batches of the cached log in this process."""
    start_bytes, began = peak_bytes(), time.perf_counter()
    log = load_log(_settings(path, cache))
    examples = leave_one_out(log).train
    sampler = PrefixSampler(log, examples, max_len=int(max_len), batch_size=int(batch_size), seed=0)
    loader = Loader(sampler, on_device=False, precision="int64")
    batches = loader.epoch(1)
    next(batches)
    ready = time.perf_counter()
    taken, cpu = 0, time.process_time()
    for _ in batches:
        taken += 1
        if time.perf_counter() - ready > float(seconds) and taken > 1:
            break
    batches.close()
    return {
        "start_bytes": start_bytes,
        "peak_bytes": peak_bytes(),
        "seconds_to_first_batch": ready - began,
        "batches": taken,
        "batches_a_second": taken / (time.perf_counter() - ready),
        "cpu_seconds_a_batch": (time.process_time() - cpu) / max(taken, 1),
        "examples": len(examples),
        "mapped": not log.items.flags.owndata,
    }


TASKS = {"ingest": ingest, "load_batches": load_batches}


def in_fresh_process(task: str, *arguments: str) -> dict[str, Any]:
    """Runs one of `TASKS` in a process of its own and returns what it found.

    Raises:
      ValueError: if the process failed; the message is its last line.
    """
    command = [sys.executable, "-m", "experiments.benchmarks.data", task, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{task} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Makes a log of one size in a temporary folder and measures both tasks on it."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, cache = str(pathlib.Path(folder) / "log.parquet"), str(pathlib.Path(folder) / "cache")
        print(f"{num_rows:,} rows: writing", file=sys.stderr, flush=True)
        write_log(pathlib.Path(path), num_rows, options.seed, options.users, options.items)
        print(f"{num_rows:,} rows: reading and cleaning", file=sys.stderr, flush=True)
        read = in_fresh_process("ingest", path, cache)
        print(f"{num_rows:,} rows: batches", file=sys.stderr, flush=True)
        shape = (options.batch_size, options.max_len, options.seconds)
        batches = in_fresh_process("load_batches", path, cache, *map(str, shape))
        return {
            "rows": num_rows,
            "parquet_bytes": pathlib.Path(path).stat().st_size,
            "rows_a_second": num_rows / read["seconds"],
            "cpu_microseconds_a_row": 1e6 * read["cpu_seconds"] / num_rows,
            "ingest": read,
            "loader": batches,
        }


def _sizes(text: str) -> list[int]:
    return [int(float(size)) for size in text.split(",")]


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for sizes that are too small to be split.
    """
    parser = OptionParser(prog="experiments.benchmark logs")
    parser.add_argument("--rows", type=_sizes, default="1e6,5e6,2e7", help="rows of the logs")
    parser.add_argument("--users", type=int, help="users of every log; by default a twentieth of its rows")
    parser.add_argument("--items", type=int, help="items of every log; by default a fiftieth of its rows, at most 1e5")
    parser.add_argument("--batch_size", type=int, default=2048, help="examples of a batch")
    parser.add_argument("--max_len", type=int, default=50, help="positions of an example")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long batches are taken")
    parser.add_argument("--seed", type=int, default=0, help="of the logs")
    parser.add_argument("--folder", type=pathlib.Path, help="where the temporary files go")
    options = parser.parse_args(rest)
    if min(options.rows) < 1000:
        raise ValueError(f"--rows={','.join(map(str, options.rows))}: expected sizes of at least 1000")
    for name in ("users", "items"):
        number = getattr(options, name)
        if number is not None and not 1 <= number <= min(options.rows):
            raise ValueError(f"--{name}={number}: expected 1 to {min(options.rows)}, the rows of the smallest log")
    return options


def report(results: list[dict[str, Any]]) -> Table:
    """Peaks and speeds, a row per size."""
    table = Table(title="Parquet to ready, then batches of the Grain loader", title_justify="left")
    for column in ("rows", "start MB", "peak MB", "rows/s", "CPU us/row", "loader peak MB", "batches/s", "mapped"):
        table.add_column(column, justify="right")
    for one in results:
        read, batches = one["ingest"], one["loader"]
        table.add_row(
            f"{one['rows']:,}",
            f"{read['start_bytes'] / 1e6:,.0f}",
            f"{read['peak_bytes'] / 1e6:,.0f}",
            f"{one['rows_a_second']:,.0f}",
            f"{one['cpu_microseconds_a_row']:.2f}",
            f"{batches['peak_bytes'] / 1e6:,.0f}",
            f"{batches['batches_a_second']:.1f}",
            "yes" if batches["mapped"] else "no",
        )
    return table


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for, each size once; returns the record and its table."""
    from tim4rec_jax.run_dir import environment  # the measured processes should not import what only a record needs

    chosen = _parse(rest)
    results = [measure(num_rows, chosen) for num_rows in chosen.rows]
    settings = {name: value for name, value in vars(chosen).items() if name != "folder"}
    return {"environment": environment(), "settings": settings, "results": results}, report(results)


if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](*sys.argv[2:])))
