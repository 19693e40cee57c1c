"""Ranks and best items over an embedding in parts are those of all scores at once, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tim4rec_jax.config import ParallelConfig
from tim4rec_jax.evaluation.metrics import rank_of_target
from tim4rec_jax.parallel.item_table import MODEL_AXIS, ROW_AXES, local_top_k, sharded_ranks
from tim4rec_jax.parallel.mesh import make_layout
from tim4rec_jax.serving.ranking import best_columns

# Parts of 10 rows, the last ones no items; tiles of 4, whose last overlaps the one before.
ITEMS, ROWS, TILE, HISTORIES, WIDTH = 37, 40, 4, 12, 3


@functools.cache
def mesh():
    return make_layout(ParallelConfig("sharded", catalogue_shards=jax.device_count())).mesh


def inputs(seed=0):
    """Small whole numbers, so that many items tie exactly; rows of no items would win every comparison."""
    rng = np.random.default_rng(seed)
    table = rng.integers(-1, 2, (ROWS, WIDTH)).astype(np.float32)
    table[ITEMS:] = 100.0
    hidden = rng.integers(-2, 3, (HISTORIES, WIDTH)).astype(np.float32)
    targets = rng.integers(1, ITEMS, HISTORIES).astype(np.int32)
    return hidden, table, targets, rng.integers(0, ITEMS, (HISTORIES, 5)).astype(np.int32)


def once(items):
    """Each item of a row at its first place only, 0 at others."""
    return np.array(
        [[0 if item in row[:i] else item for i, item in enumerate(row)] for row in items.tolist()], np.int32
    )


@functools.cache
def on_parts(what):
    """Jitted (hidden, table, targets, excluded) -> what a function for the part of one device finds."""
    rows = P(ROW_AXES)

    def body(hidden, shard, targets, excluded):
        if what == "best":
            return local_top_k(hidden, shard, excluded, 9, vocab_size=ITEMS, tile=TILE)
        seen = jax.lax.all_gather(excluded, MODEL_AXIS, tiled=True)
        return sharded_ranks(hidden, targets, shard, seen, vocab_size=ITEMS, tile=TILE)

    specs = (rows, P(MODEL_AXIS), rows, rows)
    return jax.jit(jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=rows, check_vma=False))


def test_ranks():
    hidden, table, targets, excluded = inputs()
    scores = hidden @ table[:ITEMS].T
    ranks, unseen, finite = on_parts("rank")(hidden, table, targets, once(excluded))
    np.testing.assert_array_equal(ranks, rank_of_target(jnp.asarray(scores), jnp.asarray(targets)))
    left = np.ones(scores.shape, bool)
    left[np.arange(HISTORIES)[:, None], excluded] = left[:, 0] = left[np.arange(HISTORIES), targets] = False
    at_target = scores[np.arange(HISTORIES), targets][:, None]
    ahead = ((scores > at_target) & left).sum(axis=1) + ((scores == at_target) & left).sum(axis=1) / 2
    np.testing.assert_array_equal(unseen, 1 + ahead)
    assert (unseen % 1 == 0.5).any(), "there should be ties"
    assert finite.all() and len(set(np.asarray(ranks).tolist())) > 5 and (unseen < ranks).any()


def test_best_items():
    hidden, table, targets, excluded = inputs()
    expected = best_columns(jnp.asarray(hidden @ table[:ITEMS].T), jnp.asarray(excluded), 9)
    for actual, wanted in zip(on_parts("best")(hidden, table, targets, excluded), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert (np.diff(np.asarray(expected[0])) == 0).any(), "there should be ties"


@pytest.mark.parametrize("what", ["rank", "best"])
def test_scores_that_are_not_finite_are_told(what):
    hidden, table, targets, excluded = inputs()
    hidden[7] = np.nan
    finite = on_parts(what)(hidden, table, targets, excluded)[-1]
    np.testing.assert_array_equal(finite, np.arange(HISTORIES) != 7)
    table[ITEMS - 1, 0] = np.inf
    hidden[:, 0] = 1.0
    assert not np.asarray(on_parts(what)(hidden, table, targets, excluded)[-1]).any()
