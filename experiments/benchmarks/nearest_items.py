"""Answering from an index of the items against ranking all of them, over catalogues of several sizes.

The item table and the hidden states are drawn: rows around 1 + items / 500 centres in 16 dimensions, put into `--width`
ones with noise, and of unequal lengths; hidden states around the same centres. Measured are the seconds to build the
index, its recall of the 10 best, and milliseconds per query in turns: one search of the index, and all scores with a
partial sort (NumPy).
"""

import argparse
import functools
import itertools
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from rich.table import Table

from experiments.benchmarks.timing import Form, time_in_turns
from experiments.cli import OptionParser, table
from tim4rec_jax.checks import require
from tim4rec_jax.run_dir import environment
from tim4rec_jax.serving.item_index import RECALL_AT, require_usearch, write_index

_CENTRE_WIDTH, _ITEMS_PER_CENTRE = 16, 500


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for fewer items than a list has, or no width or query.
    """
    parser = OptionParser(prog="experiments.benchmark nearest_items")
    parser.add_argument("--items", default="1e5,1e6", help="sizes of the catalogue")
    parser.add_argument("--width", type=int, default=64, help="d of the item table")
    parser.add_argument("--queries", type=int, default=1000, help="hidden states that measure the recall")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    options = parser.parse_args(rest)
    options.items = [int(float(size)) for size in options.items.split(",")]
    require(min(options.items) >= RECALL_AT, f"--items={min(options.items)} must be at least {RECALL_AT}")
    for name in ("width", "queries"):
        require(getattr(options, name) >= 1, f"--{name}={getattr(options, name)} must be at least 1")
    return options


def draw(items: int, width: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an item table [items + 1, width], padding first, and hidden states [queries, width], float32."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1 + items // _ITEMS_PER_CENTRE, _CENTRE_WIDTH)).astype(np.float32)
    spread = rng.normal(size=(_CENTRE_WIDTH, width)).astype(np.float32) / np.float32(_CENTRE_WIDTH**0.5)

    def around(count: int) -> np.ndarray:
        inner = centres[rng.integers(len(centres), size=count)] + 0.7 * rng.standard_normal(
            (count, _CENTRE_WIDTH), np.float32
        )
        return inner @ spread + 0.3 * rng.standard_normal((count, width), np.float32)

    rows = around(items) * np.exp(0.3 * rng.standard_normal((items, 1), np.float32))
    return np.concatenate([np.zeros((1, width), np.float32), rows]).astype(np.float32), around(queries)


def best_of_all(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Returns the indices [n, k] from 1 of the items with the largest inner products, best first."""
    found = np.empty((len(queries), k), np.int64)
    for i, query in enumerate(queries):
        scores = rows[1:] @ query
        best = np.argpartition(-scores, k - 1)[:k]
        found[i] = best[np.argsort(-scores[best], kind="stable")] + 1
    return found


def _measure(items: int, options: argparse.Namespace, repeats: int) -> dict[str, Any]:
    rows, queries = draw(items, options.width, options.queries, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "items.usearch"
        seconds = []

        def best(asked: np.ndarray, k: int) -> np.ndarray:
            seconds.append(time.perf_counter() - began)  # Asked for once the index is built.
            return best_of_all(rows, asked, k)

        began = time.perf_counter()
        report = write_index(file, rows, queries, best)
        index = require_usearch().Index.restore(str(file))
        size = file.stat().st_size
    index.expansion_search = report.expansion_search
    turn = itertools.cycle(range(len(queries)))
    forms = {
        "index": Form(lambda: index.search(queries[next(turn)], RECALL_AT), lambda _: None),
        "all": Form(functools.partial(best_of_all, rows, queries[:1], RECALL_AT), lambda _: None),
    }
    readings = time_in_turns(forms, repeats=repeats, least_seconds=0.3)
    return {
        "items": items,
        "build_seconds": seconds[0],
        "bytes": size,
        **report._asdict(),
        **{name: one.record() for name, one in readings.items()},
    }


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    require_usearch()
    sizes = [_measure(items, chosen, options.repeats) for items in chosen.items]
    rows = [
        (
            f"{one['items']:,}",
            f"{one['recall']:.4f}",
            f"{one['expansion_search']}",
            f"{one['index']['median_seconds'] * 1e3:.2f}",
            f"{one['all']['median_seconds'] * 1e3:.2f}",
            f"{one['build_seconds']:.0f}",
            f"{one['bytes'] / 1e6:.0f}",
        )
        for one in sizes
    ]
    header = ("items", f"recall@{RECALL_AT}", "expansion", "ms, index", "ms, all", "s to build", "MB")
    record = {"environment": environment(), "settings": vars(chosen) | {"repeats": options.repeats}, "sizes": sizes}
    return record, table(header, rows, title="an index of the items against ranking all of them")
