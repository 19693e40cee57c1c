"""What SASRec and TiSASRec are both held to, and the inputs of their tests."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models import sasrec as pytorch
from experiments.benchmarks.torch_models.tisasrec import TiSASRec as PyTorchTiSASRec
from tests.models.calls import call, program
from tests.models.settings import settings_of, sibling
from tests.torch_reference.test_tim4rec_goldens import (
    assert_close_to_maximum,
    load_case,
    record_hidden_states,
    section,
)
from tim4rec_jax import build_model, interop
from tim4rec_jax.config import TrainConfig
from tim4rec_jax.models import SASRecConfig, init_params
from tim4rec_jax.training.losses import cross_entropy
from tim4rec_jax.training.step import make_optimizer

SMALL = SASRecConfig(
    vocab_size=23, max_len=12, d_model=16, attention_heads=4, inner_size=24, dropout=0.3,
    attention_dropout=0.3, norm_eps=1e-5,
)  # fmt: skip
LENGTHS = np.array([12, 1, 3, 8])
TWINS = {"sasrec": pytorch.SASRec, "tisasrec": PyTorchTiSASRec}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors on a busy machine: waiting threads cost PyTorch more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def value_and_grad(config):
    """Jitted (params, inputs) -> (loss, (hidden at the last items, logits)), gradients."""
    model = build_model(config)

    def loss(params, items, lengths, timestamps, targets):
        hidden = call(model, params, items, lengths, timestamps, "last")
        logits = model.apply({"params": params}, hidden, method="score")
        return cross_entropy(logits, targets).mean(), (hidden, logits)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def hidden_states(config):
    """Jitted (params, inputs) -> arrays by the names of the stored `hid/*`, from what our modules return."""
    model = build_model(config)

    @jax.jit
    def run(params, items, lengths, timestamps):
        _, seen = call(model, params, items, lengths, timestamps, capture_intermediates=True)
        seen = seen["intermediates"]["encoder"]
        found = {"LayerNorm": seen["norm"]["__call__"][0]}
        for i in range(config.num_layers):
            layer, theirs = seen[f"layers_{i}"], f"trm_encoder.layer.{i}"
            found[theirs] = layer["__call__"][0]
            found[f"{theirs}.multi_head_attention"] = layer["attention_norm"]["__call__"][0]
        return found

    return run


def config_of(name, arrays):
    settings = json.loads(arrays["config_json"].item())
    assert settings["hidden_act"] == "gelu" and settings["initializer_range"] == 0.02
    return settings_of(
        name, vocab_size=settings["n_items"], max_len=settings["MAX_ITEM_LIST_LENGTH"],
        d_model=settings["hidden_size"], num_layers=settings["n_layers"], attention_heads=settings["n_heads"],
        inner_size=settings["inner_size"], dropout=settings["hidden_dropout_prob"],
        attention_dropout=settings["attn_dropout_prob"], norm_eps=settings["layer_norm_eps"],
        time_span=settings.get("time_span", 256),
    )  # fmt: skip


def inputs_of(arrays):
    items, lengths, targets = (
        jnp.asarray(arrays[f"in/{name}"], jnp.int32) for name in ("item_seq", "item_seq_len", "pos_items")
    )
    timestamps = jnp.asarray(arrays["in/timestamps"]) if "in/timestamps" in arrays else None
    return items, lengths, timestamps, targets


def bears_gradient(name):
    """A key's bias adds the same to all scores of a query: the gradient is 0 but for rounding."""
    return not name.endswith("key.bias")


def assert_trained_alike(losses, trained, arrays):
    np.testing.assert_allclose(losses, arrays["adam/losses"], rtol=0, atol=1e-5)
    expected = section(arrays, "final")
    assert set(trained) == set(expected)
    # Adam moves by the sign of what is rounding alone.
    names = filter(bears_gradient, expected)
    gap = np.concatenate([np.abs(trained[name] - expected[name]).ravel() for name in names])
    assert np.mean(gap <= 1e-5) >= 0.999


