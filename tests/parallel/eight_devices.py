"""A program that trains one model on 8 fake devices in every way and writes down what came out, as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.parallel.eight_devices out.json

It is a process of its own because the number of devices is fixed when JAX starts.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np

from tests.evaluation.logs import random_log
from tests.models.settings import SMALL_SASREC, sibling
from tim4rec_jax import DataConfig, ExperimentConfig, ModelConfig, TrainConfig, build_model
from tim4rec_jax.config import EvalConfig, ParallelConfig
from tim4rec_jax.data.loader import make_loader
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator
from tim4rec_jax.models import SSD4RecConfig
from tim4rec_jax.parallel.mesh import make_layout
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.step import init_state, make_optimizer, train_step

STEPS, HALF, SEED = 50, 25, 3
# Neither is a multiple of 8.
BATCH = {"last": 21, "all": 5, "masked": 5}
# None is one device; the others are (strategy, loader).
WAYS = {
    "last": (None, ("sharded", "device"), ("pmap", "grain")),
    "all": (None, ("sharded", "grain"), ("pmap", "device")),
    "masked": (None, ("sharded", "device"), ("pmap", "grain")),
}


@functools.cache
def log():
    return random_log(num_users=12, num_items=22, min_events=3, max_events=14, seed=5)


class Training:
    """One model with its devices and its compiled step."""

    def __init__(self, positions: str, strategy: str, loader: str, model: ModelConfig = SMALL_SASREC) -> None:
        if positions == "masked":
            model = sibling(model, "bert4rec")
        train = TrainConfig(positions=positions, batch_size=BATCH[positions], learning_rate=1e-2, clip_norm=0.5)
        self.config = ExperimentConfig(
            "test",
            model,
            DataConfig(loader=loader),
            train,
            EvalConfig(batch_size=5, top_k=(5, 10)),
            ParallelConfig(strategy),
        )
        self.layout = make_layout(self.config.parallel)
        places = self.layout.batch_indices(train.batch_size)
        self.loader = make_loader(self.config, log(), leave_one_out(log()).train, places)
        self.model, self.optimizer = build_model(model), make_optimizer(train, STEPS)
        rows = self.layout.rows_per_device(train.batch_size)
        groups = (LengthGroup(12, min(rows, 2)), LengthGroup(5, rows)) if positions == "last" else (LengthGroup(12, 1),)
        step = functools.partial(train_step, self.model, self.optimizer, self.config, groups, self.loader)
        self.resident = self.layout.replicate(self.loader.resident)
        state, payload = self.start(), self.layout.shard_batch(next(self.loader.epoch(1)))
        self.step = self.layout.compile_step(step).lower(state, self.resident, payload).compile()

    def start(self):
        return self.layout.replicate(init_state(self.model, self.optimizer, SEED))

    def go_on(self, state, first: int, last: int):
        """Returns the state after the steps `first` to `last` - 1, and their losses."""
        losses = []
        for number in range(first, last):
            epoch, batch = divmod(number, self.loader.num_batches)
            payload = self.layout.shard_batch(next(self.loader.epoch(epoch + 1, batch)))
            state, loss = self.step(state, self.resident, payload)
            losses.append(float(loss))
        return state, losses

    def ranks(self, state) -> list[int]:
        split = leave_one_out(log()).test
        evaluator = FullSortEvaluator(self.model, log(), split, self.config, mesh=self.layout.mesh)
        return evaluator(state.params).ranks.tolist()


def everything() -> dict:
    """Trains in all ways; half of the way each is saved, and one device goes on with what many saved."""
    record: dict = {"devices": jax.device_count()}
    for positions, ways in WAYS.items():
        alone = None
        for way in ways:
            training = Training(positions, *(way or ("single", "device")))
            alone = alone or training
            half, losses = training.go_on(training.start(), 0, HALF)
            with tempfile.TemporaryDirectory() as folder, Checkpointer(pathlib.Path(folder)) as checkpoints:
                checkpoints.save_latest(HALF, half, {})
                template = jax.tree.map(np.asarray, half)
                _, saved, _ = checkpoints.restore_latest(template)
            _, on_one = alone.go_on(alone.layout.replicate(saved), HALF, STEPS)
            state, rest = training.go_on(training.layout.replicate(saved), HALF, STEPS)
            found = {"losses": losses + rest, "resumed_on_one": on_one, "ranks": training.ranks(state)}
            if way and way[0] == "sharded":
                found["hlo"] = training.step.as_text()
                found["parameter_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
            record[f"{positions} {' '.join(way or ('single',))}"] = found
    return record


def with_kernels() -> list[list[float]]:
    """Losses of the interpreted kernels on one device and on all."""
    model = SSD4RecConfig(
        vocab_size=23,
        max_len=12,
        d_model=16,
        head_dim=16,
        d_state=16,
        num_layers=1,
        use_ffn=False,
        kernels="pallas_triton",
    )
    losses = []
    for strategy in ("single", "sharded"):
        training = Training("last", strategy, "device", dataclasses.replace(model))
        losses.append(training.go_on(training.start(), 0, 4)[1])
    return losses


if __name__ == "__main__":
    output, part = sys.argv[1:]
    if part == "everything":
        jax.config.update("jax_enable_x64", True)
    pathlib.Path(output).write_text(json.dumps({"everything": everything, "with_kernels": with_kernels}[part]()))
