"""Each model and its PyTorch twin against numbers printed by the original programs, and against each other."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models import echomamba4rec, mamba4rec, sasrec, tim4rec, tisasrec
from tests.models.calls import program, rows, shapes_of, small
from tests.models.settings import sibling
from tests.torch_reference.goldens import load_case, record_hidden_states, section
from tests.torch_reference.perturbed import perturbed
from tim4rec_jax import build_model, interop
from tim4rec_jax.config import TrainConfig
from tim4rec_jax.interop.mamba_names import ECHOMAMBA4REC_UNUSED
from tim4rec_jax.models import MODELS, last_hidden, one_segment
from tim4rec_jax.training.losses import cross_entropy
from tim4rec_jax.training.step import make_optimizer

# The twin, and how its parameters are moved away from their initial values.
TWINS = {
    "tim4rec": (tim4rec.TiM4Rec, perturbed),
    "ssd4rec": (tim4rec.TiM4Rec, perturbed),
    "mamba4rec": (mamba4rec.Mamba4Rec, mamba4rec.perturbed),
    "echomamba4rec": (echomamba4rec.EchoMamba4Rec, mamba4rec.perturbed),
    "sasrec": (sasrec.SASRec, sasrec.perturbed),
    "tisasrec": (tisasrec.TiSASRec, sasrec.perturbed),
}
# File of numbers -> model, and the arrays that it has: outputs, gradients, hidden states.
CASES = {
    "tim4rec_small": ("tim4rec", 84),
    "tim4rec_beauty": ("tim4rec", 84),
    "tim4rec_notime": ("ssd4rec", 53),
    "tim4rec_ml1m": ("tim4rec", 84),
    "ssd4rec": ("ssd4rec", 53),
    "mamba4rec_ml1m_l2": ("mamba4rec", 47),
    "echomamba4rec": ("echomamba4rec", 63 - 18),
    "sasrec": ("sasrec", 44),
    "tisasrec": ("tisasrec", 46),
}
CUT = 33


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors on a busy machine: waiting threads cost PyTorch more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def value_and_grad(config, where, gradients=True):
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


def hidden_states(config, seen):
    """Arrays by the names of the stored `hid/*`, from what our modules return."""
    if "encoder" in seen:
        found = {"LayerNorm": seen["encoder"]["norm"]}
        for i in range(config.num_layers):
            layer = seen["encoder"][f"layers_{i}"]
            found |= {f"trm_encoder.layer.{i}": layer}
            found |= {f"trm_encoder.layer.{i}.multi_head_attention": layer["attention_norm"]}
    elif config.name == "mamba4rec":
        found = {"LayerNorm": seen["embedding_norm"]}
        for i in range(config.num_layers):
            layer, theirs = seen[f"layers_{i}"], f"mamba_layers.{i}"
            found |= {f"{theirs}.mamba": layer["mixer"], f"{theirs}.LayerNorm": layer["norm"], theirs: layer}
    elif config.name == "echomamba4rec":
        found = {"LayerNorm": seen["embedding_norm"]}
        for i in range(config.num_layers):
            block, theirs = seen[f"blocks_{i}"], f"mamba_layers.{i}"
            found |= {f"{theirs}.filter_layer": block["filter"], f"{theirs}.glu": block["glu"], theirs: block}
            for j in range(config.num_layers):
                for way in ("forward", "backward"):
                    found[f"{theirs}.mamba_{way}s.{j}"] = block[f"steps_{j}"][f"{way}_mixer"]
                    found[f"{theirs}.norms_{way}.{j}"] = block[f"steps_{j}"][f"{way}_norm"]
    else:
        return _hidden_states_of_tim4rec(config, seen)
    returned = {name: module["__call__"][0] for name, module in found.items()}
    # Mixers and blocks also return the time channel and the cache.
    return {name: value[0] if isinstance(value, tuple) else value for name, value in returned.items()}


def _hidden_states_of_tim4rec(config, seen):
    found = {"in_layer_norm": seen["embedding_norm"]["__call__"][0]}
    if "time_norm" in seen:
        found["layer_norm_time"] = seen["time_norm"]["__call__"][0][:, 0]
    for i in range(config.num_layers):
        layer, theirs = seen[f"layers_{i}"], f"ssd_layers.{i}"
        for name, module in ((f"{theirs}.ssd", layer["mixer"]), (theirs, layer)):
            hidden, channel, _ = module["__call__"][0]
            found |= {name: hidden, f"{name}:0": hidden, f"{name}:1": channel}
        found[f"{theirs}.layer_norm"] = layer["norm"]["__call__"][0]
        found[f"scan{i}.dt_softplus"] = layer["mixer"]["step_size"][0]
        found[f"scan{i}.y"] = layer["mixer"]["scan"][0]
    return found


def config_of(name, arrays):
    """Our settings for a case; those that do not act here are made alike, so that cases share a compilation."""
    settings = json.loads(arrays["config_json"].item())
    config = interop.config_from_upstream(CASES[name][0], settings)
    assert config.dropout == 0
    if config.name in ("tim4rec", "ssd4rec"):
        assert config.kaiming_init == settings["is_kai_ming_init"]
    elif config.name.endswith("sasrec"):
        assert settings["hidden_act"] == "gelu" and settings["initializer_range"] == 0.02
    return sibling(config, config.name, kaiming_init=True, time_dropout=0.0)


def used(arrays):
    """Leaves out what the original stores and never calls."""
    return {key: value for key, value in arrays.items() if not ECHOMAMBA4REC_UNUSED.search(key)}


def float32_case(golden_dir, name):
    arrays = used(load_case(golden_dir, name))
    return arrays, config_of(name, arrays), section(arrays, "param")


def float64_case(golden_dir, name):
    """Stored float64 results, settings, and parameters far from their initial values, as tensors."""
    initial, arrays = section(load_case(golden_dir, name), "param"), load_case(golden_dir, f"{name}_pert_f64")
    config = dataclasses.replace(config_of(name, arrays), dtype="float64")
    move = TWINS[config.name][1]
    return used(arrays), config, used(move({key: torch.from_numpy(value) for key, value in initial.items()}))


def inputs_of(config, arrays):
    """Items, lengths, timestamps where they are read, and targets."""
    items, lengths, targets = (arrays[f"in/{name}"] for name in ("item_seq", "item_seq_len", "pos_items"))
    return items, lengths, arrays["in/timestamps"] if MODELS[config.name].uses_time else None, targets


def ours(config, arrays):
    items, lengths, timestamps, targets = inputs_of(config, arrays)
    items, lengths, targets = (jnp.asarray(a, jnp.int32) for a in (items, lengths, targets))
    return items, lengths, timestamps, targets


def tensors(config, arrays):
    return [None if a is None else torch.from_numpy(a) for a in inputs_of(config, arrays)]


def assert_hidden_states_agree(found, arrays):
    for name, value in section(arrays, "hid").items():
        assert found[name].shape == value.shape, name
        assert_close_to_maximum(np.asarray(found[name]), value, 2e-5, name)


def assert_close_to_maximum(actual, expected, fraction, name):
    limit = fraction * np.abs(expected).max()
    worst = np.abs(actual - expected).max()
    assert worst <= limit, f"{name}: off by {worst:.2e}, allowed {limit:.2e}"


def assert_outputs_agree(loss, hidden, logits, arrays):
    np.testing.assert_allclose(hidden, arrays["out/seq_output"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, arrays["out/logits"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=0, atol=1e-5)


def bears_gradient(name):
    """A key's bias adds the same to all scores of a query: the gradient is 0 but for rounding."""
    return not name.endswith("key.bias")


