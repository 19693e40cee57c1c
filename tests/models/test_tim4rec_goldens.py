"""The JAX model against numbers printed by the original programs, in float32 and in float64."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.models.settings import sibling
from tests.torch_reference.perturbed import perturbed
from tests.torch_reference.test_tim4rec_goldens import CASES, assert_close_to_maximum, load_case, section
from tim4rec_jax import build_model, interop
from tim4rec_jax.config import TrainConfig
from tim4rec_jax.models import last_hidden, one_segment
from tim4rec_jax.training.losses import cross_entropy
from tim4rec_jax.training.step import make_optimizer

CUT = 33


@functools.cache
def program(config, where, gradients=True):
    """Jitted (params, inputs) -> (loss, (hidden at the last items, logits, what the modules return)), gradients."""
    model = build_model(config)

    def loss(params, items, lengths, timestamps, targets):
        options = {"segment_ids": None if model.packable else one_segment(lengths, items.shape[1])}
        options["positions"] = lengths[:, None] - 1 if where == "last" else None
        (hidden, _), seen = model.apply({"params": params}, items, timestamps, **options, capture_intermediates=True)
        hidden = hidden[:, 0] if where == "last" else hidden[jnp.arange(len(lengths)), lengths - 1]
        logits = model.apply({"params": params}, hidden, method="score")
        return cross_entropy(logits, targets).mean(), (hidden, logits, seen["intermediates"])

    return jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else loss)


def config_of(name, arrays):
    """Our settings for a case; those that do not act here are made alike, so that cases share a compilation."""
    settings = json.loads(arrays["config_json"].item())
    config = interop.config_from_upstream("ssd4rec" if name == "ssd4rec" else "tim4rec", settings)
    assert config.kaiming_init == settings["is_kai_ming_init"]
    assert config.dropout == 0
    return sibling(config, config.name, kaiming_init=True, time_dropout=0.0)


def inputs_of(config, arrays):
    items, lengths, targets = (
        jnp.asarray(arrays[f"in/{name}"], jnp.int32) for name in ("item_seq", "item_seq_len", "pos_items")
    )
    timestamps = jnp.asarray(arrays["in/timestamps"]) if config.name == "tim4rec" else None
    return items, lengths, timestamps, targets


def hidden_states(seen):
    """Arrays by the names of the stored `hid/*`, from what our modules return."""
    found = {"in_layer_norm": seen["embedding_norm"]["__call__"][0]}
    if "time_norm" in seen:
        found["layer_norm_time"] = seen["time_norm"]["__call__"][0][:, 0]
    for i in range(sum(name.startswith("layers_") for name in seen)):
        layer, theirs = seen[f"layers_{i}"], f"ssd_layers.{i}"
        for name, (hidden, channel, _) in {
            f"{theirs}.ssd": layer["mixer"]["__call__"][0],
            theirs: layer["__call__"][0],
        }.items():
            found |= {name: hidden, f"{name}:0": hidden, f"{name}:1": channel}
        found[f"{theirs}.layer_norm"] = layer["norm"]["__call__"][0]
        found[f"scan{i}.dt_softplus"] = layer["mixer"]["step_size"][0]
        found[f"scan{i}.y"] = layer["mixer"]["scan"][0]
    return found


@pytest.fixture(scope="module", params=CASES)
def case(request, golden_dir):
    """Arrays of a case, our settings, and the parameters."""
    arrays = load_case(golden_dir, request.param)
    config = config_of(request.param, arrays)
    return arrays, config, interop.params_from_torch(config, section(arrays, "param"))


def assert_outputs_agree(arrays, loss, hidden, logits):
    np.testing.assert_allclose(hidden, arrays["out/seq_output"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, arrays["out/logits"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=0, atol=1e-5)


def test_outputs_and_hidden_states_at_every_position_agree(case):
    arrays, config, params = case
    loss, (hidden, logits, seen) = program(config, "all", gradients=False)(params, *inputs_of(config, arrays))
    assert_outputs_agree(arrays, loss, hidden, logits)
    expected, found = section(arrays, "hid"), hidden_states(seen)
    assert len(expected) >= 11
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert_close_to_maximum(np.asarray(found[name]), value, 2e-5, name)


def test_outputs_and_gradients_at_the_last_position_agree(case):
    arrays, config, params = case
    (loss, (hidden, logits, _)), gradients = program(config, "last")(params, *inputs_of(config, arrays))
    assert_outputs_agree(arrays, loss, hidden, logits)
    actual, expected = interop.params_to_torch(config, gradients), section(arrays, "grad")
    assert set(actual) == set(expected)
    compared = [name for name in expected if np.abs(expected[name]).max() >= 1e-10]
    assert len(compared) >= 38
    for name in compared:
        assert_close_to_maximum(actual[name], expected[name], 1e-4, name)
    for name in json.loads(arrays["config_json"].item())["_grad_none"]:
        assert (actual[name] == 0).all(), name


def test_items_cut_to_the_longest_row_give_the_same(case):
    arrays, config, params = case
    items, lengths, timestamps, _ = inputs_of(config, arrays)
    rows = np.flatnonzero(lengths <= CUT)
    assert len(rows) >= 1
    model = build_model(config)
    timestamps = None if timestamps is None else timestamps[rows]
    last = jax.jit(functools.partial(last_hidden, model))
    cut = last({"params": params}, items[rows, :CUT], lengths[rows], timestamps)
    np.testing.assert_allclose(cut, arrays["out/seq_output"][rows], rtol=0, atol=2e-5)


def test_five_adam_steps_agree(case):
    arrays, config, params = case
    optimizer = make_optimizer(TrainConfig(learning_rate=1e-3), total_steps=5)
    update = jax.jit(optimizer.update)
    value_and_grad, inputs = program(config, "last"), inputs_of(config, arrays)
    state = optimizer.init(params)
    losses = []
    for _ in range(5):
        (loss, _), gradients = value_and_grad(params, *inputs)
        losses.append(loss)
        updates, state = update(gradients, state, params)
        params = jax.tree.map(np.add, params, updates)
    losses.append(value_and_grad(params, *inputs)[0][0])
    np.testing.assert_allclose(losses, arrays["adam/losses"], rtol=0, atol=1e-5)
    trained, expected = interop.params_to_torch(config, params), section(arrays, "final")
    assert set(trained) == set(expected)
    gap = np.concatenate([np.abs(trained[name] - expected[name]).ravel() for name in expected])
    assert np.mean(gap <= 1e-5) >= 0.999


@pytest.mark.parametrize("where", ["all", "last"])
@pytest.mark.parametrize("name", CASES)
def test_perturbed_parameters_agree_in_float64(golden_dir, name, where, x64):
    initial = section(load_case(golden_dir, name), "param")
    arrays = load_case(golden_dir, f"{name}_pert_f64")
    config = dataclasses.replace(config_of(name, arrays), dtype="float64")
    moved = perturbed({key: torch.from_numpy(value) for key, value in initial.items()})
    params = interop.params_from_torch(config, moved)
    (loss, (hidden, logits, seen)), gradients = program(config, where)(params, *inputs_of(config, arrays))
    actual = {"out/seq_output": hidden, "out/logits": logits, "out/loss": loss}
    actual |= {f"grad/{key}": value for key, value in interop.params_to_torch(config, gradients).items()}
    compared = ("out", "grad")
    if where == "all":
        actual |= {f"hid/{key}": value for key, value in hidden_states(seen).items()}
        compared += ("hid",)
    expected = {key: value for key, value in arrays.items() if key.split("/")[0] in compared}
    assert len(expected) >= 3 + 39
    for key, value in expected.items():
        assert actual[key].dtype == np.float64, key
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=1e-10, err_msg=key)
