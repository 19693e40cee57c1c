"""Mamba4Rec against the original program, against PyTorch, and by itself; checks shared with EchoMamba4Rec."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models import mamba4rec as pytorch
from experiments.benchmarks.torch_models.echomamba4rec import EchoMamba4Rec as PyTorchEchoMamba4Rec
from tests.models import attention_cases
from tests.models.attention_cases import (
    LENGTHS,
    assert_trained_alike,
    batch,
    check_causality,
    check_dropout,
    check_padding_and_batch,
    check_round_trip,
    check_twin_on_settings,
    init,
    inputs_of,
    one_thread,  # noqa: F401
    program,
    shapes_of,
    spread,
    value_and_grad,
)
from tests.models.calls import call
from tests.models.packing_cases import check_packing
from tests.models.settings import settings_of
from tests.torch_reference.test_tim4rec_goldens import (
    assert_close_to_maximum,
    load_case,
    record_hidden_states,
    section,
)
from tim4rec_jax import build_model, interop
from tim4rec_jax.config import TrainConfig
from tim4rec_jax.interop import torch_checkpoint
from tim4rec_jax.interop.mamba_names import ECHOMAMBA4REC_UNUSED, echomamba4rec_names, mamba4rec_names
from tim4rec_jax.models import MODELS, Mamba4RecConfig
from tim4rec_jax.models.echomamba4rec import EchoMamba4Rec
from tim4rec_jax.models.mamba4rec import Mamba4Rec
from tim4rec_jax.training.step import make_optimizer

SMALL = Mamba4RecConfig(
    vocab_size=23, max_len=12, d_model=16, d_state=8, dropout=0.3, norm_eps=1e-5, kaiming_init=False
)
TWINS = {"mamba4rec": pytorch.Mamba4Rec, "echomamba4rec": PyTorchEchoMamba4Rec}
NAMES = {"mamba4rec": mamba4rec_names, "echomamba4rec": echomamba4rec_names}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The two models by name."""
    for name, model in (("mamba4rec", Mamba4Rec), ("echomamba4rec", EchoMamba4Rec)):
        monkeypatch.setitem(MODELS, name, model)
        monkeypatch.setitem(torch_checkpoint._NAMES, name, NAMES[name])
        monkeypatch.setitem(attention_cases.TWINS, name, TWINS[name])


def config_of(name, arrays):
    settings = json.loads(arrays["config_json"].item())
    return settings_of(
        name, vocab_size=settings["n_items"], max_len=settings["MAX_ITEM_LIST_LENGTH"],
        d_model=settings["hidden_size"], num_layers=settings["num_layers"], d_state=settings["d_state"],
        d_conv=settings["d_conv"], expand=settings["expand"], dropout=settings["dropout_prob"], kaiming_init=False,
    )  # fmt: skip


def used(arrays):
    """Leaves out what the original stores and never calls."""
    return {key: value for key, value in arrays.items() if not ECHOMAMBA4REC_UNUSED.match(key)}


@functools.cache
def hidden_states(config):
    """Jitted (params, inputs) -> arrays by the names of the stored `hid/*`, from what our modules return."""
    model = build_model(config)

    @jax.jit
    def run(params, items, lengths):
        _, seen = call(model, params, items, lengths, None, capture_intermediates=True)
        seen = seen["intermediates"]
        found = {"LayerNorm": seen["embedding_norm"]}
        for i in range(config.num_layers):
            theirs = f"mamba_layers.{i}"
            if config.name == "mamba4rec":
                layer = seen[f"layers_{i}"]
                found |= {f"{theirs}.mamba": layer["mixer"], f"{theirs}.LayerNorm": layer["norm"], theirs: layer}
                continue
            block = seen[f"blocks_{i}"]
            found |= {f"{theirs}.filter_layer": block["filter"], f"{theirs}.glu": block["glu"], theirs: block}
            for j in range(config.num_layers):
                for way in ("forward", "backward"):
                    found[f"{theirs}.mamba_{way}s.{j}"] = block[f"steps_{j}"][f"{way}_mixer"]
                    found[f"{theirs}.norms_{way}.{j}"] = block[f"steps_{j}"][f"{way}_norm"]
        returned = {name: module["__call__"][0] for name, module in found.items()}
        # Mixers and blocks also return the time channel and the cache.
        return {name: value[0] if isinstance(value, tuple) else value for name, value in returned.items()}

    return run


