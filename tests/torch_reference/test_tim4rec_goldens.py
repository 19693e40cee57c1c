"""The PyTorch model against numbers printed by the original programs, in float32 and in float64."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models.ssd import ssd_chunked, ssd_sequential
from experiments.benchmarks.torch_models.tim4rec import TiM4Rec
from tests.models.settings import settings_of
from tests.torch_reference.perturbed import perturbed

CASES = ("tim4rec_small", "tim4rec_beauty", "tim4rec_notime", "tim4rec_ml1m", "ssd4rec")
ADAM_STEPS = 5
ADAM_LEARNING_RATE = 1e-3


def load_case(golden_dir, name):
    """Returns a case's arrays by key, its hidden states and trained parameters included where they lie apart."""
    arrays = {}
    for suffix in ("", "_hid", "_hid2", "_final"):
        path = golden_dir / f"{name}{suffix}.npz"
        if suffix == "" or path.exists():
            with np.load(path) as stored:
                arrays |= {key: stored[key] for key in stored.files}
    return arrays


def section(arrays, prefix):
    """Returns the arrays under `prefix/`, without it."""
    return {key.removeprefix(prefix + "/"): value for key, value in arrays.items() if key.startswith(prefix + "/")}


def config_of(arrays):
    """Returns our settings for those of the original program."""
    settings = json.loads(arrays["config_json"].item())
    return settings_of(
        "tim4rec" if settings.get("is_time", False) else "ssd4rec",
        vocab_size=settings["n_items"],
        max_len=settings["MAX_ITEM_LIST_LENGTH"],
        d_model=settings["hidden_size"],
        num_layers=settings["num_layers"],
        d_state=settings["d_state"],
        d_conv=settings["d_conv"],
        expand=settings["expand"],
        head_dim=settings["head_dim"],
        chunk_size=settings["chunk_size"],
        dropout=settings["dropout_prob"],
        time_dropout=settings.get("time_drop_out", 0.0),
        norm_eps=settings["norm_eps"],
        use_ffn=settings["is_ffn"],
        time_gate_per_position=settings.get("p2p_residual", False),
        kaiming_init=settings["is_kai_ming_init"],
    )


def inputs_of(arrays):
    """Returns (item_seq, lengths, targets, timestamps or None) as tensors."""
    stored = {key: torch.from_numpy(value) for key, value in section(arrays, "in").items()}
    return stored["item_seq"], stored["item_seq_len"], stored["pos_items"], stored.get("timestamps")


def record_hidden_states(model):
    """Returns a dict that a forward pass fills with every module output, by the names of the stored `hid/*`."""
    seen = {}

    def note(name, value):
        if value is not None:
            seen[name] = value.detach().numpy()

    def hook(name, module, arguments, output):
        if name.endswith(".scan"):
            layer = name.split(".")[1]
            note(f"scan{layer}.dt_softplus", arguments[1])
            note(f"scan{layer}.y", output)
        elif isinstance(output, tuple):
            note(name, output[0])
            note(f"{name}:0", output[0])
            note(f"{name}:1", output[1])
        else:
            note(name, output)

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(
                lambda module, arguments, output, name=name: hook(name, module, arguments, output)
            )
    return seen


def assert_close_to_maximum(actual, expected, fraction, name):
    limit = fraction * np.abs(expected).max()
    worst = np.abs(actual - expected).max()
    assert worst <= limit, f"{name}: off by {worst:.2e}, allowed {limit:.2e}"


@pytest.fixture(params=CASES)
def case(request, golden_dir):
    """Arrays of a case and the model with its parameters."""
    arrays = load_case(golden_dir, request.param)
    model = TiM4Rec(config_of(arrays))
    parameters = {key: torch.from_numpy(value) for key, value in section(arrays, "param").items()}
    assert list(parameters) == list(model.state_dict())
    model.load_state_dict(parameters)
    return arrays, model


def test_outputs_and_hidden_states_agree(case):
    arrays, model = case
    items, lengths, targets, timestamps = inputs_of(arrays)
    seen = record_hidden_states(model)
    with torch.no_grad():
        output = model(items, lengths, timestamps)
        logits = model.logits(output)
    expected = section(arrays, "hid")
    assert len(expected) >= 11
    for name, value in expected.items():
        assert seen[name].shape == value.shape, name
        assert_close_to_maximum(seen[name], value, 2e-5, name)
    np.testing.assert_allclose(output.numpy(), arrays["out/seq_output"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits.numpy(), arrays["out/logits"], rtol=0, atol=5e-5)
    with torch.no_grad():
        loss = model.loss(items, lengths, targets, timestamps).item()
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=0, atol=1e-5)