def check_outputs_gradients_and_training(golden_dir, name):
    """Float32: every output and gradient, and five steps of Adam."""
    arrays = load_case(golden_dir, name)
    config = config_of(name, arrays)
    params, inputs = interop.params_from_torch(config, section(arrays, "param")), inputs_of(arrays)
    found, expected = hidden_states(config)(params, *inputs[:3]), section(arrays, "hid")
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
            actual, expected = interop.params_to_torch(config, gradients), section(arrays, "grad")
            assert set(actual) == set(expected)
            for key in filter(bears_gradient, expected):
                assert_close_to_maximum(actual[key], expected[key], 1e-4, key)
        if step < 5:
            updates, state = update(gradients, state, params)
            params = jax.tree.map(np.add, params, updates)
    assert_trained_alike(losses, interop.params_to_torch(config, params), arrays)


def check_perturbed_parameters(golden_dir, name):
    """Float64: outputs, hidden states and gradients, far from the initial values."""
    initial, arrays = section(load_case(golden_dir, name), "param"), load_case(golden_dir, f"{name}_pert_f64")
    config = dataclasses.replace(config_of(name, arrays), dtype="float64")
    moved = pytorch.perturbed({key: torch.from_numpy(value) for key, value in initial.items()})
    params = interop.params_from_torch(config, moved)
    inputs = inputs_of(arrays)
    (loss, (hidden, logits)), gradients = value_and_grad(config)(params, *inputs)
    actual = {"out/seq_output": hidden, "out/logits": logits, "out/loss": loss}
    actual |= {f"grad/{key}": value for key, value in interop.params_to_torch(config, gradients).items()}
    actual |= {f"hid/{key}": value for key, value in hidden_states(config)(params, *inputs[:3]).items()}
    expected = {key: value for key, value in arrays.items() if key.split("/")[0] in ("out", "grad", "hid")}
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == np.float64, key
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=1e-10, err_msg=key)


def _tensors(arrays):
    items, lengths, targets = (torch.from_numpy(arrays[f"in/{k}"]) for k in ("item_seq", "item_seq_len", "pos_items"))
    timestamps = torch.from_numpy(arrays["in/timestamps"]) if "in/timestamps" in arrays else None
    return items, lengths, targets, timestamps


def check_the_twin(golden_dir, name):
    """The PyTorch model gives the stored numbers too, in float32 with training and in float64."""
    arrays = load_case(golden_dir, name)
    config = config_of(name, arrays)
    given = {key: torch.from_numpy(value) for key, value in section(arrays, "param").items()}
    model = TWINS[name](config)
    assert list(model.state_dict()) == list(given)
    model.load_state_dict(given)
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(6):
        optimiser.zero_grad()
        loss = model.loss(*_tensors(arrays))
        losses.append(loss.item())
        if len(losses) < 6:
            loss.backward()
            optimiser.step()
    assert_trained_alike(losses, {key: value.numpy() for key, value in model.state_dict().items()}, arrays)

    arrays = load_case(golden_dir, f"{name}_pert_f64")
    model = TWINS[name](dataclasses.replace(config, dtype="float64"))
    model.load_state_dict(pytorch.perturbed(given))
    items, lengths, targets, timestamps = _tensors(arrays)
    seen = record_hidden_states(model)
    output = model(items, lengths, timestamps)
    logits = model.logits(output)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    actual = {"out/seq_output": output, "out/logits": logits, "out/loss": loss}
    actual = {key: value.detach().numpy() for key, value in actual.items()}
    actual |= {f"grad/{key}": parameter.grad.numpy() for key, parameter in model.named_parameters()}
    actual |= {f"hid/{key}": value for key, value in seen.items()}
    for key, value in arrays.items():
        if key.split("/")[0] in ("out", "grad", "hid"):
            np.testing.assert_allclose(actual[key], value, rtol=0, atol=1e-10, err_msg=key)


