"""Memory of a serving process over time: it must not depend on how long the process has run.

saves       a table of states is saved again and again while it gains a user each time
events      events of many users are taken in, and computed every 4,096
questions   lists of varied lengths, with and without what was seen, for users with histories of varied lengths

The resident memory of this process and the programs compiled so far are read at 20 points of each part. What a table
holds grows with users and events (`UserTable`); a program compiled per number of users would show in both columns.
Parameters are random.
"""

import argparse
import dataclasses
import functools
import gc
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.table import Table

from experiments.command_line import OptionParser
from experiments.configs import load_config
from tim4rec_jax.checks import require
from tim4rec_jax.models import build_model, init_params
from tim4rec_jax.run_dir import environment
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.user_table import Event, UserTable

READINGS = 20
ITEMS = 300
START = 978_300_000
_COMPILED = "/jax/core/compile/backend_compile_duration"


def _parse(rest: list[str]) -> argparse.Namespace:
    parser = OptionParser(prog="experiments.benchmark memory")
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(rest)
    for name in ("saves", "events", "questions"):
        require(getattr(options, name) >= READINGS, f"--{name}={getattr(options, name)} must be at least {READINGS}")
    return options


def resident_bytes() -> int:
    """Resident memory of this process."""
    gc.collect()
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def _recommender(seed: int) -> Recommender:
    config = load_config("ml1m_tim4rec_causal")
    sizes = {"vocab_size": ITEMS + 1, "max_len": 16, "d_model": 16, "num_layers": 1, "d_state": 4, "head_dim": 16}
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **sizes, gap_mean=8.0, gap_std=3.0)
    )  # fmt: skip
    model = build_model(config.model)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(seed))
    empty = pl.DataFrame({"user_id": [], "items": [], "timestamps": []})
    return Recommender(
        model, params, config, item_ids=[str(i) for i in range(1, ITEMS + 1)], titles=None, histories=empty
    )


def _saving(recommender: Recommender, rng: np.random.Generator, folder: pathlib.Path) -> Callable[[int], None]:
    table = UserTable(recommender)

    def save(i: int) -> None:
        table.add([Event(f"user {i}", str(rng.integers(1, ITEMS + 1)), START)])
        table.flush()
        table.save(folder / "users.npz")

    return save


def _streaming(recommender: Recommender, rng: np.random.Generator, _: pathlib.Path) -> Callable[[int], None]:
    table = UserTable(recommender)

    def add(i: int) -> None:
        table.add([Event(f"user {rng.integers(5000)}", str(rng.integers(1, ITEMS + 1)), START + i)])
        if table.pending >= 4096:
            table.flush()

    return add


def _asking(recommender: Recommender, rng: np.random.Generator, _: pathlib.Path) -> Callable[[int], None]:
    table = UserTable(recommender)

    def ask(i: int) -> None:
        items = rng.integers(1, ITEMS // 2, rng.integers(1, 200)).astype(np.int32)
        history = History(items, START + np.arange(len(items)))
        table.add_histories({f"user {i}": history})
        k, exclude_seen = int(rng.integers(1, 20)), bool(i % 2)
        users = [f"user {j}" for j in rng.integers(0, i + 1, rng.integers(1, 3))]
        table.top_k(users, k, exclude_seen=exclude_seen)
        recommender.top_k([history], k, exclude_seen=exclude_seen)

    return ask


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures the three parts one after the other; returns the record and its table."""
    chosen = _parse(rest)
    recommender, compiled = _recommender(chosen.seed), []

    def count(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILED:
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(count)
    parts = {"saves": _saving, "events": _streaming, "questions": _asking}
    results: dict[str, list[dict[str, int]]] = {}
    try:
        for name, make in parts.items():
            total = getattr(chosen, name)
            with tempfile.TemporaryDirectory() as folder:
                step, results[name] = make(recommender, np.random.default_rng(chosen.seed), pathlib.Path(folder)), []
                for i in range(total):
                    step(i)
                    if (i + 1) * READINGS // total > i * READINGS // total:
                        results[name].append(
                            {"done": i + 1, "resident_bytes": resident_bytes(), "programs": len(compiled)}
                        )
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    table = Table(title="resident memory over time, MB (programs compiled so far)")
    for name in ("part", "at a 20th", "at half", "at the end"):
        table.add_column(name, justify="right")
    for name, readings in results.items():
        shown = [readings[0], readings[len(readings) // 2 - 1], readings[-1]]
        table.add_row(name, *(f"{r['resident_bytes'] / 1e6:,.0f} ({r['programs']})" for r in shown))
    return {"environment": environment(), "settings": vars(chosen), "results": results}, table
