"""Measures speed as ratios within one run; machines are shared and noisy, so absolute times are for orientation.

    python -m experiments.benchmark train_step --config=beauty_tim4rec --data.path=... --output=step.json
    python -m experiments.benchmark ops --output=ops.json --figure=ops.png
    python -m experiments.benchmark models --output=models.json --figure=models.png
    python -m experiments.benchmark serving --output=serving.json --figure=serving.png
    python -m experiments.benchmark logs --rows=1e6,5e6,2e7 --output=logs.json
    python -m experiments.benchmark memory --output=memory.json
    python -m experiments.benchmark stream_kills --output=kills.json
    python -m experiments.benchmark nearest_items --items=1e5,1e6 --output=nearest_items.json
    python -m experiments.benchmark daily --config=ml100k_tim4rec_causal --days=5 --output=daily.json
    python -m experiments.benchmark service --output=service.json
    python -m experiments.benchmark gpu --plan=ten-minutes --output=gpu.json
    python -m experiments.benchmark catalogue --items=1e6,1e7 --shards=1,8 --output=catalogue.json
    python -m experiments.benchmark sampled --items=1e4,1e5,1e6 --output=sampled.json

`train_step` takes the same real batches through our training step in three forms and through a plain PyTorch model;
of a config that trains at every position, on one device, on all devices, and in PyTorch.
`ops` compares the plain-JAX operators with other forms of them, forward and backward. Both need PyTorch.
`models` runs training steps and evaluation of all models at the paper's shapes, in turns, with their memory.
`serving` goes on from a causal model's state, one event at a time, against reading histories again.
`logs` makes Parquet logs of several sizes and measures memory and speed from the file to training batches.
`memory` reads resident memory and compiled programs over many saves, questions, streamed events and training epochs.
`stream_kills` kills experiments.stream again and again and compares what it leaves with an unkilled run.
`nearest_items` measures an index of the items: what it misses, and its time against ranking all of them.
`daily` cuts a log into days and trains each day's model from initial values and from yesterday's parameters.
`service` measures the latency of experiments.serve on one processor at a rate of requests, and its users per second.
`gpu` checks the GPU kernels and times everything that a GPU runs; the same --output goes on where a call ended, and a
wrong result makes the exit code 1 (see experiments/benchmarks/gpu.py). `catalogue` asks XLA for the
memory of a training step with the item embedding whole and in shards, on fake devices. `sampled` takes training steps
with the softmax over all items and over a sample, in turns.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.benchmarks import (
    catalogue,
    daily,
    data,
    gpu,
    memory,
    models,
    nearest_items,
    operator_speed,
    service,
    serving,
    stream_kills,
    train_step,
)
from experiments.cli import OptionParser, command_without_folders, run_program
from tim4rec_jax.files import write_atomically

BENCHMARKS = {
    "train_step": train_step.run,
    "ops": operator_speed.run,
    "models": models.run,
    "serving": serving.run,
    "logs": data.run,
    "memory": memory.run,
    "stream_kills": stream_kills.run,
    "daily": daily.run,
    "nearest_items": nearest_items.run,
    "service": service.run,
    "gpu": gpu.run,
    "catalogue": catalogue.run,
    "sampled": catalogue.run_sampled,
}


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    finder = OptionParser(prog="experiments.benchmark")
    finder.add_argument("what", choices=sorted(BENCHMARKS))
    finder.add_argument("--repeats", type=int, default=5, help="how often each form is timed")
    finder.add_argument("--output", type=pathlib.Path, help="JSON file for the result")
    options, rest = finder.parse_known_args(argv)
    if options.repeats < 1:
        raise ValueError(f"--repeats={options.repeats} must be at least 1")
    result, table = BENCHMARKS[options.what](options, rest)
    Console().print(table)
    if options.output:
        record = {"benchmark": options.what, **result}
        about = record["environment"]
        record["environment"] = about | {"command": command_without_folders(about["command"])}
        write_atomically(options.output, (json.dumps(record, indent=2) + "\n").encode())
    return 1 if result.get("failed") else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    sys.exit(main())
