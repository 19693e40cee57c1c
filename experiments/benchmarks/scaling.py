"""A plan on paper: throughput, cost and limits on 1 to 512 GPUs and for catalogues of 10^4 to 10^9 items.

Every time, rate and cost is a prediction: counted bytes, operations and exchanges over the rates of `Gpu`. What one GPU
does is assumed, or with --measured read from records of one; what GPUs exchange, their memory and price are assumed.
Counted are the encoder's bytes and operations a position (by the compiler, from the program of its gradient on this
machine, which is also timed), and by hand the loss, Adam and what devices exchange. Nothing overlaps. Without records
no kernel launch is counted, so that short steps are longer than predicted.

  step = fixed + encoder + loss + optimiser + exchange,      each max(bytes / bandwidth, operations / rate)

With records the encoder takes so many seconds a position, and fixed is what a step takes besides; see
`scaling_measured`.

With b positions a GPU of which t have a target, N GPUs, catalogue v, width d, and P parameters beside the table:

  whole     the table and Adam's moments lie on every GPU; all scores are computed (softmax_cross_entropy's kernels make
            them three times and two products more: 10 t v d operations); one all-reduce of the gradients
  sharded   the table and its moments are cut into N_s shards, the GPUs of a node or as many nodes' as hold it; every
            GPU scores the targets of its N_s against its own shard: as many operations; ids and hidden states are
            gathered and embeddings scattered among the N_s, and every shard is summed over its N / N_s copies
  sampled   sharded, with k shared negatives and lazy Adam: only the rows touched are scored, exchanged and updated

It writes Markdown with --markdown=scaling.md.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmarks.catalogue import sizes
from experiments.benchmarks.scaling_measured import loss_operations, read_measured
from experiments.configs import load_config
from tim4rec_jax.config import ModelConfig
from tim4rec_jax.files import write_atomically
from tim4rec_jax.models import build_model, init_params
from tim4rec_jax.run_dir import environment

Way = Literal["whole", "sharded", "sampled"]
WAYS: tuple[Way, ...] = ("whole", "sharded", "sampled")
FLOAT = 4
# Parameter, gradient and two moments.
_COPIES = 4
# Of a step, in order.
PARTS = ("fixed", "encoder", "loss", "optimiser", "exchange")
# Adam reads the four and writes three.
_ADAM_PASSES = 7


@dataclass(frozen=True)
class Gpu:
    """Rates of one H100 SXM and its node; assumed by data sheets, times the share that well-made programs reach.

    Attributes:
      memory: bytes that a program may use.
      bandwidth: bytes a second of device memory.
      rate: operations a second of TF32 products.
      loss_rate: those of the loss.
      fixed: seconds of a step, whatever its size.
      inside: bytes a second that a GPU sends to others of its node.
      between: bytes a second that it sends to other nodes.
      node: GPUs of a node.
      latency: seconds of one exchange a doubling of the devices that take part.
      dollars: an hour of one GPU.
    """

    memory: float = 72e9
    bandwidth: float = 0.9 * 3.35e12
    rate: float = 0.5 * 495e12
    loss_rate: float = rate
    fixed: float = 0.0
    inside: float = 0.7 * 450e9
    between: float = 0.7 * 50e9
    node: int = 8
    latency: float = 1e-5
    dollars: float = 3.0


@dataclass(frozen=True)
class Workload:
    """What one GPU does in a step, whatever the number of GPUs.

    Attributes:
      positions: b, of packed rows.
      targets: t, of the positions that are trained on.
      width: d.
      parameters: P, beside the item table.
      position_bytes, position_operations: of the encoder, forward and backward.
      negatives: k.
      kept_bytes: a position's activations that the backward pass needs.
      position_seconds: measured of the encoder; None counts bytes and operations.
    """

    positions: int
    targets: int
    width: int
    parameters: int
    position_bytes: float
    position_operations: float
    negatives: int = 8192
    kept_bytes: float = 0.0
    position_seconds: float | None = None


@dataclass(frozen=True)
class Step:
    """Predicted seconds of one step, bytes held by each GPU, and the parts that the table is cut into."""

    fixed: float
    encoder: float
    loss: float
    optimiser: float
    exchange: float
    memory: float
    shards: int

    @property
    def seconds(self) -> float:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def slowest(self) -> str:
        return max(PARTS, key=lambda name: getattr(self, name))


def all_reduce_seconds(gpu: Gpu, devices: int, size: float) -> float:
    """Seconds of summing `size` bytes over `devices`: a ring inside a node, of nodes between, and their latencies.

    2 (m - 1) / m size / inside  +  2 (M - 1) / M size / (m between),   m GPUs in each of M nodes
    """
    if devices == 1:
        return 0.0
    inside, nodes = min(devices, gpu.node), math.ceil(devices / gpu.node)
    seconds = 2 * (inside - 1) / inside * size / gpu.inside
    # Every GPU of a node carries its share of the sum to the others.
    seconds += 2 * (nodes - 1) / nodes * size / inside / gpu.between
    return seconds + gpu.latency * math.log2(devices)


def encoder_seconds(gpu: Gpu, load: Workload) -> float:
    """Returns seconds of the encoder in a step, forward and backward."""
    if load.position_seconds is not None:
        return load.positions * load.position_seconds
    return max(load.position_bytes / gpu.bandwidth, load.position_operations / gpu.rate) * load.positions


def predict(gpu: Gpu, load: Workload, devices: int, items: int, way: Way) -> Step:
    """Predicts one step.

    Args:
      gpu: rates.
      load: of each GPU.
      devices: N.
      items: v.
      way: "whole", "sharded" or "sampled", see the module.
    """
    b, t, d = load.positions, load.targets, load.width
    encoder = encoder_seconds(gpu, load)
    shards = 1 if way == "whole" else min(devices, gpu.node)
    while shards > 1 and shards < devices and _held(load, items, way, shards) > gpu.memory:
        shards *= 2
    # Rows that a step touches: of every GPU its positions' items, and the negatives.
    touched = min(items, devices * b + load.negatives)
    scored = min(items, load.negatives) if way == "sampled" else items
    updated = touched if way == "sampled" else items
    # All scores are made three times; sampled ones are kept. Two products more give the gradients.
    operations = loss_operations(t, scored, d, 3 if way == "sampled" else 5)
    loss = max(operations / gpu.loss_rate, FLOAT * d * (t + scored / shards) * 5 / gpu.bandwidth)
    optimiser = _ADAM_PASSES * FLOAT * (d * updated / shards + load.parameters) / gpu.bandwidth
    exchange = all_reduce_seconds(gpu, devices, FLOAT * load.parameters)
    if way == "whole":
        exchange = all_reduce_seconds(gpu, devices, FLOAT * (load.parameters + d * items))
    elif shards > 1:
        # Embeddings and their gradients, hidden states and theirs: to and from each of the other shards.
        inside = min(shards, gpu.node)
        sent = 2 * FLOAT * d * (b + t)
        exchange += sent * ((inside - 1) / gpu.inside + (shards - inside) / gpu.between)
        exchange += 4 * gpu.latency * math.log2(shards)
        copies = devices // shards
        if copies > 1:
            share = FLOAT * d * updated / shards
            exchange += 2 * (copies - 1) / copies * share / gpu.between + gpu.latency * math.log2(copies)
    return Step(gpu.fixed, encoder, loss, optimiser, exchange, _held(load, items, way, shards), shards)


def _held(load: Workload, items: int, way: Way, shards: int) -> float:
    """Bytes on each GPU: its part of the table with gradient and moments, the other parameters, activations."""
    copies = _COPIES - (way == "sampled")
    held = copies * FLOAT * load.width * items / shards + _COPIES * FLOAT * load.parameters
    return held + load.positions * load.kept_bytes + FLOAT * load.width * (load.positions + load.targets) * shards


def limits(gpu: Gpu, load: Workload) -> dict[str, float]:
    """Catalogue sizes, and numbers of GPUs, at which a resource runs out or begins to rule.

    Returns:
      "memory whole" and "memory sharded": v at which the table, its gradient and Adam's moments fill a GPU, or a node;
      "memory sampled": likewise without a gradient; "loss": v from which all scores take longer than the encoder;
      "optimiser": v from which Adam over the whole table does; "exchange 8" and "exchange 512": v from which summing
      the whole table's gradient over so many GPUs does (0: its latency alone does); "fixed": positions of a GPU's step
      up to which what a step takes whatever its size is longer than the encoder; "positions 512": positions of a global
      batch on 512 GPUs.
    """
    d, row = load.width, FLOAT * load.width
    free = gpu.memory - load.positions * load.kept_bytes - _COPIES * FLOAT * load.parameters
    exchanged = row * (load.positions + load.targets)
    encoder = encoder_seconds(gpu, load)
    found = {
        "memory whole": (free - exchanged) / (_COPIES * row),
        "memory sharded": gpu.node * (free - gpu.node * exchanged) / (_COPIES * row),
        "memory sampled": gpu.node * (free - gpu.node * exchanged) / ((_COPIES - 1) * row),
        "loss": encoder * gpu.loss_rate / loss_operations(load.targets, 1, d),
        "optimiser": encoder * gpu.bandwidth / (_ADAM_PASSES * row) - load.parameters / d,
    }
    for devices in (8, 512):
        a_byte = all_reduce_seconds(gpu, devices, 1e9) - all_reduce_seconds(gpu, devices, 0.0)
        fixed = all_reduce_seconds(gpu, devices, FLOAT * load.parameters)
        found[f"exchange {devices}"] = max(encoder - fixed, 0.0) * 1e9 / (a_byte * row)
    return found | {"fixed": gpu.fixed * load.positions / encoder, "positions 512": 512.0 * load.positions}


def count_encoder(config: ModelConfig, rows: int, repeats: int) -> dict[str, Any]:
    """Compiles the gradient of the encoder alone, asks the compiler what it costs a position, and times it here.

    Args:
      config: of a causal model.
      rows: rows of max_len positions.
      repeats: timed runs, of which the median counts.
    """
    model = build_model(config)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    shape, rng = (rows, config.max_len), np.random.default_rng(0)
    items = jnp.asarray(rng.integers(1, config.vocab_size, shape), jnp.int32)
    times = jnp.asarray(np.cumsum(rng.integers(0, 1000, shape), axis=1), jnp.int32)
    starts = jnp.zeros(shape, bool).at[:, 0].set(True)
    cotangent = jnp.asarray(rng.normal(size=(*shape, config.d_model)), jnp.float32)

    def gradient(params: Any, items: Any, times: Any, starts: Any, cotangent: Any) -> Any:
        lengths = jnp.full(rows, config.max_len, jnp.int32)

        def encode(params: Any) -> Any:
            return model.apply(
                {"params": params}, items, lengths, times, deterministic=False, starts=starts,
                rngs={"dropout": jax.random.key(0)}, method="encode",
            )  # fmt: skip

        return jax.vjp(encode, params)[1](cotangent)

    compiled = jax.jit(gradient).lower(params, items, times, starts, cotangent).compile()
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(compiled(params, items, times, starts, cotangent))
        seconds.append(time.perf_counter() - started)
    cost, positions = compiled.cost_analysis(), rows * config.max_len
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "positions": positions,
        "bytes a position": cost["bytes accessed"] / positions,
        "operations a position": cost["flops"] / positions,
        "temporary bytes a position": compiled.memory_analysis().temp_size_in_bytes / positions,
        "parameters beside the table": size - config.vocab_size * config.d_model,
        # The first run is not counted.
        "measured seconds a position": statistics.median(seconds[1:]) / positions,
        "measured on": jax.devices()[0].device_kind,
    }


def _row(step: Step, gpu: Gpu, load: Workload, devices: int) -> dict[str, Any]:
    a_second = devices * load.positions / step.seconds
    return {
        **dataclasses.asdict(step),
        "seconds": step.seconds,
        "slowest": step.slowest,
        "fits": step.memory <= gpu.memory,
        "positions a second": a_second,
        "dollars for 1e9 positions": 1e9 / a_second * devices * gpu.dollars / 3600,
    }


def tables(gpu: Gpu, load: Workload, devices: list[int], items: list[int]) -> list[dict[str, Any]]:
    """Returns a row for each number of GPUs, catalogue and way."""
    return [
        {"devices": n, "items": v, "way": way} | _row(predict(gpu, load, n, v, way), gpu, load, n)
        for v in items
        for n in devices
        for way in WAYS
    ]


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Counts, predicts, and writes the Markdown if asked to.

    Raises:
      ValueError: for numbers under 1, or a model that is not causal.
    """
    from experiments.benchmarks.scaling_report import console_table, markdown

    parser = argparse.ArgumentParser(prog="experiments.benchmark scaling", allow_abbrev=False)
    parser.add_argument("--config", default="ml1m_tim4rec_causal", help="whose model and width, a causal one")
    parser.add_argument("--rows", type=int, default=64, help="rows of max_len positions on each GPU")
    parser.add_argument("--negatives", type=int, default=8192, help="shared negatives of a step")
    parser.add_argument("--target_share", type=float, default=0.75, help="share of the positions with a target")
    parser.add_argument("--devices", type=sizes, default="1,8,64,512", help="numbers of GPUs")
    parser.add_argument("--items", type=sizes, default="1e4,1e5,1e6,1e7,1e8,1e9", help="catalogues")
    parser.add_argument(
        "--measured", type=pathlib.Path, nargs=3, metavar=("OPS", "TRAIN_STEP", "RUN"),
        help="records of one GPU: benchmark gpu --parts=ops, --parts=train_step, and a training on all positions",
    )  # fmt: skip
    parser.add_argument("--markdown", type=pathlib.Path, help="file for the plan in words and tables")
    given = parser.parse_args(rest)
    if min([given.rows, given.negatives, *given.devices, *given.items]) < 1 or not 0 < given.target_share <= 1:
        raise ValueError("--rows, --negatives, --devices and --items must be at least 1, --target_share in (0, 1]")
    config = dataclasses.replace(load_config(given.config).model, vocab_size=1000)
    if not build_model(config).causal:
        raise ValueError(f"--config={given.config} is not causal; choose one of *_tim4rec_causal")
    counted = count_encoder(config, min(given.rows, 8), options.repeats)
    positions = given.rows * config.max_len
    load = Workload(
        positions, int(positions * given.target_share), config.d_model, int(counted["parameters beside the table"]),
        counted["bytes a position"], counted["operations a position"], given.negatives,
        counted["temporary bytes a position"],
    )  # fmt: skip
    gpu, measured = Gpu(), None
    if given.measured:
        measured = read_measured(*given.measured, config, given.target_share)
        gpu = dataclasses.replace(
            gpu, bandwidth=measured.bandwidth, loss_rate=measured.loss_rate, fixed=measured.step_seconds
        )
        load = dataclasses.replace(load, position_seconds=measured.position_seconds)
    record = {
        "prediction": True,
        "note": "Counts over rates; those of one GPU are measured where `measured` says so, all others are assumed.",
        "measured": measured and dataclasses.asdict(measured) | {"records": [path.name for path in given.measured]},
        "environment": environment(),
        "config": given.config,
        "assumed": dataclasses.asdict(gpu),
        "counted": counted,
        "workload": dataclasses.asdict(load),
        "limits": limits(gpu, load),
        "rows": tables(gpu, load, given.devices, given.items),
    }
    if given.markdown:
        write_atomically(given.markdown, markdown(record).encode())
    return record, console_table(record)