def batch(config=SMALL, seed=0):
    rng = np.random.default_rng(seed)
    inside = np.arange(config.max_len) < LENGTHS[:, None]
    items = rng.integers(1, config.vocab_size, inside.shape) * inside
    gaps = rng.choice([0, 1, 5, 20, 400], inside.shape)
    return items, ((1000 + np.cumsum(gaps, axis=1)) * inside).astype(np.int32)


def check_twin_on_settings(config):
    """Outputs and every gradient, in float64."""
    config = sibling(config, config.name, dropout=0.0, attention_dropout=0.0, dtype="float64")
    twin = TWINS[config.name](config)
    torch.manual_seed(1)
    initial = TWINS[config.name](dataclasses.replace(config, dtype="float32")).state_dict()
    twin.load_state_dict(pytorch.perturbed(initial))
    items, timestamps = batch(config)
    targets = np.array([3, 1, 22, 7])
    hidden = twin(*(torch.from_numpy(a) for a in (items, LENGTHS, timestamps)))
    loss = torch.nn.functional.cross_entropy(twin.logits(hidden), torch.from_numpy(targets))
    loss.backward()
    params = interop.params_from_torch(config, twin.state_dict())
    run = value_and_grad(config)
    (our_loss, (last, _)), gradients = run(params, items, LENGTHS, timestamps, jnp.asarray(targets))
    full = program(config, "all")(params, items, LENGTHS, timestamps)
    np.testing.assert_allclose(last, hidden.detach().numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(full[np.arange(4), LENGTHS - 1], last, rtol=0, atol=1e-12)
    np.testing.assert_allclose(our_loss, loss.item(), rtol=0, atol=1e-10)
    actual = interop.params_to_torch(config, gradients)
    for name, parameter in twin.named_parameters():
        gradient = parameter.grad.numpy()
        np.testing.assert_allclose(actual.pop(name), gradient, rtol=0, atol=1e-10, err_msg=name)
        assert np.abs(gradient).max() > 1e-6 or not bears_gradient(name), name
    assert not actual


def check_round_trip(config):
    """To our tree and back changes nothing; the tree is that of a fresh model."""
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in TWINS[config.name](config).state_dict().items()
    }
    params = interop.params_from_torch(config, given)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes_of(config)
    )
    back = interop.params_to_torch(config, params)
    assert set(back) == set(given)
    for name, value in given.items():
        np.testing.assert_array_equal(back[name], value.numpy(), err_msg=name)


def init(config, key):
    return init_params(build_model(config), key)


def shapes_of(config):
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def spread(config, seed=0):
    """Parameters so far from their initial values that every part of the model has its say."""
    leaves, tree = jax.tree.flatten(shapes_of(config))
    rng = np.random.default_rng(seed)
    draws = [rng.normal(size=leaf.shape) * (0.4 if leaf.ndim > 1 else 1.0) for leaf in leaves]
    return jax.tree.unflatten(tree, [draw.astype(np.float32) for draw in draws])


def check_causality(config):
    """Items (and times) of the future change nothing before them, at any length."""
    assert build_model(config).causal
    run, params = program(config, "all"), spread(config)
    items, timestamps = batch(config)
    full = np.full(4, 12)
    before = np.asarray(run(params, items, full, timestamps))
    for start in (1, 7, 11):
        changed, later = items.copy(), timestamps.copy()
        changed[:, start:] = 1 + (changed[:, start:] + 5) % 22
        later[:, start:] += 3
        after = np.asarray(run(params, changed, full, later))
        np.testing.assert_array_equal(after[:, :start], before[:, :start])
        assert (np.abs(after[:, start:] - before[:, start:]).max(axis=(1, 2)) > 1e-2).all()
    np.testing.assert_array_equal(run(params, items, LENGTHS, timestamps), before)