def check_outputs_gradients_and_training(golden_dir, case, name):
    """Float32: every output and gradient, and five steps of Adam."""
    arrays = load_case(golden_dir, case)
    config = config_of(name, arrays)
    params, inputs = interop.params_from_torch(config, used(section(arrays, "param"))), inputs_of(arrays)
    found, expected = hidden_states(config)(params, *inputs[:2]), section(arrays, "hid")
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert_close_to_maximum(np.asarray(found[key]), value, 2e-5, key)

    optimizer = make_optimizer(TrainConfig(learning_rate=1e-3), total_steps=5)
    update, state, losses = jax.jit(optimizer.update), optimizer.init(params), []
    for step in range(6):
        (loss, (hidden, logits)), gradients = value_and_grad(config)(params, *inputs)
        losses.append(loss)
        if step == 0:
            np.testing.assert_allclose(hidden, arrays["out/seq_output"], rtol=0, atol=2e-5)
            np.testing.assert_allclose(logits, arrays["out/logits"], rtol=0, atol=5e-5)
            np.testing.assert_allclose(loss, arrays["out/loss"], rtol=0, atol=1e-5)
            actual, expected = interop.params_to_torch(config, gradients), used(section(arrays, "grad"))
            assert set(actual) == set(expected)
            for key, value in expected.items():
                if np.abs(value).max() >= 1e-10:
                    assert_close_to_maximum(actual[key], value, 1e-4, key)
        if step < 5:
            updates, state = update(gradients, state, params)
            params = jax.tree.map(np.add, params, updates)
    trained = {f"final/{key}": value for key, value in used(section(arrays, "final")).items()}
    kept = trained | {"adam/losses": arrays["adam/losses"]}
    assert_trained_alike(losses, interop.params_to_torch(config, params), kept)


def _perturbed(golden_dir, case, name):
    """Returns the stored float64 results, settings and perturbed parameters."""
    initial, arrays = section(load_case(golden_dir, case), "param"), load_case(golden_dir, f"{case}_pert_f64")
    config = dataclasses.replace(config_of(name, arrays), dtype="float64")
    moved = pytorch.perturbed({key: torch.from_numpy(value) for key, value in initial.items()})
    expected = {key: value for key, value in arrays.items() if key.split("/")[0] in ("out", "grad", "hid")}
    expected = {key: value for key, value in expected.items() if not ECHOMAMBA4REC_UNUSED.match(key[5:])}
    return arrays, expected, config, used(moved)


def _assert_exact(actual, expected):
    assert set(expected) <= set(actual)
    for key, value in expected.items():
        assert actual[key].dtype == np.float64, key
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=1e-10, err_msg=key)


def check_perturbed_parameters(golden_dir, case, name):
    """Float64: outputs, hidden states and gradients, far from the initial values."""
    arrays, expected, config, moved = _perturbed(golden_dir, case, name)
    params, inputs = interop.params_from_torch(config, moved), inputs_of(arrays)
    (loss, (hidden, logits)), gradients = value_and_grad(config)(params, *inputs)
    actual = {"out/seq_output": hidden, "out/logits": logits, "out/loss": loss}
    actual |= {f"grad/{key}": value for key, value in interop.params_to_torch(config, gradients).items()}
    actual |= {f"hid/{key}": value for key, value in hidden_states(config)(params, *inputs[:2]).items()}
    assert set(actual) == set(expected)
    _assert_exact(actual, expected)


def check_the_twin(golden_dir, case, name):
    """The PyTorch model gives the stored numbers too, in float32 with training and in float64."""
    arrays = load_case(golden_dir, case)
    given = {key: torch.from_numpy(value) for key, value in used(section(arrays, "param")).items()}
    model = TWINS[name](config_of(name, arrays))
    assert list(model.state_dict()) == list(given)
    model.load_state_dict(given)
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    items, lengths, targets = (torch.from_numpy(arrays[f"in/{k}"]) for k in ("item_seq", "item_seq_len", "pos_items"))
    for _ in range(6):
        optimiser.zero_grad()
        loss = model.loss(items, lengths, targets)
        losses.append(loss.item())
        if len(losses) < 6:
            loss.backward()
            optimiser.step()
    kept = {f"final/{key}": value for key, value in used(section(arrays, "final")).items()}
    trained = {key: value.numpy() for key, value in model.state_dict().items()}
    assert_trained_alike(losses, trained, kept | {"adam/losses": arrays["adam/losses"]})

    _, expected, config, moved = _perturbed(golden_dir, case, name)
    model = TWINS[name](config)
    model.load_state_dict(moved)
    seen = record_hidden_states(model)
    output = model(items, lengths)
    logits = model.logits(output)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    actual = {"out/seq_output": output, "out/logits": logits, "out/loss": loss}
    actual = {key: value.detach().numpy() for key, value in actual.items()}
    actual |= {f"grad/{key}": parameter.grad.numpy() for key, parameter in model.named_parameters()}
    actual |= {f"hid/{key}": value for key, value in seen.items()}
    _assert_exact(actual, expected)


def check_initial_values(config):
    """Matrices, tables and the spectrum N(0, 0.02); convolutions uniform; A 1 to n; biases 0, gains and D 1."""
    params = jax.jit(functools.partial(init, config))(jax.random.key(0))
    draws, bound = [], 1 / math.sqrt(config.d_conv)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        kind = path[-1].key
        if path[-2].key == "conv":
            assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound, path
            assert float(leaf.std()) == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(2 * leaf.size)), path
        elif kind in ("kernel", "embedding", "weight"):
            assert float(leaf.std()) == pytest.approx(0.02, rel=4 / math.sqrt(2 * leaf.size)), path
            assert abs(float(leaf.mean())) < 4.5 * 0.02 / math.sqrt(leaf.size), path
            draws.append(leaf.ravel()[:8])
        elif kind == "A_log":
            every = np.broadcast_to(np.arange(1, config.d_state + 1), (config.d_inner, config.d_state))
            np.testing.assert_allclose(np.exp(leaf), every, rtol=1e-6)
        else:
            assert (leaf == (1 if kind in ("scale", "D") else 0)).all(), path
    assert len(np.unique(np.concatenate(draws))) == 8 * len(draws)
    assert float(jnp.abs(params["item_embedding"]["embedding"][0]).min()) > 0


