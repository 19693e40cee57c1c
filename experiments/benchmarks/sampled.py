"""Seconds of a training step for growing catalogues: the softmax over all items, and over a sample of them.

Three forms of an experiment's step take the same random batches on one device, in turns within a repeat: full softmax
with Adam, sampled softmax with Adam, which still moves every row of the item table, and sampled softmax with lazy Adam,
which touches those rows alone that the step reads.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
from rich.table import Table

from experiments.benchmarks.catalogue import Step, model_settings, sizes
from experiments.configs import load_config
from tim4rec_jax.config import ExperimentConfig, ParallelConfig
from tim4rec_jax.run_dir import environment

FORMS = ("full", "sampled", "lazy")


def settings_of(options: argparse.Namespace, items: int, form: str) -> ExperimentConfig:
    """Returns the experiment's settings for a catalogue and a form of the step."""
    base = load_config(options.config)
    model = model_settings(options, items, options.length)
    sampled = {
        "loss": "sampled_ce", "num_negatives": options.negatives,
        "table_optimizer": "lazy_adam" if form == "lazy" else "adam",
    }  # fmt: skip
    changes = {} if form == "full" else sampled
    train = dataclasses.replace(base.train, batch_size=options.batch_rows, weight_decay=0.0, **changes)
    return dataclasses.replace(base, model=model, train=train, parallel=ParallelConfig("single"))


class _Form:
    """One form of the step with its state."""

    def __init__(self, options: argparse.Namespace, items: int, form: str) -> None:
        self._step = Step(settings_of(options, items, form))
        self._compiled, self._state = self._step.compiled(), self._step.start()
        self.temp_bytes = self._compiled.memory_analysis().temp_size_in_bytes
        self.seconds: list[float] = []

    def take(self, number: int) -> None:
        """Takes a step and notes its time; the first is for the caches and is not noted."""
        batch, began = self._step.batch(number), time.perf_counter()
        self._state, loss = self._compiled(self._state, (), batch)
        jax.block_until_ready(loss)
        if number:
            self.seconds.append(time.perf_counter() - began)


def measure(options: argparse.Namespace, items: int, repeats: int) -> list[dict[str, Any]]:
    """Times the forms of the step for one catalogue."""
    print(f"{items:,} items", file=sys.stderr, flush=True)
    names = [name for name in FORMS if name != "full" or items <= options.full_up_to]
    forms = {name: _Form(options, items, name) for name in names}
    for number in range(repeats + 1):
        for form in forms.values():
            form.take(number)
    return [
        {
            "items": items, "form": name, "seconds": form.seconds, "median_seconds": statistics.median(form.seconds),
            "temp_bytes": form.temp_bytes,
        }
        for name, form in forms.items()
    ]  # fmt: skip


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for sizes under 1, or an experiment that does not train on all positions.
    """
    parser = argparse.ArgumentParser(prog="experiments.benchmark sampled", allow_abbrev=False)
    parser.add_argument("--config", default="ml1m_tim4rec_causal", help="experiment whose model is trained")
    parser.add_argument("--items", type=sizes, default="1e4,1e5,1e6", help="sizes of the catalogue")
    parser.add_argument("--full_up_to", type=float, default=1e6, help="largest catalogue for the full softmax")
    parser.add_argument("--negatives", type=int, default=8192, help="items drawn a step")
    parser.add_argument("--batch_rows", type=int, default=4, help="packed rows of a batch")
    parser.add_argument("--length", type=int, default=200, help="positions of its rows")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark out")
    options = parser.parse_args(rest)
    for name in ("negatives", "batch_rows", "length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)} must be at least 1")
    if min(options.items) < 1:
        raise ValueError(f"--items={','.join(map(str, options.items))}: expected sizes of at least 1")
    if load_config(options.config).train.positions != "all":
        raise ValueError(f"--config={options.config}: choose one with train.positions='all', as ml1m_tim4rec_causal")
    return options


def report(results: list[dict[str, Any]]) -> Table:
    """Milliseconds a step, a row a catalogue, and how much faster the lazy form is than the full one."""
    table = Table(title="A training step: milliseconds, median", title_justify="left")
    for column in ("items", *FORMS, "full / lazy"):
        table.add_column(column, justify="right")
    for items in dict.fromkeys(one["items"] for one in results):
        times = {one["form"]: one["median_seconds"] for one in results if one["items"] == items}
        cells = [f"{1e3 * times[form]:,.0f}" if form in times else "not run" for form in FORMS]
        ratio = f"{times['full'] / times['lazy']:.1f}" if "full" in times else ""
        table.add_row(f"{items:,}", *cells, ratio)
    return table


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    about = environment() | {"command": list(sys.orig_argv)}
    results = [one for items in chosen.items for one in measure(chosen, items, options.repeats)]
    settings = vars(chosen) | {"repeats": options.repeats}
    return {"environment": about, "settings": settings, "results": results}, report(results)
