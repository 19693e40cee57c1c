"""The service's latency at a given rate of requests, and how many users a second it answers in batches.

A run with random parameters is made at a configuration's shapes, and `experiments.serve` is started with it on one
processor; requests come from the others.

first       the first ten requests after /ready, one after the other
rate        requests for one user each at random moments, --rate a second on average, whether or not those before are
            answered; a request's time begins when it was due. --repeats rounds of --seconds each
mixed       the same, with an event of the user (synced to the disk before it is answered) before every fifth
batches     requests for many users each, one after the other: users per second

Answers are lists of ten without the items of the history. A program compiled by a request, or an answer other than 200,
makes the exit code 1.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.table import Table

from experiments.benchmarks.small_run import ROOT, START
from experiments.cli import OptionParser
from experiments.configs import load_config
from experiments.family import exact_order
from tim4rec_jax.checks import require
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.models import build_model, init_params
from tim4rec_jax.run_dir import CHECKPOINTS, create_run, environment
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.setup import with_data

_MOST_SECONDS = 900
_CONNECTIONS = 64
_EARLY = 0.002
_BATCH = 256
# What the service itself measures: from a request to its answer, and of that the answering.
_INSIDE = {
    "mean_inside_ms": 'tim4rec_request_seconds{route="/v1/recommend"}',
    "mean_answering_ms": "tim4rec_batch_seconds",
}
_BATCHES = 12
_TINY = {"max_len": 8, "d_model": 16, "num_layers": 1, "d_state": 4, "head_dim": 16}


def _parse(rest: list[str]) -> argparse.Namespace:
    parser = OptionParser(prog="experiments.benchmark service")
    parser.add_argument("--config", default="ml1m_tim4rec_causal", help="whose model")
    parser.add_argument("--items", type=int, default=100_000, help="items of the catalogue")
    parser.add_argument("--users", type=int, default=10_000, help="users of the log, of 10 to 100 events each")
    parser.add_argument("--rate", type=float, default=50, help="requests per second")
    parser.add_argument("--seconds", type=float, default=20, help="of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_flag("--tiny", "sizes at which the program can be tried out")
    options = parser.parse_args(rest)
    for name, least in (("items", 100), ("users", 100), ("rate", 1), ("seconds", 1)):
        require(getattr(options, name) >= least, f"--{name}={getattr(options, name)} must be at least {least}")
    require(options.rate <= 10_000, f"--rate={options.rate} must be 10000 at most")
    return options


def make_run(folder: pathlib.Path, options: argparse.Namespace) -> list[str]:
    """Leaves a run folder as training does, with random parameters, and returns its users."""
    rng = np.random.default_rng(options.seed)
    lengths = rng.integers(10, 101, options.users)
    total = max(int(lengths.sum()), options.items)
    lengths[-1] += total - lengths.sum()
    items = np.concatenate([rng.permutation(options.items), rng.integers(0, options.items, total - options.items)])
    frame = pl.DataFrame(
        {
            "user": np.repeat(np.arange(options.users), lengths),
            "item": rng.permutation(items),
            "timestamp": START + np.cumsum(rng.integers(0, 20, total)),
        }
    )
    config = exact_order(load_config(options.config))
    frame.write_parquet(folder.with_suffix(".parquet"))
    data = dataclasses.replace(config.data, name="custom", path=str(folder.with_suffix(".parquet")), k_core=0)
    if options.tiny:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **_TINY))
    log = load_log(data)
    config = with_data(dataclasses.replace(config, data=data), log)
    params = jax.jit(functools.partial(init_params, build_model(config.model)))(jax.random.key(options.seed))
    create_run(folder, config, log)
    with Checkpointer(folder / CHECKPOINTS) as checkpointer:
        checkpointer.save_best(1, params, {"epoch": 1, "valid": {}})
    return [str(user) for user in log.user_ids]


@contextlib.contextmanager
def serving(run: pathlib.Path, cores: set[int]) -> Iterator[tuple[int, float]]:
    """Yields the port of a service on some processors, once it is ready, and the seconds that took."""
    began, errors = time.monotonic(), run.with_name("errors.txt")
    command = [
        sys.executable,
        "-m",
        "experiments.serve",
        f"--run={run}",
        f"--state={run.with_name('state')}",
        "--port=0",
    ]
    before = os.sched_getaffinity(0)
    with errors.open("wb") as stream:
        os.sched_setaffinity(0, cores)
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stream)
        finally:
            os.sched_setaffinity(0, before)
    try:
        port = None
        while port is None or asyncio.run(_ask_once(port, "GET", "/ready")) != 200:
            said = errors.read_text(errors="replace")
            require(process.poll() is None, f"experiments.serve ended: {said[-200:].strip()}")
            require(time.monotonic() < began + _MOST_SECONDS, "experiments.serve is not ready after a long time")
            found = re.search(r"listening at http://127\.0\.0\.1:(\d+);", said)
            port = int(found[1]) if found else None
            time.sleep(0.1)
        yield port, time.monotonic() - began
        process.terminate()
        code = process.wait(_MOST_SECONDS)
        require(code == 0, f"experiments.serve ended with {code}: {errors.read_text(errors='replace')[-200:]}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Connection:
    """One connection that is kept open; a request at a time."""

    def __init__(self, port: int) -> None:
        self._port, self._reader, self._writer = port, None, None

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Returns the status and the content of an answer."""
        if (
            self._writer is None or self._reader is None or self._reader.at_eof()
        ):  # Idle ones are closed by the service.
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        content = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {path} HTTP/1.1",
            "host: s",
            "content-type: application/json",
            f"content-length: {len(content)}",
        ]
        self._writer.write("\r\n".join([*head, "", ""]).encode() + content)
        headers = await self._reader.readuntil(b"\r\n\r\n")
        [length] = re.findall(rb"content-length: (\d+)", headers.lower())
        return int(headers.split(b" ", 2)[1]), await self._reader.readexactly(int(length))

    def close(self) -> None:
        """Lets the connection go."""
        if self._writer is not None:
            self._writer.close()