def without_gradient(arrays):
    return {*json.loads(arrays["config_json"].item())["_grad_none"]} & {*section(arrays, "grad")}


def assert_gradients_agree(actual, arrays):
    expected = section(arrays, "grad")
    assert set(actual) == set(expected)
    compared = [name for name in filter(bears_gradient, expected) if np.abs(expected[name]).max() >= 1e-10]
    # Time's branch is almost without gradients at initial values.
    assert len(compared) >= (38 if "layer_norm_time.weight" in expected else len([*filter(bears_gradient, expected)]))
    for name in compared:
        assert_close_to_maximum(actual[name], expected[name], 1e-4, name)
    for name in without_gradient(arrays):
        assert (actual[name] == 0).all(), name


def assert_trained_alike(losses, trained, arrays):
    np.testing.assert_allclose(losses, arrays["adam/losses"], rtol=0, atol=1e-5)
    expected = section(arrays, "final")
    assert set(trained) == set(expected)
    # Adam moves by the sign of what is rounding alone.
    names = filter(bears_gradient, expected)
    gap = np.concatenate([np.abs(trained[name] - expected[name]).ravel() for name in names])
    assert np.mean(gap <= 1e-5) >= 0.999


def assert_exact(actual, arrays, name, kinds=("out", "grad", "hid")):
    expected = {key: value for key, value in arrays.items() if key.split("/")[0] in kinds}
    assert len(expected) == CASES[name][1] - (len(section(arrays, "hid")) if "hid" not in kinds else 0)
    for key, value in expected.items():
        assert actual[key].dtype == np.float64, key
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_the_original_in_float32(golden_dir, name):
    """Outputs and hidden states at all positions, gradients by the last, five steps of Adam, and items that are cut."""
    arrays, config, given = float32_case(golden_dir, name)
    params, inputs = interop.params_from_torch(config, given), ours(config, arrays)
    loss, (hidden, logits, seen) = value_and_grad(config, "all", gradients=False)(params, *inputs)
    assert_outputs_agree(loss, hidden, logits, arrays)
    found = hidden_states(config, seen)
    assert config.name in ("tim4rec", "ssd4rec") or set(found) == set(section(arrays, "hid"))
    assert_hidden_states_agree(found, arrays)

    items, lengths, timestamps, _ = inputs
    shorter = np.flatnonzero(lengths <= CUT)
    assert len(shorter) >= 1
    timestamps = None if timestamps is None else timestamps[shorter]
    last = jax.jit(functools.partial(last_hidden, build_model(config)))
    cut = last({"params": params}, items[shorter, :CUT], lengths[shorter], timestamps)
    np.testing.assert_allclose(cut, arrays["out/seq_output"][shorter], rtol=0, atol=2e-5)

    optimizer = make_optimizer(TrainConfig(learning_rate=1e-3), total_steps=5)
    update, state, losses = jax.jit(optimizer.update), optimizer.init(params), []
    for step in range(6):
        (loss, (hidden, logits, _)), gradients = value_and_grad(config, "last")(params, *inputs)
        losses.append(loss)
        if step == 0:
            assert_outputs_agree(loss, hidden, logits, arrays)
            assert_gradients_agree(interop.params_to_torch(config, gradients), arrays)
        if step < 5:
            updates, state = update(gradients, state, params)
            params = jax.tree.map(np.add, params, updates)
    assert_trained_alike(losses, interop.params_to_torch(config, params), arrays)