def check_bfloat16(config):
    """Parameters, decays and norms stay in float32, and the result is close."""
    low = dataclasses.replace(config, dtype="bfloat16")
    params = jax.jit(functools.partial(init, config))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(low))} == {jnp.dtype("float32")}
    items, _ = batch(config)
    traced = program(low, "all").trace(params, items, LENGTHS, None)
    sensitive = [line for line in str(traced.jaxpr).splitlines() if " = exp " in line or " = rsqrt " in line]
    assert sensitive and all(":f32[" in line and "bf16" not in line for line in sensitive)
    full = program(low, "all")(params, items, LENGTHS, None)
    assert full.dtype == jnp.bfloat16
    exact = program(config, "all")(params, items, LENGTHS, None)
    np.testing.assert_allclose(np.asarray(full, np.float32), exact, rtol=0, atol=0.1)
    scores = build_model(low).apply({"params": params}, full[:, 0], method="score")
    assert scores.dtype == jnp.float32


def check_implementations(config):
    """The named backends of scan and convolution run, and agree."""
    items, _ = batch(config)
    params = spread(config)
    expected = program(config, "last")(params, items, LENGTHS, None)
    named = dataclasses.replace(config, kernels="reference")
    np.testing.assert_allclose(program(named, "last")(params, items, LENGTHS, None), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="model.kernels='fortran' is not offered by kernels"):
        dataclasses.replace(config, kernels="fortran")


def check_too_many_positions(config):
    for method in ("all", "last"):
        with pytest.raises(ValueError, match="items have 13 positions, more than max_len=12"):
            program(config, method).trace(spread(config), np.ones((4, 13), np.int32), LENGTHS, None)


def test_the_original_in_float32(golden_dir):
    check_outputs_gradients_and_training(golden_dir, "mamba4rec_ml1m_l2", "mamba4rec")


def test_the_original_in_float64_with_perturbed_parameters(golden_dir, x64):
    check_perturbed_parameters(golden_dir, "mamba4rec_ml1m_l2", "mamba4rec")


def test_the_twin_agrees_with_the_original(golden_dir):
    check_the_twin(golden_dir, "mamba4rec_ml1m_l2", "mamba4rec")


@pytest.mark.exhaustive
@pytest.mark.parametrize("changes", [{"num_layers": 1, "d_conv": 2}, {"num_layers": 3, "d_model": 40}])
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


def test_any_length_is_read():
    """More positions than the model was trained with: no parameter depends on the length."""
    items = np.random.default_rng(0).integers(1, SMALL.vocab_size, (4, 40))
    long = program(SMALL, "all")(spread(SMALL), items, LENGTHS, None)
    short = program(SMALL, "all")(spread(SMALL), items[:, :12], LENGTHS, None)
    np.testing.assert_allclose(long[:, :12], short, rtol=0, atol=1e-5)
    last = program(SMALL, "last")(spread(SMALL), items, np.full(4, 40), None)
    np.testing.assert_allclose(last, long[:, -1], rtol=0, atol=1e-5)


def test_padding_and_batch_do_not_matter():
    check_padding_and_batch(SMALL)


def test_dropout_follows_the_example_id_and_not_the_batch():
    check_dropout(SMALL)


def test_initial_values():
    check_initial_values(dataclasses.replace(SMALL, vocab_size=200))


def test_bfloat16_is_close_and_keeps_sensitive_parts_in_float32():
    check_bfloat16(dataclasses.replace(SMALL, dropout=0.0))


def test_the_backend_of_scan_and_convolution_can_be_named():
    check_implementations(SMALL)


def test_the_last_layer_is_computed_where_it_is_read():
    """Its feed-forward runs at one position a row."""
    items, _ = batch()
    widths = {}
    for method in ("all", "last"):
        jaxpr = program(SMALL, method).trace(spread(SMALL), items, LENGTHS, None).jaxpr
        lines = [line for line in str(jaxpr).splitlines() if " erf" in line]
        widths[method] = [next(m for m in (12, 1) if f"[4,{m},64]" in line) for line in lines]
    assert widths == {"all": [12, 12], "last": [12, 1]}


def test_bad_input():
    given = {name: value.numpy() for name, value in pytorch.Mamba4Rec(SMALL).state_dict().items()}
    given["mamba_layers.0.mamba.A_log"] = given["mamba_layers.0.mamba.A_log"].T
    given["time"] = given.pop("LayerNorm.bias")
    with pytest.raises(ValueError) as raised:
        interop.params_from_torch(SMALL, given)
    for part in (
        "missing: LayerNorm.bias",
        "unexpected: time",
        "mamba_layers.0.mamba.A_log: (8, 32), expected (32, 8)",
    ):
        assert part in str(raised.value)
