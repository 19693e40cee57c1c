"""Mamba4Rec goes on with a history from its state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax import build_model
from tim4rec_jax.models import Mamba4RecConfig, init_params, one_segment

TINY = Mamba4RecConfig(vocab_size=40, max_len=12, d_model=16, d_state=4, dropout=0.0, norm_eps=1e-6, dtype="float64")
SETTINGS = {"two layers": TINY, "one layer": dataclasses.replace(TINY, num_layers=1, use_ffn=False)}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def programs(config):
    """The parameters, far from their initial values, the empty state of three rows, and the two jitted methods."""
    model = build_model(config)
    rng = np.random.default_rng(1)
    drawn = init_params(model, jax.random.key(0))
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.2 * rng.normal(size=p.shape), p.dtype), drawn)
    encode = jax.jit(lambda items: model.apply({"params": params}, items)[0])

    @jax.jit
    def extend(cache, items, lengths):
        segment_ids = one_segment(lengths, items.shape[1])
        hidden, cache = model.apply({"params": params}, items, segment_ids=segment_ids, cache=cache)
        return cache, hidden

    return model.apply({"params": params}, 3, method="init_cache"), encode, extend


ITEMS = jnp.asarray(np.random.default_rng(2).integers(1, 40, (3, 17)), jnp.int32)


@pytest.mark.parametrize("name", SETTINGS)
def test_pieces_of_any_size_give_what_one_pass_gives(name):
    empty, encode, extend = programs(SETTINGS[name])
    whole = encode(ITEMS)
    final = None
    for sizes in ([17], [1] * 17, [7, 1, 9]):
        state, parts, at = empty, [], 0
        for size in sizes:
            state, hidden = extend(state, ITEMS[:, at : at + size], jnp.full(3, size, jnp.int32))
            parts.append(hidden)
            at += size
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-10)
        final = state if final is None else final
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


def test_ragged_pieces_leave_what_is_padded_alone():
    empty, _, extend = programs(TINY)
    lengths = jnp.array([0, 2, 6], jnp.int32)
    state, _ = extend(empty, ITEMS[:, :6], lengths)
    for leaf, start in zip(jax.tree.leaves(state), jax.tree.leaves(empty), strict=True):
        np.testing.assert_array_equal(leaf[0], start[0])
    other, _ = extend(empty, ITEMS[:, :6].at[1, 2:].set(7), lengths)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert any(
        (leaf[1] != start[1]).any() for leaf, start in zip(jax.tree.leaves(state), jax.tree.leaves(empty), strict=True)
    )
