"""The training step with large catalogues: the item embedding in shards, and the softmax over a sample of the items.

`run` (`experiments.benchmark catalogue`) asks for the memory per device, with the item embedding whole on each device
and in shards. The step of an experiment's model over all devices is compiled from shapes alone, and XLA says what it
needs: its arguments (parameters, Adam's moments, the batch), what it returns beside them, and temporary arrays.
Catalogues up to --run_up_to are trained for a few steps too, from the same initial values on the same random batches,
so losses can be compared; --run_shards leaves layouts out of that, for 8 whole copies take their time on one processor.
Devices are fake ones of this processor: bytes are those of XLA's program for it, and seconds tell nothing of real ones.

`run_sampled` (`experiments.benchmark sampled`) takes three forms of the step through the same random batches on one
device: full softmax with Adam, sampled softmax with Adam, which still moves every row of the item table, and sampled
softmax with lazy Adam, which touches those rows alone that the step reads.
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

from experiments.benchmarks.timing import step_form, time_in_turns
from experiments.benchmarks.train_step import Step, planned_memory
from experiments.cli import OptionParser
from experiments.configs import load_config
from tim4rec_jax.config import ExperimentConfig, ParallelConfig
from tim4rec_jax.data.loader import PackedBatch
from tim4rec_jax.data.negatives import Negatives, Proposal, draw_negatives
from tim4rec_jax.data.packing import plan_packed_rows
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import build_model
from tim4rec_jax.parallel.item_table import shardings
from tim4rec_jax.parallel.mesh import make_layout
from tim4rec_jax.run_dir import environment
from tim4rec_jax.training.step import init_state, make_optimizer, train_step

_DEVICE_COUNT = "--xla_force_host_platform_device_count"
_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
FORMS = ("full", "sampled", "lazy")
_TINY = {"d_model": 16, "d_state": 8, "head_dim": 16, "num_layers": 1}


class _GivenBatches:
    """A loader that hands batches on; negatives are drawn uniformly."""

    resident = ()

    def __init__(self, vocab_size: int, num_negatives: int | None) -> None:
        self._proposal, self._num_negatives = Proposal(None, vocab_size), num_negatives

    def batch(self, _: Any, batch: PackedBatch) -> PackedBatch:
        return batch

    def negatives(self, _: Any, key: jax.Array) -> Negatives:
        return draw_negatives(self._proposal, key, self._num_negatives)


def model_settings(options: argparse.Namespace, items: int, length: int, **changes: Any) -> ModelConfig:
    """Returns the settings of the experiment's model for a catalogue and rows of `length`."""
    model = load_config(options.config).model
    changes |= {name: size for name, size in _TINY.items() if hasattr(model, name)} if options.tiny else {}
    # Neither sampled losses nor an item embedding in parts go with a score for what was seen.
    return dataclasses.replace(model, vocab_size=items + 1, max_len=length, seen_bias=False, **changes)


def settings_of(options: argparse.Namespace, items: int, shards: int, rows: int, length: int) -> ExperimentConfig:
    """Returns the experiment's settings for a catalogue in `shards` and batches of `rows` by `length`."""
    base = load_config(options.config)
    model = model_settings(options, items, length, vocab_multiple=math.lcm(64, shards))
    train = dataclasses.replace(base.train, batch_size=rows)
    return dataclasses.replace(base, model=model, train=train, parallel=ParallelConfig("sharded", shards))


class LayoutStep:
    """The step of one layout; nothing of the size of the catalogue is allocated before `start`."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Compiles the step from shapes and where they lie."""
        self.config, self.layout = config, make_layout(config.parallel)
        model, optimizer = build_model(config.model), make_optimizer(config.train, 1000)
        self._make_state = functools.partial(init_state, model, optimizer, config.train.seed)
        groups = plan_packed_rows(
            config.model.max_len,
            batch_size=self.layout.rows_per_device(config.train.batch_size),
            microbatch_tokens=config.train.microbatch_tokens,
            platform=jax.default_backend(),
        )
        loader = _GivenBatches(config.model.vocab_size, config.train.num_negatives)
        step = functools.partial(train_step, model, optimizer, config, groups, loader)
        self.step = Step(self.layout.compile_step(step), self._shapes(), self.batch(0))

    def _shapes(self) -> Any:
        """Returns the state's shapes, and on several devices how they are sharded."""
        state, mesh = jax.eval_shape(self._make_state), self.layout.mesh
        if mesh is None:
            return state
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        sharded = shardings(mesh, state) if self.layout.catalogue_shards > 1 else jax.tree.map(lambda _: whole, state)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, sharded)

    def batch(self, seed: int) -> PackedBatch:
        """Returns random packed rows, whose number fills all devices, on the devices."""
        devices, length = self.layout.num_devices, self.config.model.max_len
        shape = self.layout.rows_per_device(self.config.train.batch_size) * devices, length
        rng = np.random.default_rng(seed)
        items, targets = (rng.integers(1, self.config.model.vocab_size, shape).astype(np.int32) for _ in range(2))
        starts = rng.random(shape) < 0.05
        starts[:, 0] = True
        times = np.cumsum(rng.integers(0, 86_400, shape), axis=1).astype(np.int32)
        segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
        return self.layout.shard_batch(PackedBatch(items, segment_ids, times, targets, np.ones(shape, np.float32)))

    def start(self) -> Step:
        """Returns the step with its initial state, where it lies."""
        self.step.state = jax.block_until_ready(self.layout.init_sharded(self._make_state))
        return self.step

    def run(self, steps: int) -> dict[str, Any]:
        """Trains from the initial values; returns losses and seconds per step."""
        began = time.perf_counter()
        step = self.start()
        found: dict[str, Any] = {"initial_seconds": time.perf_counter() - began, "losses": [], "seconds": []}
        for number in range(steps):
            batch, began = self.batch(number), time.perf_counter()
            found["losses"].append(step(batch))
            found["seconds"].append(time.perf_counter() - began)
        return found


