"""Approximate search for the best items: a graph over the item table (HNSW, by usearch), and what it misses.

Scores are inner products of a hidden state and the rows of the item table, so the nearest rows by inner product are the
best items. Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using hierarchical navigable
small world graphs", arXiv 1603.09320.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Edges of a node, and candidates looked at when it is put in: at 50,000 items of width 64 these reached a recall of .99
# where usearch's own defaults needed four times the candidates of a search.
CONNECTIVITY, EXPANSION_ADD = 32, 256
LEAST_EXPANSION, MOST_EXPANSION = 64, 8192
LEAST_RECALL, RECALL_AT = 0.99, 10


class IndexReport(NamedTuple):
    """How well an index answers.

    Attributes:
      recall: share of the RECALL_AT best items, or of all where there are fewer, that it finds, over all queries.
      expansion_search: candidates of a search at which it does.
      queries: how many were asked.
    """

    recall: float
    expansion_search: int
    queries: int


def require_usearch() -> Any:
    """Returns the module `usearch.index`.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        import usearch.index
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "an index of the items is built by usearch, which is not installed: pip install 'tim4rec_jax[ann]'"
        ) from None
    return usearch.index


def write_index(
    file: pathlib.Path,
    table: np.ndarray,
    queries: np.ndarray,
    best: Callable[[np.ndarray, int], np.ndarray],
) -> IndexReport:
    """Builds an index of the items and writes it once it finds what exact search does.

    The candidates of a search are doubled until the recall reaches LEAST_RECALL. The same table gives the same index.

    Args:
      file: what to write; keys are item indices from 1.
      table: float32 [items + 1, d], the item table; row 0, the padding, is no item.
      queries: float32 [n, d] hidden states to measure with.
      best: (queries, k) -> int [n, k], the items that the model scores highest.

    Raises:
      ValueError: the recall stays lower, as where scores are no inner products with the table.
      ModuleNotFoundError: usearch is not installed.
    """
    usearch, k = require_usearch(), min(RECALL_AT, len(table) - 1)
    index = usearch.Index(
        ndim=table.shape[1], metric="ip", dtype="f32", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD
    )
    # On several threads at once items can be left without a way to them, others in every build.
    index.add(np.arange(1, len(table), dtype=np.uint64), np.ascontiguousarray(table[1:]), threads=1)
    exact, expansion = best(queries, k), LEAST_EXPANSION
    while True:
        index.expansion_search = expansion
        found = np.stack([index.search(query, k).keys for query in queries]).astype(np.int64)
        hits = [len(np.intersect1d(one, other)) for one, other in zip(found, exact, strict=True)]
        recall = float(np.sum(hits) / exact.size)
        if recall >= LEAST_RECALL:
            break
        if expansion >= MOST_EXPANSION:
            raise ValueError(
                f"--ann=usearch: of the {k} best items {recall:.3f} are found, under {LEAST_RECALL}: either scores are "
                "no inner products with the item table, or it has no structure; leave --ann out and rank all items"
            )
        expansion *= 2
    index.save(str(file))
    return IndexReport(recall, expansion, len(queries))