@pytest.mark.parametrize("where", ["all", "last"])
@pytest.mark.parametrize("name", CASES)
def test_the_original_in_float64_with_perturbed_parameters(golden_dir, name, where, x64):
    arrays, config, moved = float64_case(golden_dir, name)
    params, run = interop.params_from_torch(config, moved), value_and_grad(config, where)
    (loss, (hidden, logits, seen)), gradients = run(params, *ours(config, arrays))
    actual = {"out/seq_output": hidden, "out/logits": logits, "out/loss": loss}
    actual |= {f"grad/{key}": value for key, value in interop.params_to_torch(config, gradients).items()}
    if where == "all":
        actual |= {f"hid/{key}": value for key, value in hidden_states(config, seen).items()}
    assert_exact(actual, arrays, name, ("out", "grad", "hid") if where == "all" else ("out", "grad"))


@pytest.mark.parametrize("name", CASES)
def test_the_twin_agrees_with_the_original_in_float32(golden_dir, name):
    arrays, config, given = float32_case(golden_dir, name)
    model = TWINS[config.name][0](config)
    assert list(model.state_dict()) == list(given)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in given.items()})
    items, lengths, timestamps, targets = tensors(config, arrays)
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    seen = record_hidden_states(model)
    with torch.no_grad():
        output = model(items, lengths, timestamps)
        logits = model.logits(output)
    assert_hidden_states_agree(dict(seen), arrays)
    for step in range(6):
        optimiser.zero_grad()
        loss = model.loss(items, lengths, targets, timestamps)
        losses.append(loss.item())
        if step < 5:
            loss.backward()
        if step == 0:
            assert_outputs_agree(losses[0], output.numpy(), logits.numpy(), arrays)
            assert_gradients_agree(gradients_of(model, without_gradient(arrays)), arrays)
        if step < 5:
            optimiser.step()
    assert_trained_alike(losses, {key: value.numpy() for key, value in model.state_dict().items()}, arrays)