async def _ask_once(port: int, method: str, path: str) -> int:
    connection = Connection(port)
    try:
        return (await connection.ask(method, path))[0]
    finally:
        connection.close()


def _question(users: list[str]) -> dict[str, Any]:
    return {"users": users, "k": 10, "exclude_seen": True}


async def _ask(connection: Connection, path: str, body: Any) -> None:
    status, content = await connection.ask("POST", path, body)
    require(status == 200, f"{path} was answered {status}: {content[:200]!r}")


async def at_rate(port: int, users: list[str], options: argparse.Namespace, seed: int, *, mixed: bool) -> np.ndarray:
    """Returns seconds from the moment a request was due to its answer, of one round."""
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / options.rate, int(options.rate * options.seconds)))
    chosen = rng.choice(users, len(due))
    # The one used last comes first: few are opened, and as few clients keep theirs open.
    free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
    connections = [Connection(port) for _ in range(_CONNECTIONS)]
    for connection in connections:
        free.put_nowait(connection)
    began, seconds = time.perf_counter(), np.zeros(len(due))

    async def one(place: int) -> None:
        await asyncio.sleep(max(0.0, began + due[place] - time.perf_counter() - _EARLY))
        while time.perf_counter() < began + due[place]:  # Timers are late by up to a millisecond and more.
            await asyncio.sleep(0)
        connection = await free.get()
        user = str(chosen[place])
        if mixed and place % 5 == 0:
            event = {"user": user, "item": "1", "timestamp": 2_000_000_000}
            await _ask(connection, "/v1/events", {"events": [event]})
        await _ask(connection, "/v1/recommend", _question([user]))
        seconds[place] = time.perf_counter() - began - due[place]
        free.put_nowait(connection)

    try:
        await asyncio.gather(*(one(place) for place in range(len(due))))
    finally:
        for connection in connections:
            connection.close()
    return seconds


async def one_by_one(port: int, bodies: list[Any]) -> list[float]:
    """Returns the seconds of requests, each sent when the one before is answered."""
    connection, seconds = Connection(port), []
    await connection.ask("GET", "/ready")
    for body in bodies:
        began = time.perf_counter()
        await _ask(connection, "/v1/recommend", body)
        seconds.append(time.perf_counter() - began)
    connection.close()
    return seconds


