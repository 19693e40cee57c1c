"""The JAX model against the same mathematics in PyTorch, in float64 with perturbed parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models import tim4rec as pytorch
from tests.models.calls import call
from tests.models.settings import sibling
from tests.torch_reference.perturbed import perturbed
from tim4rec_jax import build_model, interop
from tim4rec_jax.models import TiM4RecConfig
from tim4rec_jax.training.losses import cross_entropy

BASE = TiM4RecConfig(
    vocab_size=23, max_len=12, d_model=16, head_dim=8, d_state=4, chunk_size=5, dropout=0.0, time_dropout=0.0,
    norm_eps=1e-5, dtype="float64",
)  # fmt: skip
CONFIGS = {
    "default": BASE,
    "gate per position, silu, masked log gaps, no feed-forward": dataclasses.replace(
        BASE, time_gate_per_position=True, head_dim=4, mask_padded_time=True, log_time=True, use_ffn=False
    ),
    "one layer, log gaps, a wide filter": dataclasses.replace(BASE, num_layers=1, log_time=True, d_conv=5, d_state=6),
    "time off, three layers, no feed-forward": sibling(
        BASE, "ssd4rec", num_layers=3, use_ffn=False, head_dim=16, chunk_size=64
    ),
    "time off, one layer, silu, masked gaps": sibling(
        BASE, "ssd4rec", num_layers=1, head_dim=2, expand=1, mask_padded_time=True
    ),
}
LENGTHS = np.array([12, 1, 3, 10])


def batch(config):
    rng = np.random.default_rng(7)
    inside = np.arange(config.max_len) < LENGTHS[:, None]
    items = rng.integers(1, config.vocab_size, inside.shape) * inside
    timestamps = (978_000_000 + np.cumsum(rng.integers(0, 10_000, inside.shape), axis=1)) * inside
    return items, timestamps, rng.integers(1, config.vocab_size, len(LENGTHS))


def test_the_settings_cover_both_activations():
    assert {config.activation for config in CONFIGS.values()} == {"silu", "hard_swish"}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[pytest.mark.exhaustive] * (name != "default"))
        for name, config in CONFIGS.items()
    ],
)
def test_outputs_and_gradients_agree(config, x64):
    twin = pytorch.TiM4Rec(config)
    torch.manual_seed(1)
    initial = pytorch.TiM4Rec(dataclasses.replace(config, dtype="float32")).state_dict()
    twin.load_state_dict(perturbed(initial))
    items, timestamps, targets = batch(config)
    given = [torch.from_numpy(a) for a in (items, LENGTHS, timestamps)]
    hidden = twin(*given)
    loss = torch.nn.functional.cross_entropy(twin.logits(hidden), torch.from_numpy(targets))
    loss.backward()

    model = build_model(config)

    @jax.jit
    def run(params):
        def value(params):
            last = call(model, params, items, LENGTHS, timestamps, "last")
            scores = model.apply({"params": params}, last, method="score")
            return cross_entropy(scores, jnp.asarray(targets)).mean(), last

        return jax.value_and_grad(value, has_aux=True)(params), call(model, params, items, LENGTHS, timestamps)

    params = interop.params_from_torch(config, twin.state_dict())
    ((our_loss, last), gradients), full = run(params)
    expected = hidden.detach().numpy()
    assert full.shape == (len(LENGTHS), config.max_len, config.d_model)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(last, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(full[np.arange(len(LENGTHS)), LENGTHS - 1], expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(our_loss, loss.item(), rtol=0, atol=1e-10)
    actual, moved = interop.params_to_torch(config, gradients), 0
    for name, parameter in twin.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        np.testing.assert_allclose(actual.pop(name), gradient.numpy(), rtol=0, atol=1e-10, err_msg=name)
        moved += float(gradient.abs().max()) > 1e-6
    assert not actual
    # All but the last layer's gate and norm of the time channel, four parameters at most.
    assert moved >= len(list(twin.parameters())) - 4
