"""SASRec against numbers of the original program, against PyTorch, and by itself."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

from experiments.benchmarks.torch_models import sasrec as pytorch
from tests.models.attention_cases import (
    LENGTHS,
    SMALL,
    batch,
    check_bfloat16,
    check_causality,
    check_dropout,
    check_initial_values,
    check_outputs_gradients_and_training,
    check_padding_and_batch,
    check_perturbed_parameters,
    check_round_trip,
    check_the_twin,
    check_twin_on_settings,
    one_thread,  # noqa: F401
    program,
    shapes_of,
    spread,
)
from tests.models.packing_cases import check_packing
from tim4rec_jax import build_model, interop


def test_the_original_in_float32(golden_dir):
    check_outputs_gradients_and_training(golden_dir, "sasrec")


def test_the_original_in_float64_with_perturbed_parameters(golden_dir, x64):
    check_perturbed_parameters(golden_dir, "sasrec")


def test_the_twin_agrees_with_the_original(golden_dir):
    check_the_twin(golden_dir, "sasrec")


@pytest.mark.exhaustive
@pytest.mark.parametrize("changes", [{"num_layers": 1, "attention_heads": 1}, {"num_layers": 3, "d_model": 32}])
def test_the_twin_on_other_settings(changes, x64):
    check_twin_on_settings(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("layers", [1, 3])
def test_state_dicts_round_trip(layers):
    check_round_trip(dataclasses.replace(SMALL, num_layers=layers))


def test_the_model_is_causal():
    assert not build_model(SMALL).uses_time
    check_causality(SMALL)


@pytest.mark.parametrize("layers", [1, 2])
def test_packed_histories_are_as_if_alone(layers, x64):
    check_packing(dataclasses.replace(SMALL, num_layers=layers))


def test_padding_and_batch_do_not_matter():
    check_padding_and_batch(SMALL)


def test_dropout_follows_the_example_id_and_not_the_batch():
    check_dropout(SMALL)


def test_initial_values():
    check_initial_values(dataclasses.replace(SMALL, vocab_size=200, max_len=50))


def test_bfloat16_is_close_and_keeps_sensitive_parts_in_float32():
    check_bfloat16(dataclasses.replace(SMALL, dropout=0.0))


def test_the_last_layer_is_computed_where_it_is_read():
    """Its feed-forward runs at one position a row."""
    items, _ = batch()
    widths = {method: [] for method in ("all", "last")}
    for method, found in widths.items():
        jaxpr = program(SMALL, method).trace(spread(SMALL), items, LENGTHS, None).jaxpr
        found += [line for line in str(jaxpr).splitlines() if " erf" in line]
    assert [line.count(f"[4,12,{SMALL.inner_size}]") for line in widths["all"]] == [1, 1]
    assert [line.count(f"[4,1,{SMALL.inner_size}]") for line in widths["last"]] == [0, 1]


def test_bad_input():
    items, _ = batch()
    for method in ("all", "last"):
        with pytest.raises(ValueError, match="items have 13 positions, more than max_len=12"):
            program(SMALL, method).trace(spread(SMALL), np.ones((4, 13), np.int32), LENGTHS, None)
    with pytest.raises(ValueError, match=r"attention_heads=3 must divide d_model=16; choose one of \[1, 2, 4, 8, 16\]"):
        shapes_of(dataclasses.replace(SMALL, attention_heads=3))
    given = {name: value.numpy() for name, value in pytorch.SASRec(SMALL).state_dict().items()}
    given["time_matrix_K_emb.weight"] = given.pop("LayerNorm.bias")
    with pytest.raises(ValueError) as raised:
        interop.params_from_torch(SMALL, given)
    for part in ("missing: LayerNorm.bias", "unexpected: time_matrix_K_emb.weight"):
        assert part in str(raised.value)
