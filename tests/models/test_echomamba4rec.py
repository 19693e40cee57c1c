"""EchoMamba4Rec against numbers of the original program, against PyTorch, and by itself."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

from experiments.benchmarks.torch_models import echomamba4rec as pytorch
from tests.models.attention_cases import (
    LENGTHS,
    batch,
    check_dropout,
    check_round_trip,
    check_twin_on_settings,
    one_thread,  # noqa: F401
    program,
    spread,
)
from tests.models.settings import sibling
from tests.models.test_mamba4rec import SMALL as MAMBA4REC
from tests.models.test_mamba4rec import (
    check_bfloat16,
    check_implementations,
    check_initial_values,
    check_outputs_gradients_and_training,
    check_perturbed_parameters,
    check_the_twin,
    check_too_many_positions,
    registered,  # noqa: F401
)
from tests.torch_reference.test_tim4rec_goldens import load_case, section
from tim4rec_jax import build_model, interop
from tim4rec_jax.interop.mamba_names import ECHOMAMBA4REC_UNUSED
from tim4rec_jax.layers.spectral_filter import spectral_filter

SMALL = sibling(MAMBA4REC, "echomamba4rec", num_layers=1)


def test_the_original_in_float32(golden_dir):
    check_outputs_gradients_and_training(golden_dir, "echomamba4rec", "echomamba4rec")


def test_the_original_in_float64_with_perturbed_parameters(golden_dir, x64):
    check_perturbed_parameters(golden_dir, "echomamba4rec", "echomamba4rec")


def test_the_twin_agrees_with_the_original(golden_dir):
    check_the_twin(golden_dir, "echomamba4rec", "echomamba4rec")


def test_only_the_uncalled_attention_block_is_left_out(golden_dir):
    names = section(load_case(golden_dir, "echomamba4rec"), "param")
    left_out = {name for name in names if ECHOMAMBA4REC_UNUSED.match(name)}
    assert left_out == {name for name in names if "multi_query_transformer_block" in name}
    assert len(left_out) == 18


@pytest.mark.exhaustive
@pytest.mark.parametrize("changes", [{"num_layers": 2}, {"num_layers": 1, "max_len": 13, "d_model": 40}])
def test_the_twin_on_other_settings(changes, x64):
    """Two layers hold two steps in each of two blocks; an odd length has no frequency of its own at the end."""
    check_twin_on_settings(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("layers", [1, 2])
def test_state_dicts_round_trip(layers):
    check_round_trip(dataclasses.replace(SMALL, num_layers=layers))


def test_the_model_is_not_causal():
    model = build_model(SMALL)
    assert not model.causal and not model.uses_time
    run, params = program(SMALL, "all"), spread(SMALL)
    items, _ = batch()
    before = np.asarray(run(params, items, np.full(4, 12), None))
    changed = items.copy()
    changed[:, 11] = 9
    assert (np.abs(run(params, changed, np.full(4, 12), None) - before)[:, :11].max(axis=(1, 2)) > 1e-2).all()


def test_a_cut_is_padded_back_and_the_batch_does_not_matter():
    run, params = program(SMALL, "last"), spread(SMALL)
    items, _ = batch()
    before = np.asarray(run(params, items, LENGTHS, None))
    full = np.asarray(program(SMALL, "all")(params, items, LENGTHS, None))
    np.testing.assert_allclose(full[np.arange(4), LENGTHS - 1], before, rtol=0, atol=1e-5)
    order = np.array([3, 1, 2])
    given = params, items[order, :8], LENGTHS[order], None
    np.testing.assert_allclose(run(*given), before[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(program(SMALL, "all")(*given), full[order, :8], rtol=0, atol=1e-5)
    assert np.isfinite(np.asarray(run(params, np.zeros_like(items), np.ones(4, int), None))).all()


def test_dropout_follows_the_example_id_and_not_the_batch():
    check_dropout(SMALL)


def test_initial_values():
    check_initial_values(dataclasses.replace(SMALL, vocab_size=200))


def test_bfloat16_is_close_and_keeps_sensitive_parts_in_float32():
    check_bfloat16(dataclasses.replace(SMALL, dropout=0.0))


def test_the_backend_of_scan_and_convolution_can_be_named():
    check_implementations(SMALL)


def test_the_last_unit_is_computed_where_it_is_read():
    """The gated linear unit of the last block runs at one position a row."""
    items, _ = batch()
    shapes = {}
    for method in ("all", "last"):
        jaxpr = program(SMALL, method).trace(spread(SMALL), items, LENGTHS, None).jaxpr
        lines = [line for line in str(jaxpr).splitlines() if " logistic " in line]
        shapes[method] = [sum(f"f32[4,{m},16]" in line for line in lines) for m in (12, 1)]
    assert shapes == {"all": [1, 0], "last": [0, 1]}


@pytest.mark.parametrize("length", [7, 8])
def test_the_filter_is_a_circular_convolution(length):
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(2, length, 3)), rng.normal(size=(length, 3))
    spectrum = np.fft.rfft(taps, axis=0)
    given = jnp.asarray(x, jnp.float32), jnp.asarray(np.stack([spectrum.real, spectrum.imag], -1), jnp.float32)
    expected = sum(np.roll(x, shift, axis=1) * taps[shift] for shift in range(length))
    np.testing.assert_allclose(spectral_filter(*given), expected, rtol=0, atol=1e-5)


def test_bad_input():
    check_too_many_positions(SMALL)
    expected = r"weight has shape \(5, 3, 2\), expected \(l // 2 \+ 1, d, 2\)=\(4, 3, 2\) for x \(2, 7, 3\)"
    with pytest.raises(ValueError, match=expected):
        spectral_filter(jnp.zeros((2, 7, 3)), jnp.zeros((5, 3, 2)))
    name = "mamba_layers.0.mamba_backwards.0.D"
    given = {key: value.numpy() for key, value in pytorch.EchoMamba4Rec(SMALL).state_dict().items() if key != name}
    with pytest.raises(ValueError, match=f"missing: {name}$"):
        interop.params_from_torch(SMALL, given)