def largest_array(hlo: str) -> int:
    """Returns the bytes of the largest array that a compiled program names."""
    sizes = re.findall(rf"\b({'|'.join(_BYTES)})\[([\d,]+)\]", hlo)
    return max(_BYTES[dtype] * math.prod(map(int, dims.split(","))) for dtype, dims in sizes)


def measure(options: argparse.Namespace, items: int, shards: int) -> dict[str, Any]:
    """Compiles the step of one layout, and runs it where it is small enough."""
    print(f"{items:,} items in {shards} shards: compiling", file=sys.stderr, flush=True)
    config = settings_of(options, items, shards, options.batch_rows, options.length)
    step = LayoutStep(config)
    memory = planned_memory(step.step.compiled)
    found = {
        "items": items,
        "shards": shards,
        "devices": step.layout.num_devices,
        "embedding_bytes": 4 * config.model.embedding_rows * config.model.d_model,
        "argument_bytes": memory["argument_bytes"],
        "output_bytes": memory["result_bytes"],
        "temp_bytes": memory["temporary_bytes"],
        "largest_array_bytes": largest_array(step.step.compiled.as_text()),
        "bytes": sum(memory.values()),
    }
    if items <= options.run_up_to and shards in options.run_shards:
        if (options.run_rows, options.run_length) != (options.batch_rows, options.length):
            step = LayoutStep(settings_of(options, items, shards, options.run_rows, options.run_length))
        print(f"{items:,} items in {shards} shards: training", file=sys.stderr, flush=True)
        found["run"] = step.run(options.steps)
    return found


def sizes(text: str) -> list[int]:
    """Reads sizes such as 1e6,1e7 from the command line."""
    return [int(float(size)) for size in text.split(",")]


def _require_sizes(options: argparse.Namespace, *names: str) -> None:
    """Checks what both benchmarks ask for.

    Raises:
      ValueError: for sizes under 1, or an experiment that does not train on all positions.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)} must be at least 1")
    if min(options.items) < 1:
        raise ValueError(f"--items={','.join(map(str, options.items))}: expected sizes of at least 1")
    if load_config(options.config).train.positions != "all":
        raise ValueError(f"--config={options.config}: choose one with train.positions='all', as ml1m_tim4rec_causal")


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for sizes under 1, shards that do not divide the devices, or an experiment that does not train on all
        positions.
    """
    parser = OptionParser(prog="experiments.benchmark catalogue")
    parser.add_argument("--config", default="ml1m_tim4rec_causal", help="experiment whose model is trained")
    parser.add_argument("--items", type=sizes, default="1e6,1e7", help="sizes of the catalogue")
    parser.add_argument("--devices", type=int, default=8, help="fake devices")
    parser.add_argument("--shards", type=sizes, default="1,8", help="shards of the item embedding; 1 is whole")
    parser.add_argument("--batch_rows", type=int, default=16, help="packed rows of a batch in the compiled step")
    parser.add_argument("--length", type=int, default=200, help="positions of its rows")
    parser.add_argument("--run_up_to", type=float, default=1e6, help="largest catalogue that is trained")
    parser.add_argument("--run_shards", type=sizes, help="shards with which it is trained; all by default")
    parser.add_argument("--run_rows", type=int, default=8, help="packed rows of a batch when training")
    parser.add_argument("--run_length", type=int, default=8, help="positions of its rows")
    parser.add_argument("--steps", type=int, default=2, help="training steps")
    parser.add_flag("--tiny", "a tiny model, to try the benchmark out")
    options = parser.parse_args(rest)
    options.run_shards = options.run_shards or options.shards
    _require_sizes(options, "devices", "batch_rows", "length", "run_rows", "run_length", "steps")
    for shards in options.shards:
        if shards < 1 or options.devices % shards:
            raise ValueError(f"--shards={shards} must divide --devices={options.devices}")
    return options


