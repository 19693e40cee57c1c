"""The JAX model by itself: sizes, initial values, what depends on what, precision, dropout and bad input."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.calls import call, program
from tests.models.settings import sibling
from tim4rec_jax import build_model
from tim4rec_jax.models import TiM4RecConfig, init_params

SMALL = TiM4RecConfig(
    vocab_size=23, max_len=12, d_model=16, head_dim=8, d_state=4, chunk_size=5, dropout=0.3, time_dropout=0.3,
    norm_eps=1e-5,
)  # fmt: skip
TIME_OFF = sibling(SMALL, "ssd4rec")
LENGTHS = np.array([12, 1, 3, 8])


def init(config, key):
    return {"params": init_params(build_model(config), key)}


def shapes_of(config):
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


@functools.cache
def initial(config):
    return jax.jit(functools.partial(init, config))(jax.random.key(0))["params"]


def spread(config, seed=0):
    """Parameters so far from their initial values that every part of the model has its say."""
    leaves, tree = jax.tree.flatten(shapes_of(config)["params"])
    rng = np.random.default_rng(seed)
    draws = [rng.normal(size=leaf.shape) * (0.4 if leaf.ndim > 1 else 1.0) for leaf in leaves]
    return jax.tree.unflatten(tree, [draw.astype(np.float32) for draw in draws])


def batch(seed=0):
    rng = np.random.default_rng(seed)
    inside = np.arange(SMALL.max_len) < LENGTHS[:, None]
    items = rng.integers(1, SMALL.vocab_size, inside.shape) * inside
    timestamps = np.cumsum(rng.integers(0, 10_000, inside.shape), axis=1) * inside
    return items, timestamps.astype(np.float32)


KUAIRAND = {"vocab_size": 7112, "kaiming_init": False}
BEAUTY = {"vocab_size": 12_102, "kaiming_init": False, "time_gate_per_position": True}


@pytest.mark.parametrize(("settings", "count"), [(KUAIRAND, 593_498), (BEAUTY, 917_856)])
def test_parameter_counts_of_known_settings(settings, count):
    shapes = shapes_of(TiM4RecConfig(max_len=50, **settings))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("kaiming", [True, False])
def test_initial_values(kaiming):
    # Heads of width 1 give many steps and decays to average.
    config = TiM4RecConfig(vocab_size=500, max_len=50, head_dim=1, num_layers=1, kaiming_init=kaiming)
    params = initial(config)
    layer, time = params["layers_0"], params["layers_0"]["mixer"]["time"]
    mixer = layer["mixer"]
    table = params["item_embedding"]["embedding"]
    for kernel in (table, mixer["in_proj"]["kernel"], mixer["out_proj"]["kernel"], layer["ffn"]["fc1"]["kernel"],
                   layer["ffn"]["fc2"]["kernel"], time["scale_in"]["kernel"], time["scale_out"]["kernel"]):  # fmt: skip
        assert float(kernel.std()) == pytest.approx(0.02, rel=0.06)
        assert abs(float(kernel.mean())) < 4 * 0.02 / math.sqrt(kernel.size)
    assert float(jnp.abs(table[0]).min()) > 0
    assert float(table[0].std()) == pytest.approx(0.02, rel=0.4)
    for affine in (mixer["in_proj"], mixer["out_proj"], layer["ffn"]["fc1"], time["scale_in"], time["residual_gate"]):
        assert (affine["bias"] == 0).all()
    for norm in (params["embedding_norm"], params["time_norm"], layer["norm"], layer["ffn"]["norm"], time["norm"]):
        assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
    assert (mixer["norm_scale"] == 1).all() and (mixer["D"] == 1).all()
    for conv in (mixer["conv"], time["conv_1"], time["conv_2"]):
        kernel, bias = np.asarray(conv["kernel"]), np.asarray(conv["bias"])
        if kaiming:
            assert kernel.std() == pytest.approx(math.sqrt(2 / kernel.size), rel=0.15)
            assert (bias == 0).all()
        else:
            for values in (kernel, bias):
                assert 0.45 < np.abs(values).max() <= 0.5
                assert values.std() == pytest.approx(1 / math.sqrt(12), rel=0.15)
    step, decay = np.log1p(np.exp(np.asarray(mixer["dt_bias"], np.float64))), np.exp(mixer["A_log"])
    assert step.min() >= 0.999e-3 and step.max() <= 1.001e-1
    assert np.log10(step).mean() == pytest.approx(-2, abs=4 * 2 / math.sqrt(12 * 128))
    assert decay.min() >= 1 and decay.max() <= 16
    assert decay.mean() == pytest.approx(8.5, abs=4 * 15 / math.sqrt(12 * 128))


def test_layers_start_apart():
    first, second = (initial(SMALL)[f"layers_{i}"]["mixer"] for i in range(2))
    for name in ("A_log", "dt_bias"):
        assert (first[name] != second[name]).all()
    assert (first["in_proj"]["kernel"] != second["in_proj"]["kernel"]).all()


def test_without_time_the_model_is_causal():
    model = build_model(TIME_OFF)
    assert model.causal and not model.uses_time
    run, params = program(TIME_OFF, "all"), spread(TIME_OFF)
    items, _ = batch()
    before, full = run(params, items, LENGTHS, None), np.full(4, 12)
    changed = items.copy()
    changed[:, 7:] = 1 + (changed[:, 7:] + 5) % 22
    after = run(params, changed, LENGTHS, None)
    np.testing.assert_array_equal(after[:, :7], before[:, :7])
    assert (np.abs(after[:, 7:] - before[:, 7:]).max(axis=(1, 2)) > 1e-2).all()
    np.testing.assert_array_equal(run(params, items, full, None), before)


def test_with_time_it_is_not_for_times_but_still_for_items():
    model = build_model(SMALL)
    assert model.uses_time and not model.causal
    run, params = program(SMALL, "all"), spread(SMALL)
    items, timestamps = batch()
    before = run(params, items, LENGTHS, timestamps)
    changed = items.copy()
    changed[:, 7:] = 1 + (changed[:, 7:] + 5) % 22
    np.testing.assert_array_equal(run(params, changed, LENGTHS, timestamps)[:, :7], before[:, :7])
    later = timestamps.copy()
    later[0, 7:] += 50_000
    after = run(params, items, LENGTHS, later)
    assert np.abs(after[0, :7] - before[0, :7]).max() > 1e-3
    np.testing.assert_array_equal(after[1:], before[1:])


@pytest.mark.parametrize("masked", [True, False])
def test_padding_beyond_the_length(masked):
    """Items there never matter to the last state; timestamps only through the first padded gap, unless it is masked."""
    config = dataclasses.replace(SMALL, mask_padded_time=masked)
    run, params = program(config, "last"), spread(config)
    items, timestamps = batch()
    before = run(params, items, LENGTHS, timestamps)
    padded = np.arange(12) >= LENGTHS[:, None]
    np.testing.assert_array_equal(run(params, np.where(padded, 9, items), LENGTHS, timestamps), before)
    gap = np.abs(run(params, items, LENGTHS, np.where(padded, 1e6, timestamps).astype(np.float32)) - before)
    assert (gap == 0).all() if masked else gap[1:].max() > 1e-3


def test_integer_times_are_subtracted_exactly():
    """Float32 seconds of today step by 64; the gaps of integers do not depend on when they began."""
    config = dataclasses.replace(SMALL, mask_padded_time=True)
    run, params = program(config, "last"), spread(config)
    items, timestamps = batch()
    near = timestamps.astype(np.int32)
    far = (near + 978_000_001) * (np.arange(12) < LENGTHS[:, None])
    expected = run(params, items, LENGTHS, near)
    np.testing.assert_array_equal(run(params, items, LENGTHS, far), expected)
    np.testing.assert_allclose(run(params, items, LENGTHS, timestamps), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(run(params, items, LENGTHS, far.astype(np.float32)) - expected).max() > 5e-5


def test_dropout_follows_the_example_id_and_not_the_batch():
    run, params = program(SMALL, "last", deterministic=False), spread(SMALL)
    items, timestamps = batch()
    ids = np.arange(4)
    before = np.asarray(run(params, items, LENGTHS, timestamps, ids))
    order = np.array([3, 1, 2])
    cut = run(params, items[order, :8], LENGTHS[order], timestamps[order], ids[order])
    np.testing.assert_allclose(cut, before[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(params, items, LENGTHS, timestamps, ids), before)
    assert (np.abs(run(params, items, LENGTHS, timestamps, ids + 4) - before).max(axis=1) > 1e-2).all()
    assert (np.abs(run(params, items, LENGTHS, timestamps, ids, 1) - before).max(axis=1) > 1e-2).all()
    full = np.asarray(program(SMALL, "all", deterministic=False)(params, items, LENGTHS, timestamps))
    np.testing.assert_allclose(full[ids, LENGTHS - 1], before, rtol=1e-5, atol=1e-5)


def primitives(jaxpr):
    """(name, dtype of the first output) of every operation, inner functions included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.outvars[0].aval.dtype
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_bfloat16_is_close_and_keeps_sensitive_parts_in_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = initial(SMALL)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(config))} == {jnp.dtype("float32")}
    model = build_model(config)
    items, timestamps = batch()

    def run(params):
        given = params, items, LENGTHS, timestamps
        hidden, full = (call(model, *given, where) for where in ("last", "all"))
        return hidden, model.apply({"params": params}, hidden, method="score"), full

    traced = jax.jit(run).trace(params)
    found = set(primitives(traced.jaxpr.jaxpr))
    assert ("dot_general", jnp.dtype("bfloat16")) in found
    for name in ("exp", "log1p", "rsqrt", "cumsum", "reduce_sum"):
        assert (name, jnp.dtype("bfloat16")) not in found, name
    for name in ("exp", "log1p", "rsqrt"):
        assert (name, jnp.dtype("float32")) in found, name
    hidden, scores, full = traced.lower().compile()(params)
    assert (hidden.dtype, full.dtype, scores.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = np.asarray(program(SMALL, "all")(params, items, LENGTHS, timestamps))
    last = expected[np.arange(4), LENGTHS - 1]
    np.testing.assert_allclose(np.asarray(full, np.float32), expected, rtol=0, atol=0.1)
    np.testing.assert_allclose(np.asarray(hidden, np.float32), last, rtol=0, atol=0.1)
    table = np.asarray(params["item_embedding"]["embedding"])
    np.testing.assert_allclose(scores, last @ table.T, rtol=0, atol=0.02)


def test_bad_input():
    items, timestamps = batch()
    model = build_model(SMALL)

    def encode(where, **changed):
        given = {"items": items, "lengths": LENGTHS, "timestamps": timestamps} | changed
        return jax.eval_shape(lambda: call(model, spread(SMALL), **given, where=where))

    for method in ("all", "last"):
        with pytest.raises(ValueError, match=r"timestamps have shape None, expected \(b, max_len\)=\(4, 12\)"):
            encode(method, timestamps=None)
        with pytest.raises(ValueError, match=r"timestamps have shape \(4, 8\), expected \(b, max_len\)=\(4, 12\)"):
            encode(method, items=items[:, :8], timestamps=timestamps[:, :8])
        with pytest.raises(ValueError, match="items have 13 positions, more than max_len=12"):
            encode(method, items=np.ones((4, 13), np.int32))


def test_models_that_cannot_be_built():
    with pytest.raises(ValueError, match="model.name='tim4rek' is unknown; nearest: tim4rec"):
        build_model(dataclasses.replace(SMALL, name="tim4rek"))
    with pytest.raises(
        ValueError, match="model.name='zzz' is unknown; nearest: echomamba4rec, mamba4rec, sasrec, ssd4rec, tim4rec, "
    ):
        build_model(dataclasses.replace(SMALL, name="zzz"))
    for size in (0, 1):
        with pytest.raises(ValueError, match=f"vocab_size={size} must be at least 2: the padding row and one item"):
            build_model(dataclasses.replace(SMALL, vocab_size=size))
    with pytest.raises(ValueError, match="dtype='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1"):
        build_model(dataclasses.replace(SMALL, dtype="float64"))


def test_double_precision_is_built_in_the_64_bit_mode(x64):
    shapes = shapes_of(dataclasses.replace(SMALL, dtype="float64"))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float64")}
