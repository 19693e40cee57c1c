"""A small causal run with random parameters, logs of events for it, and its programs as processes of their own."""

import functools
import json
import pathlib
import random
import subprocess
import sys
from typing import IO

import jax

from experiments.train import parse
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.models import build_model, init_params
from tim4rec_jax.run_dir import CHECKPOINTS, create_run
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.setup import with_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
START = 978_300_000
_SIZES = {
    "model.max_len": 16,
    "model.d_model": 16,
    "model.num_layers": 1,
    "model.d_state": 4,
    "model.head_dim": 16,
    "model.name": "tim4rec_causal",
    "data.synthetic.num_users": 100,
    "data.synthetic.num_items": 300,
}


def small_options() -> list[str]:
    """Options of experiments.train for a tiny causal model on a synthetic log."""
    return [
        "--config=quickstart",
        "--parallel.strategy=single",
        *(f"--{name}={value}" for name, value in _SIZES.items()),
    ]


def make_run(folder: pathlib.Path, seed: int) -> list[str]:
    """Leaves a run folder as training does, with random parameters; returns the raw ids of its items."""
    config, _, _ = parse(small_options())
    log = load_log(config.data)
    config = with_data(config, log)
    params = jax.jit(functools.partial(init_params, build_model(config.model)))(jax.random.key(seed))
    create_run(folder, config, log)
    with Checkpointer(folder / CHECKPOINTS) as checkpointer:
        checkpointer.save_best(1, params, {"epoch": 1, "valid": {}})
    return list(log.item_ids)


def draw_lines(item_ids: list[str], seed: int, events: int, users: int, questions: int) -> list[bytes]:
    """Draws a log: events of users in order of time, and questions spread evenly over it, the last one at the end."""
    rng, lines, now = random.Random(seed), [], START
    for i in range(events):
        now += rng.randrange(1000)
        user = f"user {rng.randrange(users)}"
        lines.append({"user": user, "item": rng.choice(item_ids), "timestamp": now})
        if (i + 1) * questions // events > i * questions // events:
            lines.append({"user": user, "recommend": rng.randrange(1, 17), "exclude_seen": rng.random() < 0.5})
    return [json.dumps(line).encode() + b"\n" for line in lines]


def spawn(
    program: str, *options: str, environment: dict[str, str], errors: IO[bytes], piped: bool = False
) -> subprocess.Popen:
    """Starts a program of `experiments`; `piped` joins its standard input and output."""
    streams = (subprocess.PIPE, subprocess.PIPE) if piped else (subprocess.DEVNULL, subprocess.DEVNULL)
    command = [sys.executable, "-m", f"experiments.{program}", *options]
    return subprocess.Popen(
        command, stdin=streams[0], stdout=streams[1], stderr=errors, cwd=ROOT, env=environment, bufsize=0
    )