def report(results: list[dict[str, Any]]) -> Table:
    """Bytes per device, a row per layout."""
    table = Table(title="A training step: MB per device (10^6 bytes)", title_justify="left")
    for column in ("items", "shards", "arguments", "outputs", "temporary", "together", "last loss", "s/step"):
        table.add_column(column, justify="right")
    for one in results:
        ran = one.get("run")
        table.add_row(
            f"{one['items']:,}",
            f"{one['shards']} of {one['devices']}",
            *(f"{one[name] / 1e6:,.1f}" for name in ("argument_bytes", "output_bytes", "temp_bytes", "bytes")),
            *((f"{ran['losses'][-1]:.6f}", f"{ran['seconds'][-1]:.1f}") if ran else ("not run", "")),
        )
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


def sampled_settings(options: argparse.Namespace, items: int, form: str) -> ExperimentConfig:
    """Returns the experiment's settings for a catalogue and a form of the step."""
    base = load_config(options.config)
    model = model_settings(options, items, options.length)
    sampled = {
        "loss": "sampled_ce",
        "num_negatives": options.negatives,
        "table_optimizer": "lazy_adam" if form == "lazy" else "adam",
    }
    changes = {} if form == "full" else sampled
    train = dataclasses.replace(base.train, batch_size=options.batch_rows, weight_decay=0.0, **changes)
    return dataclasses.replace(base, model=model, train=train, parallel=ParallelConfig("single"))


def measure_sampled(options: argparse.Namespace, items: int, repeats: int) -> list[dict[str, Any]]:
    """Times the forms of the step for one catalogue."""
    print(f"{items:,} items", file=sys.stderr, flush=True)
    names = [name for name in FORMS if name != "full" or items <= options.full_up_to]
    steps = {name: LayoutStep(sampled_settings(options, items, name)) for name in names}
    forms = {
        name: step_form(step.start(), [step.batch(number) for number in range(repeats + 1)])
        for name, step in steps.items()
    }
    readings = time_in_turns(forms, repeats=repeats)
    return [
        {
            "items": items,
            "form": name,
            "seconds": readings[name].seconds,
            "median_seconds": readings[name].median,
            "temp_bytes": planned_memory(step.step.compiled)["temporary_bytes"],
        }
        for name, step in steps.items()
    ]


def _parse_sampled(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for sizes under 1, or an experiment that does not train on all positions.
    """
    parser = OptionParser(prog="experiments.benchmark sampled")
    parser.add_argument("--config", default="ml1m_tim4rec_causal", help="experiment whose model is trained")
    parser.add_argument("--items", type=sizes, default="1e4,1e5,1e6", help="sizes of the catalogue")
    parser.add_argument("--full_up_to", type=float, default=1e6, help="largest catalogue for the full softmax")
    parser.add_argument("--negatives", type=int, default=8192, help="items drawn per step")
    parser.add_argument("--batch_rows", type=int, default=4, help="packed rows of a batch")
    parser.add_argument("--length", type=int, default=200, help="positions of its rows")
    parser.add_flag("--tiny", "a tiny model, to try the benchmark out")
    options = parser.parse_args(rest)
    _require_sizes(options, "negatives", "batch_rows", "length")
    return options


def report_sampled(results: list[dict[str, Any]]) -> Table:
    """Milliseconds per step, a row per catalogue, and how much faster the lazy form is than the full one."""
    table = Table(title="A training step: milliseconds, median", title_justify="left")
    for column in ("items", *FORMS, "full / lazy"):
        table.add_column(column, justify="right")
    for items in dict.fromkeys(one["items"] for one in results):
        times = {one["form"]: one["median_seconds"] for one in results if one["items"] == items}
        cells = [f"{1e3 * times[form]:,.0f}" if form in times else "not run" for form in FORMS]
        ratio = f"{times['full'] / times['lazy']:.1f}" if "full" in times else ""
        table.add_row(f"{items:,}", *cells, ratio)
    return table


def run_sampled(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for; returns the record and its table."""
    chosen = _parse_sampled(rest)
    about = environment() | {"command": list(sys.orig_argv)}
    results = [one for items in chosen.items for one in measure_sampled(chosen, items, options.repeats)]
    settings = vars(chosen) | {"repeats": options.repeats}
    return {"environment": about, "settings": settings, "results": results}, report_sampled(results)


if __name__ == "__main__":
    print(json.dumps(_measure_all(argparse.Namespace(**json.loads(sys.argv[1])))))