def gradients_of(model, without):
    """Gradients of a twin by name, 0 for those parameters that have none, which must be `without`."""
    named = dict(model.named_parameters())
    assert {name for name, parameter in named.items() if parameter.grad is None} == set(without)
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for name, p in named.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_twin_agrees_with_the_original_in_float64(golden_dir, name):
    arrays, config, moved = float64_case(golden_dir, name)
    model = TWINS[config.name][0](config)
    model.load_state_dict(moved)
    items, lengths, timestamps, targets = tensors(config, arrays)
    seen = record_hidden_states(model)
    output = model(items, lengths, timestamps)
    logits = model.logits(output)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    actual = {"out/seq_output": output, "out/logits": logits, "out/loss": loss}
    actual = {key: value.detach().numpy() for key, value in actual.items()}
    actual |= {f"grad/{key}": value for key, value in gradients_of(model, without_gradient(arrays)).items()}
    assert_exact(actual | {f"hid/{key}": value for key, value in seen.items()}, arrays, name)


def test_only_the_uncalled_attention_block_is_left_out(golden_dir):
    names = section(load_case(golden_dir, "echomamba4rec"), "param")
    left_out = {name for name in names if ECHOMAMBA4REC_UNUSED.match(name)}
    assert left_out == {name for name in names if "multi_query_transformer_block" in name}
    assert len(left_out) == 18


# Other settings of each model. The odd length has no frequency of its own at the end.
SETTINGS = (
    ("tim4rec", {"d_state": 4}),
    (
        "tim4rec",
        {
            "time_gate_per_position": True,
            "head_dim": 4,
            "mask_padded_time": True,
            "log_time": True,
            "use_ffn": False,
            "d_state": 4,
        },
    ),
    ("tim4rec", {"num_layers": 1, "log_time": True, "d_conv": 5, "d_state": 6}),
    ("ssd4rec", {"num_layers": 3, "use_ffn": False, "head_dim": 16, "chunk_size": 64, "d_state": 4}),
    ("ssd4rec", {"num_layers": 1, "head_dim": 2, "expand": 1, "d_state": 4}),
    ("mamba4rec", {"num_layers": 1, "d_conv": 2}),
    ("mamba4rec", {"num_layers": 3, "d_model": 40}),
    ("echomamba4rec", {"num_layers": 2}),
    ("echomamba4rec", {"num_layers": 1, "max_len": 13, "d_model": 40}),
    ("sasrec", {"num_layers": 1, "attention_heads": 1}),
    ("sasrec", {"num_layers": 3, "d_model": 32}),
    ("tisasrec", {"num_layers": 1, "attention_heads": 1, "time_span": 6}),
    ("tisasrec", {"num_layers": 3, "d_model": 32}),
)