async def _metrics(port: int) -> dict[str, float]:
    """Returns what the service counts itself, by name."""
    connection = Connection(port)
    _, text = await connection.ask("GET", "/metrics")
    connection.close()
    lines = re.findall(r"^(tim4rec_\S+) (\S+)$", text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def _mean_ms(before: dict[str, float], after: dict[str, float], name: str) -> float:
    """The mean of a histogram between two readings."""
    family, brace, labels = name.partition("{")
    totals = [
        after[part] - before.get(part, 0) for part in (f"{family}_{end}{brace}{labels}" for end in ("sum", "count"))
    ]
    return round(1e3 * totals[0] / totals[1], 3)


def _summary(seconds: np.ndarray) -> dict[str, Any]:
    about = {f"p{q}_ms": round(1e3 * float(np.percentile(seconds, q)), 3) for q in (50, 90, 99)}
    return {"requests": len(seconds), **about, "most_ms": round(1e3 * float(seconds.max()), 3)}


def measure(port: int, users: list[str], options: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Measures a service that is ready."""
    rng = np.random.default_rng(options.seed)
    first = asyncio.run(one_by_one(port, [_question([str(user)]) for user in rng.choice(users, 10)]))
    results: dict[str, Any] = {"first_ms": [round(1e3 * s, 3) for s in first]}
    for name in ("rate", "mixed"):
        before = asyncio.run(_metrics(port))
        rounds = [asyncio.run(at_rate(port, users, options, seed, mixed=name == "mixed")) for seed in range(repeats)]
        after = asyncio.run(_metrics(port))
        inside = {key: _mean_ms(before, after, counted) for key, counted in _INSIDE.items()}
        results[name] = _summary(np.concatenate(rounds)) | inside | {"rounds": [_summary(one) for one in rounds]}
    most = min(_BATCH, len(users))
    bodies = [_question([str(user) for user in rng.choice(users, most)]) for _ in range(_BATCHES)]
    seconds = asyncio.run(one_by_one(port, bodies))
    results["batches"] = {"users": most, "users_per_second": [round(most / s) for s in seconds]}
    return results | {"compiled_by_requests": int(asyncio.run(_metrics(port))["tim4rec_compilations_after_ready"])}


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Makes a run, serves it and measures; returns the record and its table."""
    chosen = _parse(rest)
    cores, load = sorted(os.sched_getaffinity(0)), [round(os.getloadavg()[0], 2)]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "run"
        users = make_run(folder, chosen)
        # Requests come from the other processors, where there are any.
        os.sched_setaffinity(0, set(cores[1:]) or set(cores))
        try:
            with serving(folder, {cores[0]}) as (port, ready):
                results = measure(port, users, chosen, options.repeats)
        finally:
            os.sched_setaffinity(0, cores)
    load.append(round(os.getloadavg()[0], 2))
    table = Table(title=f"a service on one processor, {chosen.items:,} items")
    for column in ("requests", "p50 ms", "p90 ms", "p99 ms", "most ms"):
        table.add_column(column, justify="right")
    for name in ("rate", "mixed"):
        found = results[name]
        cells = (f"{found[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms", "most_ms"))
        table.add_row(f"{chosen.rate:g}/s {name}, {found['requests']:,}", *cells)
    speed = results["batches"]
    table.caption = (
        f"ready after {ready:.0f} s; "
        f"first answer {results['first_ms'][0]:.1f} ms, tenth {results['first_ms'][9]:.1f} ms; "
        f"{np.median(speed['users_per_second']):,.0f} users per second in requests of {speed['users']}; "
        f"{results['compiled_by_requests']} programs compiled by requests"
    )
    record = {"environment": environment(), "settings": vars(chosen) | {"repeats": options.repeats}}
    # Other work's share of the machine is to be seen there: the service and its client alone make under 1.
    record |= {
        "server_processors": 1,
        "load_average_before_and_after": load,
        "scheduling": "real-time" if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR) else f"nice {os.nice(0)}",
        "seconds_to_ready": round(ready, 1),
        "results": results,
    }
    return record | {"failed": results["compiled_by_requests"] > 0}, table
