"""Killed at 25 random moments and resumed each time, a run ends with the bits of one that was left alone."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.training.fake_devices import ROOT, environment
from tim4rec_jax.run_dir import CHECKPOINTS, read_config, read_results
from tim4rec_jax.serving.stored_run import load_log
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.loop import Trainer

KILLS = 25
OPTIONS = [
    "--config=quickstart", "--data.synthetic.num_users=60", "--data.synthetic.num_items=20", "--model.max_len=8",
    "--model.d_model=16", "--model.d_state=8", "--model.head_dim=16", "--model.num_layers=1", "--train.batch_size=64",
    "--train.epochs=3", "--train.log_every=1", "--train.checkpoint_every=2", "--train.length_groups=1",
    "--train.progress=false", "--train.tensorboard=false", "--eval.baselines", "popularity",
]  # fmt: skip


def lines(folder):
    kept = [line for line in read_metrics(folder) if line["kind"] in ("train", "valid", "test")]
    return [
        (line["kind"], line["step"], line.get("loss"), line.get("train_loss"), line.get("ndcg@10")) for line in kept
    ]


@pytest.mark.slow
def test_twenty_five_kills_change_no_bit(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.training.killed_runs", str(output), str(tmp_path), str(KILLS), *OPTIONS]
    # Small programs are worth keeping here: every attempt needs them again.
    known = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment(1) | known, capture_output=True, text=True, timeout=1500
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(output.read_text())
    assert len(found["kills"]) == KILLS
    # Before anything was written, and after different numbers of steps.
    moments = {moment for _, moment in found["kills"]}
    assert len(moments) > 5

    reference = tmp_path / "reference"
    config = read_config(reference)
    template = Trainer(config, load_log(reference), reference, resume=False).state

    def state(folder):
        with Checkpointer(folder / CHECKPOINTS) as checkpoints:
            return checkpoints.restore_latest(template)[:2]

    step, expected = state(reference)
    for number in range(found["runs"]):
        folder = tmp_path / f"run_{number}"
        own_step, own = state(folder)
        assert own_step == step
        jax.tree.map(np.testing.assert_array_equal, own, expected)
        assert lines(folder) == lines(reference)
        assert read_results(folder)["test"] == read_results(reference)["test"]
