"""TiM4Rec: sizes, initial values, what depends on times, and models that cannot be built."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.calls import LENGTHS, initial, program, rows, shapes_of, small, spread
from tim4rec_jax import build_model
from tim4rec_jax.models import MODELS, TiM4RecConfig

SMALL = small("tim4rec")


def batch():
    items, _ = rows()
    gaps = np.random.default_rng(0).integers(0, 10_000, items.shape)
    return items, (np.cumsum(gaps, axis=1) * (items != 0)).astype(np.float32)


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
    for kernel in (
        table,
        mixer["in_proj"]["kernel"],
        mixer["out_proj"]["kernel"],
        layer["ffn"]["fc1"]["kernel"],
        layer["ffn"]["fc2"]["kernel"],
        time["scale_in"]["kernel"],
        time["scale_out"]["kernel"],
    ):
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


def test_later_times_are_read_by_earlier_positions():
    model = build_model(SMALL)
    assert model.uses_time and not model.causal
    run, params = program(SMALL, "all"), spread(SMALL)
    items, timestamps = batch()
    before = run(params, items, LENGTHS, timestamps)
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


def test_models_that_cannot_be_built():
    with pytest.raises(ValueError, match="model.name='tim4rek' is unknown; nearest: tim4rec"):
        build_model(dataclasses.replace(SMALL, name="tim4rek"))
    with pytest.raises(ValueError, match=f"model.name='zzz' is unknown; nearest: {', '.join(sorted(MODELS))}"):
        build_model(dataclasses.replace(SMALL, name="zzz"))
    for size in (0, 1):
        with pytest.raises(ValueError, match=f"vocab_size={size} must be at least 2: the padding row and one item"):
            build_model(dataclasses.replace(SMALL, vocab_size=size))
    with pytest.raises(ValueError, match=r"attention_heads=3 must divide d_model=16; choose one of \[1, 2, 4, 8, 16\]"):
        shapes_of(small("sasrec", attention_heads=3))
    with pytest.raises(ValueError, match="dtype='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1"):
        build_model(dataclasses.replace(SMALL, dtype="float64"))


def test_double_precision_is_built_in_the_64_bit_mode(x64):
    shapes = shapes_of(dataclasses.replace(SMALL, dtype="float64"))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float64")}
