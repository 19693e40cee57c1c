"""Memory a device of a training step, with the item embedding whole on each device and in parts.

The step of an experiment's model over all devices is compiled from shapes alone, and XLA says what it needs: its
arguments (parameters, Adam's moments, the batch), what it returns beside them, and temporary arrays. Catalogues up to
--run_up_to are trained for a few steps too, from the same initial values on the same random batches, so losses can be
compared; --run_shards leaves layouts out of that, for 8 whole copies take their time on one processor. Devices are fake
ones of this processor: bytes are those of XLA's program for it, and seconds tell nothing of real devices.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments.configs import load_config
from tim4rec_jax.config import ExperimentConfig, ModelConfig, ParallelConfig
from tim4rec_jax.data.length_groups import plan_packed_rows
from tim4rec_jax.data.negatives import Negatives, Proposal, draw_negatives
from tim4rec_jax.data.packed_loader import PackedBatch
from tim4rec_jax.models import build_model
from tim4rec_jax.models.catalogue_shards import shardings
from tim4rec_jax.run_dir import environment
from tim4rec_jax.training.catalogue_parallel import choose_optimizer, choose_step
from tim4rec_jax.training.parallel import make_layout
from tim4rec_jax.training.step import TrainState, init_state

_DEVICE_COUNT = "--xla_force_host_platform_device_count"
_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
_TINY = {"d_model": 16, "d_state": 8, "head_dim": 16, "num_layers": 1}


class _GivenBatches:
    """A loader whose payload is the batch; negatives are drawn uniformly."""

    resident = ()

    def __init__(self, vocab_size: int, num_negatives: int | None) -> None:
        self._proposal, self._num_negatives = Proposal(None, vocab_size), num_negatives

    def batch(self, resident: Any, payload: PackedBatch) -> PackedBatch:
        return payload

    def negatives(self, resident: Any, key: jax.Array) -> Negatives:
        return draw_negatives(self._proposal, key, self._num_negatives)


def model_settings(options: argparse.Namespace, items: int, length: int, **changes: Any) -> ModelConfig:
    """Returns the settings of the experiment's model for a catalogue and rows of `length`."""
    # The times of a log of a few years, which no log gives here; they decide no shape.
    times = {"gap_mean": 8.0, "gap_std": 3.0, "first_second": 0, "last_second": 10**8}
    changes |= times | (_TINY if options.tiny else {})
    return dataclasses.replace(load_config(options.config).model, vocab_size=items + 1, max_len=length, **changes)


def settings_of(options: argparse.Namespace, items: int, shards: int, rows: int, length: int) -> ExperimentConfig:
    """Returns the experiment's settings for a catalogue in `shards` parts and batches of `rows` by `length`."""
    base = load_config(options.config)
    model = model_settings(options, items, length, vocab_multiple=math.lcm(64, shards))
    train = dataclasses.replace(base.train, batch_size=rows)
    return dataclasses.replace(base, model=model, train=train, parallel=ParallelConfig("sharded", shards))


