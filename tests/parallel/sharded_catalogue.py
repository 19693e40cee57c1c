"""A program that trains models whose item embedding lies in parts on 8 fake devices and writes down what came out.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.parallel.sharded_catalogue out.json

It is a process of its own because the number of devices is fixed when JAX starts.
"""

import functools
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np

from tests.evaluation.logs import random_log
from tests.models.settings import settings_of
from tim4rec_jax import DataConfig, ExperimentConfig, TrainConfig, build_model
from tim4rec_jax.config import EvalConfig, ParallelConfig
from tim4rec_jax.data.loader import make_loader
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator
from tim4rec_jax.evaluation.seen_targets import PROTOCOLS
from tim4rec_jax.models import last_hidden
from tim4rec_jax.parallel.item_table import sharded_top_k
from tim4rec_jax.parallel.mesh import make_layout
from tim4rec_jax.serving.ranking import best_columns
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.step import init_state, make_optimizer, train_step

STEPS, HALF, SEED = 20, 10, 3
# 44 items and padding; 48 rows of the embedding, of which 8 devices have 6 each.
VOCAB, MULTIPLE = 45, 16
MODELS = {
    "last": {"name": "sasrec", "attention_heads": 2, "inner_size": 8, "attention_dropout": 0.2},
    "all": {"name": "ssd4rec", "head_dim": 8, "d_state": 8},
    "masked": {"name": "bert4rec", "attention_heads": 2, "inner_size": 8, "attention_dropout": 0.2},
}
# Neither is a multiple of 8.
BATCH = {"last": 21, "all": 5, "masked": 5}
LAYOUTS = (1, 2, 8)
RANKED = ("last", "masked")


@functools.cache
def log():
    return random_log(num_users=25, num_items=VOCAB - 1, min_events=3, max_events=14, seed=5)


class Training:
    """One model with its devices and its compiled step; one shard is one device."""

    def __init__(self, positions: str, shards: int) -> None:
        train = TrainConfig(positions=positions, batch_size=BATCH[positions], learning_rate=1e-2, clip_norm=0.5)
        model = settings_of(
            **MODELS[positions],
            vocab_size=VOCAB,
            vocab_multiple=MULTIPLE,
            max_len=12,
            d_model=8,
            num_layers=1,
            dropout=0.3,
            norm_eps=1e-5,
            dtype="float64",
        )
        parallel = ParallelConfig("sharded", catalogue_shards=shards) if shards > 1 else ParallelConfig("single")
        self.config = ExperimentConfig(
            "test", model, DataConfig(loader="device"), train, EvalConfig(5, top_k=(5, 10)), parallel
        )
        self.layout = make_layout(parallel)
        places = self.layout.batch_indices(train.batch_size)
        self.loader = make_loader(self.config, log(), leave_one_out(log()).train, places)
        self.model = build_model(model)
        self.optimizer = make_optimizer(train, STEPS)
        rows = self.layout.rows_per_device(train.batch_size)
        groups = (LengthGroup(12, min(rows, 2)), LengthGroup(5, rows)) if positions == "last" else (LengthGroup(12, 1),)
        step = functools.partial(train_step, self.model, self.optimizer, self.config, groups, self.loader)
        self.resident = self.layout.replicate(self.loader.resident)
        payload = self.layout.shard_batch(next(self.loader.epoch(1)))
        self.step = self.layout.compile_step(step).lower(self.start(), self.resident, payload).compile()

    def start(self):
        return self.layout.init_sharded(lambda: init_state(self.model, self.optimizer, SEED))

    def go_on(self, state, first: int, last: int):
        """Returns the state after the steps `first` to `last` - 1, and their losses."""
        losses = []
        for number in range(first, last):
            epoch, batch = divmod(number, self.loader.num_batches)
            payload = self.layout.shard_batch(next(self.loader.epoch(epoch + 1, batch)))
            state, loss = self.step(state, self.resident, payload)
            losses.append(float(loss))
        return state, losses

    def ranks(self, params, exclude_seen: bool) -> list[int]:
        split = leave_one_out(log()).test
        result = FullSortEvaluator(self.model, log(), split, self.config, mesh=self.layout.mesh)(params)
        return result.by_protocol[PROTOCOLS[exclude_seen]].ranks.tolist()

    def best(self, params) -> list:
        """Scores and ids of the best items after 5 histories, all items of a history left out."""
        rng = np.random.default_rng(0)
        lengths = np.array([12, 3, 1, 7, 5], np.int32)
        items = rng.integers(1, VOCAB, (5, 12)).astype(np.int32) * (np.arange(12) < lengths[:, None])
        timestamps = np.zeros(items.shape, np.int32)
        if self.layout.mesh is not None:
            options = self.model, params, self.layout.mesh, items, lengths, timestamps, items
            return [a.tolist() for a in sharded_top_k(*options, 9, tile=4)]
        variables, inputs = {"params": params}, (items, lengths, timestamps)
        hidden = last_hidden(self.model, variables, *inputs)
        return [a.tolist() for a in best_columns(self.model.apply(variables, hidden, method="score"), items, 9)]


def saved_and_read(state):
    """Returns a state as a checkpoint gives it back, whole on the host."""
    with tempfile.TemporaryDirectory() as folder, Checkpointer(pathlib.Path(folder)) as checkpoints:
        checkpoints.save_latest(HALF, state, {})
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), state)
        return checkpoints.restore_latest(template)[1]


def largest_part(state) -> int:
    """Bytes of a state that lie on the device that has most of them."""
    held: dict = {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return max(held.values())


def trainings(positions: str) -> dict:
    """Trains on every layout; half of the way each is saved, and another goes on with it."""
    found: dict = {}
    measured = None
    trained = {shards: Training(positions, shards) for shards in LAYOUTS}
    start = jax.device_get(trained[1].start().params)
    for number, (shards, training) in enumerate(trained.items()):
        initial = training.start()
        distance = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, jax.device_get(initial.params))
        record = {"initial": max(jax.tree.leaves(distance)), "bytes": largest_part(initial)}
        half, losses = training.go_on(initial, 0, HALF)
        saved = saved_and_read(half)
        other = trained[LAYOUTS[(number + 1) % len(LAYOUTS)]]
        _, record["elsewhere"] = other.go_on(other.layout.shard(saved), HALF, STEPS)
        state, rest = training.go_on(training.layout.shard(saved), HALF, STEPS)
        memory = training.step.memory_analysis()
        record |= {"losses": losses + rest, "hlo": training.step.as_text(), "arguments": memory.argument_size_in_bytes}
        # The same parameters everywhere, or ranks could differ by rounding.
        measured = measured or jax.device_get(state.params)
        params = training.layout.shard(measured)
        if positions in RANKED:
            record["ranks"] = [training.ranks(params, exclude) for exclude in (False, True)]
            record["best"] = training.best(params)
        record["table_bytes"] = state.params["item_embedding"]["embedding"].nbytes
        found[str(shards)] = record
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    record = {"devices": jax.device_count()} | {positions: trainings(positions) for positions in MODELS}
    pathlib.Path(sys.argv[1]).write_text(json.dumps(record))
