"""What models that can be trained on packed rows are held to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.attention_cases import spread
from tests.models.settings import sibling
from tim4rec_jax import build_model

# The lengths of the histories in three rows; what is left of a row is padding.
ROWS = ((5, 4, 2), (12,), (1, 1, 9))


def packed_rows(config, length=12):
    """Items, timestamps and starts of the rows, and (row, first, end) of each history; no item occurs twice."""
    rng = np.random.default_rng(0)
    shape = (len(ROWS), length)
    items = 1 + rng.permutation(config.vocab_size - 1)[: len(ROWS) * length].reshape(shape)
    timestamps = 10**9 + np.cumsum(rng.integers(0, 10**5, shape), axis=1)
    starts, histories = np.zeros(shape, bool), []
    for row, lengths in enumerate(ROWS):
        ends = np.cumsum(lengths)
        starts[row, [0, *ends[ends < length]]] = True
        histories += [(row, end - n, end) for n, end in zip(lengths, ends, strict=True)]
        items[row, ends[-1] :] = timestamps[row, ends[-1] :] = 0
    return items.astype(np.int32), timestamps.astype(np.int32), starts, histories


def check_packing(config):
    """In float64 a history's hidden states are those it has alone, and nothing of its neighbours has a gradient."""
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    config = sibling(config, config.name, vocab_size=60, max_len=12, dtype="float64", **off)
    model = build_model(config)
    assert model.packable and model.causal
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64), spread(dataclasses.replace(config, dtype="float32"))
    )
    items, timestamps, starts, histories = packed_rows(config)

    segment_ids = np.cumsum(starts, axis=1) * (items != 0)

    def encode(params, items, timestamps, segment_ids=None):
        return model.apply({"params": params}, items, timestamps, segment_ids=segment_ids)[0]

    run = jax.jit(encode)
    hidden = np.asarray(run(params, items, timestamps, segment_ids))
    assert hidden.dtype == np.float64 and np.isfinite(hidden).all()
    alone, times = np.zeros((len(histories), 12), np.int32), np.zeros((len(histories), 12), np.int32)
    for i, (row, first, end) in enumerate(histories):
        alone[i, : end - first], times[i, : end - first] = items[row, first:end], timestamps[row, first:end]
    expected = np.asarray(run(params, alone, times))
    for i, (row, first, end) in enumerate(histories):
        np.testing.assert_allclose(hidden[row, first:end], expected[i, : end - first], rtol=0, atol=1e-12)
    # The marks are what does it.
    unmarked = np.asarray(run(params, items, timestamps))
    assert np.abs(unmarked - hidden)[0, 5:9].max() > 1e-3
    np.testing.assert_allclose(unmarked[1], hidden[1], rtol=0, atol=1e-12)

    @jax.jit
    @jax.grad
    def gradient(params, first, end):
        inside = (jnp.arange(12) >= first) & (jnp.arange(12) < end)
        return jnp.sum(jnp.sin(encode(params, items, timestamps, segment_ids)[0]) * inside[:, None])

    for row, first, end in histories[:3]:
        moved = np.flatnonzero(np.asarray(gradient(params, first, end)["item_embedding"]["embedding"]).any(axis=1))
        assert moved.tolist() == sorted(items[row, first:end])