def test_the_settings_cover_both_activations():
    found = {small(name, **changes).activation for name, changes in SETTINGS if name in ("tim4rec", "ssd4rec")}
    assert found == {"silu", "hard_swish"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*settings, marks=[pytest.mark.exhaustive] * (i > 0)) for i, settings in enumerate(SETTINGS)],
)
def test_the_twin_on_other_settings(name, changes, x64):
    """Outputs and every gradient, in float64."""
    off = {"dropout": 0.0, "time_dropout": 0.0, "attention_dropout": 0.0}
    config, (Twin, move) = small(name, dtype="float64", **off, **changes), TWINS[name]
    twin = Twin(config)
    torch.manual_seed(1)
    twin.load_state_dict(move(Twin(dataclasses.replace(config, dtype="float32")).state_dict()))
    lengths, targets = np.array([12, 1, 3, 10]), np.array([3, 1, 22, 7])
    items, timestamps = rows(config.max_len, lengths)
    timestamps = (timestamps + 978_000_000) * (items != 0)
    hidden = twin(*(torch.from_numpy(a.astype(np.int64)) for a in (items, lengths, timestamps)))
    loss = torch.nn.functional.cross_entropy(twin.logits(hidden), torch.from_numpy(targets))
    loss.backward()

    params = interop.params_from_torch(config, twin.state_dict())
    given = params, items, lengths, timestamps
    (our_loss, (last, *_)), gradients = value_and_grad(config, "last")(*given, jnp.asarray(targets))
    full, expected = program(config, "all")(*given), hidden.detach().numpy()
    assert full.shape == (4, config.max_len, config.d_model)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(last, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(full[np.arange(4), lengths - 1], last, rtol=0, atol=1e-12)
    np.testing.assert_allclose(our_loss, loss.item(), rtol=0, atol=1e-10)
    actual, still = interop.params_to_torch(config, gradients), []
    for key, parameter in twin.named_parameters():
        gradient = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).numpy()
        np.testing.assert_allclose(actual.pop(key), gradient, rtol=0, atol=1e-10, err_msg=key)
        still += [key] * bool(np.abs(gradient).max() <= 1e-6 and bears_gradient(key))
    assert not actual
    # Nothing reads the last layer's gate and norm of the time channel.
    assert all("time_gate_residual" in key or "time_layer_norm" in key for key in still) and len(still) <= 4, still


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("sasrec", 1),
        ("sasrec", 3),
        ("tisasrec", 2),
        ("mamba4rec", 1),
        ("mamba4rec", 3),
        ("echomamba4rec", 1),
        ("echomamba4rec", 2),
    ],
)
def test_state_dicts_round_trip(name, layers):
    """To our tree and back changes nothing; the tree is that of a fresh model."""
    config, generator = small(name, num_layers=layers), torch.Generator().manual_seed(0)
    twin = TWINS[name][0](config).state_dict()
    given = {key: torch.randn(value.shape, generator=generator) for key, value in twin.items()}
    params = interop.params_from_torch(config, given)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes_of(config)
    )
    back = interop.params_to_torch(config, params)
    assert set(back) == set(given)
    for key, value in given.items():
        np.testing.assert_array_equal(back[key], value.numpy(), err_msg=key)


def state_dict_of(name):
    config = small(name, num_layers=1)
    return config, {key: value.numpy() for key, value in TWINS[name][0](config).state_dict().items()}


@pytest.mark.parametrize("name", ["sasrec", "mamba4rec", "echomamba4rec"])
def test_state_dicts_that_do_not_fit(name):
    config, given = state_dict_of(name)
    missing = "mamba_layers.0.mamba_backwards.0.D" if name == "echomamba4rec" else "LayerNorm.bias"
    parts, taken = [f"missing: {missing}"], given.pop(missing)
    if name != "echomamba4rec":
        given["time"] = taken
        parts.append("unexpected: time")
    if name == "mamba4rec":
        key = "mamba_layers.0.mamba.A_log"
        given[key] = given[key].T
        parts.append(f"{key}: (8, 32), expected (32, 8)")
    with pytest.raises(ValueError) as raised:
        interop.params_from_torch(config, given)
    assert all(part in str(raised.value) for part in parts)
