"""What tests of programs that train by forking share: a small run, how it is started, and what is compared."""

import pathlib
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np

from tests.parallel.fake_devices import ROOT, environment
from tim4rec_jax.run_dir import CHECKPOINTS, read_config, read_results
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.setup import Setup
from tim4rec_jax.training.stored_run import load_log

# 33 steps in 3 epochs, with checkpoints and validations between them.
OPTIONS = [
    "--config=quickstart_sasrec",
    "--data.synthetic.num_users=60",
    "--data.synthetic.num_items=20",
    "--model.max_len=8",
    "--model.d_model=16",
    "--model.inner_size=16",
    "--model.num_layers=1",
    "--train.batch_size=128",
    "--train.epochs=3",
    "--train.log_every=1",
    "--train.checkpoint_every=3",
    "--train.length_groups=1",
    "--train.progress=false",
    "--eval.baselines",
    "popularity",
]


def run_forking(module: str, *arguments: str, folder: pathlib.Path, devices: int = 1, before: Sequence[str] = ()):
    """Runs a module of this folder as a program; what it compiles is kept in `folder`, for every child needs it."""
    known = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    command = [*before, sys.executable, "-m", f"tests.training.{module}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(devices) | known, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-4000:]


def lines(folder: pathlib.Path) -> list[tuple]:
    """What metrics.jsonl says of training, without times."""
    kept = [line for line in read_metrics(folder) if line["kind"] in ("train", "valid", "test")]
    return [
        (line["kind"], line["step"], line.get("loss"), line.get("train_loss"), line.get("ndcg@10")) for line in kept
    ]


def require_same_runs(folders: Sequence[pathlib.Path], reference: pathlib.Path) -> None:
    """Asserts that runs ended with the bits of another, and wrote down the same on the way."""
    template = Setup(read_config(reference), load_log(reference)).init_state()

    def state(folder):
        with Checkpointer(folder / CHECKPOINTS) as checkpoints:
            return checkpoints.restore_latest(template)[:2]

    step, expected = state(reference)
    for folder in folders:
        own_step, own = state(folder)
        assert own_step == step, folder
        jax.tree.map(np.testing.assert_array_equal, own, expected)
        assert lines(folder) == lines(reference), folder
        assert read_results(folder)["test"] == read_results(reference)["test"], folder
