"""Attention with time intervals: the lean form against the written one, its size, its dropout and its masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.layers.attention import (
    AttentionEncoder,
    Intervals,
    SelfAttention,
    first_positions,
    interval_scores,
    interval_values,
)
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.models import SASRecConfig

B, L, H, P, SPAN = 3, 7, 2, 5, 11


def written_scores(q, keys, intervals):
    """As the equation has it: the key of every pair, [b, m, L, h, p]."""
    return jnp.einsum("bmhp,bmlhp->bhml", q, looked_up(keys, intervals))


def written_values(weights, values, intervals):
    return jnp.einsum("bhml,bmlhp->bmhp", weights, looked_up(values, intervals))


def looked_up(table, intervals, heads=H):
    table = jnp.broadcast_to(table, (len(intervals), *table.shape[-2:]))
    rows = jax.vmap(lambda own, picked: own[picked])(table, intervals)
    return rows.reshape(*intervals.shape, heads, -1)


@pytest.mark.parametrize("queries", [L, 1])
@pytest.mark.parametrize("tables", [(), (B,)], ids=["shared", "one an example"])
def test_lean_and_written_forms_agree_with_their_gradients(tables, queries, x64):
    rng = np.random.default_rng(0)
    intervals = jnp.asarray(rng.integers(0, SPAN + 1, (B, queries, L)))
    q, table = rng.normal(size=(B, queries, H, P)), rng.normal(size=(*tables, SPAN + 1, H * P))
    weights = rng.random((B, H, queries, L))
    for lean, written, first in (
        (interval_scores, written_scores, q),
        (interval_values, written_values, weights),
    ):

        def squares(first, table, form):
            result = form(first, table, intervals)
            return jnp.sum(jnp.sin(result)), result

        results = [
            jax.jit(jax.value_and_grad(functools.partial(squares, form=form), argnums=(0, 1), has_aux=True))(
                first, table
            )
            for form in (lean, written)
        ]
        assert results[0][0][1].shape == results[1][0][1].shape
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *results)


def sizes(jaxpr):
    """Elements of every array that a program computes, inner functions included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_array_has_a_value_for_every_pair_and_channel():
    """Of what the whole stack computes, forward and backward with dropout; neither has the compiled program one."""
    b, length, d, rows = 2, 200, 128, 257
    config = SASRecConfig(max_len=length, d_model=d, attention_heads=4, num_layers=2)
    encoder = AttentionEncoder(config)
    embedded, real = jnp.zeros((b, length, d)), jnp.ones((b, length), bool)
    table = jnp.zeros((b, rows, d))
    ids = jnp.arange(b)

    def apply(params, table, **rngs):
        intervals = Intervals(jnp.zeros((b, length)), table, table)
        return encoder.apply(params, embedded, Rows(real, None, ids, deterministic=False), intervals, **rngs)

    def init(key):
        return encoder.init(key, embedded, Rows(real, None, ids, True), Intervals(real * 1.0, table, table))

    params = jax.eval_shape(init, jax.random.key(0))

    def loss(params, table):
        return jnp.sum(apply(params, table, rngs={"dropout": jax.random.key(0)}) ** 2)

    limit = b * length * length * d
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(params, table)
    found = list(sizes(traced.jaxpr.jaxpr))
    assert len(found) > 500
    assert max(found) <= b * length * rows * config.attention_heads == max(found)
    assert max(found) < limit / 12
    # All that the program keeps at a time, together, is less than one such array.
    assert traced.lower().compile().memory_analysis().temp_size_in_bytes < 4 * limit

    intervals = jax.ShapeDtypeStruct((b, length, length), jnp.int32)
    written = jax.make_jaxpr(functools.partial(looked_up, heads=4))(table[0], intervals)
    assert max(sizes(written.jaxpr)) == limit


def between(timestamps, positions, rows=100):
    table = jnp.zeros((rows, 4))
    return np.asarray(Intervals(jnp.asarray(timestamps), table, table).between(jnp.asarray(positions)))


def test_intervals_are_clipped_whole_seconds_either_way():
    times = [[1000, 1003, 1090, 1099, 1100, 5]]
    expected = [[90, 87, 0, 9, 10, 99]]
    for dtype in (np.int32, np.uint32, np.float32):
        np.testing.assert_array_equal(between(np.array(times, dtype), [[2]])[0], expected)
    np.testing.assert_array_equal(between(np.array([[0.0, 0.9, 1.5, 3.0]]), [[0, 3]])[0], [[0, 0, 1, 3], [3, 2, 1, 0]])


def test_weights_are_dropped_by_example_head_and_pair():
    config = SASRecConfig(max_len=40, d_model=16, attention_heads=4, attention_dropout=0.3)
    attention = SelfAttention(config)

    @functools.partial(jax.jit, static_argnums=2)
    def drop(positions, ids, length):
        bound = attention.bind({}, rngs={"dropout": jax.random.key(3)})
        rows = Rows(jnp.ones((len(ids), length), bool), None, ids, deterministic=False)
        return bound._dropped(jnp.ones((len(ids), 4, positions.shape[1], length)), positions, rows)

    ids = np.array([4, 9])
    full = np.asarray(drop(np.tile(np.arange(40), (2, 1)), ids, 40))
    assert set(np.unique(full)) == {0.0, np.float32(1 / 0.7)} or np.allclose(np.unique(full), [0, 1 / 0.7], rtol=1e-4)
    kept = full > 0
    assert kept.mean() == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / kept.size))
    for one, other in (
        (kept[0], kept[1]),
        (kept[:, 0], kept[:, 1]),
        (kept[:, :, 0], kept[:, :, 1]),
        (kept[..., 0], kept[..., 1]),
        (kept, kept.swapaxes(2, 3)),
    ):
        assert (one != other).mean() == pytest.approx(0.42, abs=5 * np.sqrt(0.25 / one.size))
    # A single query of rows that are cut drops what it dropped among all.
    cut = drop(np.array([[17], [5]]), ids, 20)
    np.testing.assert_array_equal(cut[:, :, 0], full[[0, 1], :, [17, 5], :20])


def test_what_attends_to_what():
    """The weights themselves, read off by values that name their position: uniform over real items up to one's own."""
    length = 16
    config = SASRecConfig(max_len=length, d_model=length, attention_heads=1, attention_dropout=0.0)
    x = jnp.broadcast_to(jnp.eye(length), (2, length, length))
    zero = {"kernel": jnp.zeros((length, length)), "bias": jnp.zeros(length)}
    same = zero | {"kernel": jnp.eye(length)}
    params = {"query": zero, "key": zero, "value": same, "out": same}
    real = np.arange(length) < np.array([[4], [16]])
    rows = Rows(jnp.asarray(real), None, jnp.arange(2), deterministic=True)
    weights = SelfAttention(config).apply({"params": params}, x, rows, None)
    seen = np.tril(np.ones((length, length))) * real[:, None]
    np.testing.assert_allclose(weights, seen / seen.sum(-1, keepdims=True), rtol=1e-6)


def test_where_histories_begin():
    starts = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    expected = [[0, 0, 0, 3, 4, 4], [0, 0, 2, 2, 2, 2], [0] * 6]
    np.testing.assert_array_equal(first_positions(jnp.asarray(starts)), expected)