def check_padding_and_batch(config):
    """The last state does not depend on what lies beyond the length, on a shorter cut, or on the rows beside it."""
    run, params = program(config, "last"), spread(config)
    items, timestamps = batch(config)
    before = np.asarray(run(params, items, LENGTHS, timestamps))
    full = np.asarray(program(config, "all")(params, items, LENGTHS, timestamps))
    np.testing.assert_allclose(full[np.arange(4), LENGTHS - 1], before, rtol=0, atol=1e-5)
    padded = np.arange(12) >= LENGTHS[:, None]
    junk = np.where(padded, 9, items), LENGTHS, np.where(padded, 1003, timestamps)
    np.testing.assert_array_equal(run(params, *junk), before)
    order = np.array([3, 1, 2])
    cut = run(params, items[order, :8], LENGTHS[order], timestamps[order])
    np.testing.assert_allclose(cut, before[order], rtol=0, atol=1e-5)
    empty = np.asarray(run(params, np.zeros_like(items), np.ones(4, int), np.zeros_like(timestamps)))
    assert np.isfinite(empty).all()


def check_dropout(config):
    """Masks follow the example, the positions and the seed, not the layout of the batch."""
    run, params = program(config, "last", deterministic=False), spread(config)
    items, timestamps = batch(config)
    ids = np.arange(4)
    before = np.asarray(run(params, items, LENGTHS, timestamps, ids))
    order = np.array([3, 1, 2])
    cut = run(params, items[order, :8], LENGTHS[order], timestamps[order], ids[order])
    np.testing.assert_allclose(cut, before[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(params, items, LENGTHS, timestamps, ids), before)
    assert (np.abs(run(params, items, LENGTHS, timestamps, ids + 4) - before).max(axis=1) > 1e-2).all()
    assert (np.abs(run(params, items, LENGTHS, timestamps, ids, 1) - before).max(axis=1) > 1e-2).all()
    full = np.asarray(program(config, "all", deterministic=False)(params, items, LENGTHS, timestamps))
    np.testing.assert_allclose(full[ids, LENGTHS - 1], before, rtol=1e-5, atol=1e-5)


def check_initial_values(config):
    """Matrices and tables N(0, 0.02), padding's row included; biases 0; norms 1 and 0."""
    params = jax.jit(functools.partial(init, config))(jax.random.key(0))
    draws = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        kind = path[-1].key
        if kind in ("kernel", "embedding"):
            assert float(leaf.std()) == pytest.approx(0.02, rel=4 / math.sqrt(2 * leaf.size)), path
            assert abs(float(leaf.mean())) < 4.5 * 0.02 / math.sqrt(leaf.size), path
            draws.append(leaf.ravel()[:8])
        else:
            assert (leaf == (1 if kind == "scale" else 0)).all(), path
    assert len(np.unique(np.concatenate(draws))) == 8 * len(draws)
    assert float(jnp.abs(params["item_embedding"]["embedding"][0]).min()) > 0


def check_bfloat16(config):
    """Parameters, softmax and norms stay in float32, and the result is close."""
    low = dataclasses.replace(config, dtype="bfloat16")
    params = jax.jit(functools.partial(init, config))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(low))} == {jnp.dtype("float32")}
    items, timestamps = batch(config)
    given = items, LENGTHS, timestamps
    traced = program(low, "all").trace(params, *given)
    sensitive = [line for line in str(traced.jaxpr).splitlines() if " = exp " in line or " = rsqrt " in line]
    assert len(sensitive) == 2 + 5
    assert all(":f32[" in line and "bf16" not in line for line in sensitive)
    full = program(low, "all")(params, *given)
    assert full.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(full, np.float32), program(config, "all")(params, *given), rtol=0, atol=0.1)
    scores = build_model(low).apply({"params": params}, full[:, 0], method="score")
    assert scores.dtype == jnp.float32