class Step:
    """The step of one layout; nothing of the size of the catalogue is allocated before `run`."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config, self.layout = config, make_layout(config.parallel)
        model = build_model(config.model)
        self.optimizer = choose_optimizer(config, 1000)
        self.make_state = functools.partial(init_state, model, self.optimizer, config.train.seed)
        groups = plan_packed_rows(
            config.model.max_len, batch_size=self.layout.rows_per_device(config.train.batch_size),
            microbatch_tokens=config.train.microbatch_tokens, platform=jax.default_backend(),
        )  # fmt: skip
        loader = _GivenBatches(config.model.vocab_size, config.train.num_negatives)
        self.step = functools.partial(choose_step(config), model, self.optimizer, config, groups, loader)

    def batch(self, seed: int) -> PackedBatch:
        """Returns random packed rows, whose number fills all devices, on the devices."""
        devices, length = self.layout.num_devices, self.config.model.max_len
        shape = self.layout.rows_per_device(self.config.train.batch_size) * devices, length
        rng = np.random.default_rng(seed)
        items, targets = (rng.integers(1, self.config.model.vocab_size, shape).astype(np.int32) for _ in range(2))
        starts = rng.random(shape) < 0.05
        starts[:, 0] = True
        times = np.cumsum(rng.integers(0, 86_400, shape), axis=1).astype(np.int32)
        return self.layout.split(PackedBatch(items, starts, times, targets, np.ones(shape, np.float32)))

    def compiled(self) -> Any:
        """Compiles the step from shapes and where they lie."""
        state = jax.eval_shape(self.make_state)
        if self.layout.mesh is not None:
            state = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                state, shardings(self.layout.mesh, state) if self.layout.catalogue_shards > 1 else self._whole(state),
            )  # fmt: skip
        return self.layout.wrap(self.step).lower(state, (), self.batch(0)).compile()

    def _whole(self, shapes: Any) -> Any:
        everywhere = jax.sharding.NamedSharding(self.layout.mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda _: everywhere, shapes)

    def start(self) -> TrainState:
        """Returns the initial state, where it lies."""
        return jax.block_until_ready(self.layout.create(self.make_state))

    def run(self, compiled: Any, steps: int) -> dict[str, Any]:
        """Trains from the initial values; returns losses and seconds a step."""
        began = time.perf_counter()
        state = self.start()
        found: dict[str, Any] = {"initial_seconds": time.perf_counter() - began, "losses": [], "seconds": []}
        for number in range(steps):
            batch, began = self.batch(number), time.perf_counter()
            state, loss = compiled(state, (), batch)
            found["losses"].append(float(loss))
            found["seconds"].append(time.perf_counter() - began)
        return found


def largest_array(hlo: str) -> int:
    """Returns the bytes of the largest array that a compiled program names."""
    sizes = re.findall(rf"\b({'|'.join(_BYTES)})\[([\d,]+)\]", hlo)
    return max(_BYTES[dtype] * math.prod(map(int, dims.split(","))) for dtype, dims in sizes)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, items: int, shards: int) -> dict[str, Any]:
    """Compiles the step of one layout, and runs it where it is small enough."""
    _say(f"{items:,} items in {shards} parts: compiling")
    config = settings_of(options, items, shards, options.batch_rows, options.length)
    step = Step(config)
    compiled = step.compiled()
    memory = compiled.memory_analysis()
    found = {
        "items": items,
        "shards": shards,
        "devices": step.layout.num_devices,
        "embedding_bytes": 4 * config.model.embedding_rows * config.model.d_model,
        "argument_bytes": memory.argument_size_in_bytes,
        # The new state takes the place of the old one.
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "largest_array_bytes": largest_array(compiled.as_text()),
    }
    found["bytes"] = found["argument_bytes"] + found["output_bytes"] + found["temp_bytes"]
    if items <= options.run_up_to and shards in options.run_shards:
        if (options.run_rows, options.run_length) != (options.batch_rows, options.length):
            step = Step(settings_of(options, items, shards, options.run_rows, options.run_length))
            compiled = step.compiled()
        _say(f"{items:,} items in {shards} parts: training")
        found["run"] = step.run(compiled, options.steps)
    return found


def sizes(text: str) -> list[int]:
    """Reads sizes such as 1e6,1e7 from the command line."""
    return [int(float(size)) for size in text.split(",")]


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for sizes under 1, or parts that do not divide the devices.
    """
    parser = argparse.ArgumentParser(prog="experiments.benchmark catalogue", allow_abbrev=False)
    parser.add_argument("--config", default="ml1m_tim4rec_causal", help="experiment whose model is trained")
    parser.add_argument("--items", type=sizes, default="1e6,1e7", help="sizes of the catalogue")
    parser.add_argument("--devices", type=int, default=8, help="fake devices")
    parser.add_argument("--shards", type=sizes, default="1,8", help="parts of the item embedding; 1 is whole")
    parser.add_argument("--batch_rows", type=int, default=16, help="packed rows of a batch in the compiled step")
    parser.add_argument("--length", type=int, default=200, help="positions of its rows")
    parser.add_argument("--run_up_to", type=float, default=1e6, help="largest catalogue that is trained")
    parser.add_argument("--run_shards", type=sizes, help="parts with which it is trained; all by default")
    parser.add_argument("--run_rows", type=int, default=8, help="packed rows of a batch when training")
    parser.add_argument("--run_length", type=int, default=8, help="positions of its rows")
    parser.add_argument("--steps", type=int, default=2, help="training steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark out")
    options = parser.parse_args(rest)
    options.run_shards = options.run_shards or options.shards
    for name in ("devices", "batch_rows", "length", "run_rows", "run_length", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)} must be at least 1")
    if min(options.items) < 1:
        raise ValueError(f"--items={','.join(map(str, options.items))}: expected sizes of at least 1")
    for shards in options.shards:
        if shards < 1 or options.devices % shards:
            raise ValueError(f"--shards={shards} must divide --devices={options.devices}")
    if load_config(options.config).train.positions != "all":
        raise ValueError(f"--config={options.config}: choose one with train.positions='all', as ml1m_tim4rec_causal")
    return options


def report(results: list[dict[str, Any]]) -> Table:
    """Bytes a device, a row a layout."""
    table = Table(title="A training step: MB a device (10^6 bytes)", title_justify="left")
    for column in ("items", "parts", "arguments", "outputs", "temporary", "together", "last loss", "s/step"):
        table.add_column(column, justify="right")
    for one in results:
        ran = one.get("run")
        table.add_row(
            f"{one['items']:,}", f"{one['shards']} of {one['devices']}",
            *(f"{one[name] / 1e6:,.1f}" for name in ("argument_bytes", "output_bytes", "temp_bytes", "bytes")),
            *((f"{ran['losses'][-1]:.6f}", f"{ran['seconds'][-1]:.1f}") if ran else ("not run", "")),
        )  # fmt: skip
    return table


def _in_fresh_process(options: argparse.Namespace) -> dict[str, Any]:
    """Measures in a process that has the fake devices, whose number is fixed when JAX starts.

    Raises:
      ValueError: if the process failed; it says why on standard error.
    """
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICE_COUNT)]
    flags = " ".join([*flags, f"{_DEVICE_COUNT}={options.devices}"])
    command = [sys.executable, "-m", "experiments.benchmarks.catalogue", json.dumps(vars(options))]
    given = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=given)
    if done.returncode:
        raise ValueError(f"the measurement failed with exit code {done.returncode}; its error stands above")
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    found = _in_fresh_process(chosen)
    about = found["environment"] | {"command": list(sys.orig_argv)}
    return {"environment": about, "settings": vars(chosen), "results": found["results"]}, report(found["results"])


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    about = environment()
    results = [measure(options, items, shards) for items in options.items for shards in options.shards]
    return {"environment": about, "results": results}


if __name__ == "__main__":
    print(json.dumps(_measure_all(argparse.Namespace(**json.loads(sys.argv[1])))))