def test_every_gradient_agrees(case):
    arrays, model = case
    items, lengths, targets, timestamps = inputs_of(arrays)
    model.loss(items, lengths, targets, timestamps).backward()
    expected = section(arrays, "grad")
    without = set(json.loads(arrays["config_json"].item())["_grad_none"])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(gradients) == set(expected)
    assert {name for name, gradient in gradients.items() if gradient is None} == without
    compared = [name for name in expected if np.abs(expected[name]).max() >= 1e-10]
    assert len(compared) >= 38
    for name in compared:
        assert_close_to_maximum(gradients[name].numpy(), expected[name], 1e-4, name)


def test_five_adam_steps_agree(case):
    arrays, model = case
    items, lengths, targets, timestamps = inputs_of(arrays)
    optimiser = torch.optim.Adam(model.parameters(), lr=ADAM_LEARNING_RATE)
    losses = []
    for _ in range(ADAM_STEPS):
        optimiser.zero_grad()
        loss = model.loss(items, lengths, targets, timestamps)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model.loss(items, lengths, targets, timestamps).item())
    np.testing.assert_allclose(losses, arrays["adam/losses"], rtol=0, atol=1e-5)
    trained = model.state_dict()
    expected = section(arrays, "final")
    assert set(trained) == set(expected)
    gap = np.concatenate([np.abs(trained[name].numpy() - expected[name]).ravel() for name in expected])
    assert np.mean(gap <= 1e-5) >= 0.999


@pytest.mark.parametrize("name", CASES)
def test_perturbed_parameters_agree_in_float64(golden_dir, name):
    initial = section(load_case(golden_dir, name), "param")
    arrays = load_case(golden_dir, f"{name}_pert_f64")
    model = TiM4Rec(dataclasses.replace(config_of(arrays), dtype="float64"))
    model.load_state_dict(perturbed({key: torch.from_numpy(value) for key, value in initial.items()}))
    items, lengths, targets, timestamps = inputs_of(arrays)
    seen = record_hidden_states(model)
    output = model(items, lengths, timestamps)
    actual = {f"hid/{key}": value for key, value in seen.items()}
    logits = model.logits(output)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    results = {"out/seq_output": output, "out/logits": logits, "out/loss": loss}
    actual |= {key: value.detach().numpy() for key, value in results.items()}
    without = set(json.loads(arrays["config_json"].item())["_grad_none"])
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (key in without), key
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual[f"grad/{key}"] = gradient.detach().numpy()
    expected = {key: value for key, value in arrays.items() if key.split("/")[0] in ("hid", "out", "grad")}
    assert len(expected) >= 11 + 3 + 39
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("length", [1, 31, 32, 50])
@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_operator_agrees_in_float64(golden_dir, length, form):
    with np.load(golden_dir / f"ssd_core_L{length}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    chunk_size = json.loads(arrays["config_json"].item())["chunk_size"]
    leaves = {key: torch.from_numpy(value).double() for key, value in section(arrays, "in").items()}
    cotangents = {"y": leaves.pop("gy"), "final_state": leaves.pop("gfinal")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    delta = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    operator = ssd_sequential if form == "sequential" else lambda *a, **k: ssd_chunked(*a, **k, chunk_size=chunk_size)
    y, final_state = operator(leaves["x"], delta, leaves["A"], leaves["B"], leaves["C"], D=leaves["D"])
    outputs = {"y": y, "final_state": final_state}
    for name, stored_gradients in [("y", "seq64/grad_y"), ("final_state", "seq64/grad_final")]:
        np.testing.assert_allclose(outputs[name].detach().numpy(), arrays[f"seq64/{name}"], rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad(
            outputs[name], list(leaves.values()), cotangents[name], retain_graph=True, allow_unused=True
        )
        for leaf, gradient in zip(leaves, gradients, strict=True):
            expected = arrays[f"{stored_gradients}/{leaf}"]
            actual = np.zeros_like(expected) if gradient is None else gradient.numpy()
            np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10, err_msg=f"{name} by {leaf}")
