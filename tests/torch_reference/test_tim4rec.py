"""The PyTorch model by itself: chunked against sequential, switches, initial values, dropout, perturbation."""

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models.ssd import ssd_chunked, ssd_sequential
from experiments.benchmarks.torch_models.tim4rec import TiM4Rec
from tests.models.settings import sibling
from tests.torch_reference.perturbed import perturbed
from tim4rec_jax.models import TiM4RecConfig

SMALL = TiM4RecConfig(vocab_size=40, max_len=12, d_model=16, head_dim=8, d_state=4, chunk_size=5, dropout=0.0)


def batch(config, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([config.max_len, 1, 3, config.max_len - 2])[:rows]
    inside = torch.arange(config.max_len) < lengths[:, None]
    items = torch.randint(1, config.vocab_size, inside.shape, generator=generator) * inside
    gaps = torch.randint(0, 10_000, inside.shape, generator=generator)
    return items, lengths, (978_000_000 + gaps.cumsum(1)) * inside


@pytest.mark.parametrize("length", [1, 7, 8, 19])
@pytest.mark.parametrize("groups", [1, 2])
def test_chunked_equals_sequential(length, groups):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, B, C = normal(2, length, 4, 3), normal(2, length, groups, 5), normal(2, length, groups, 5)
    delta, A, D, state = normal(2, length, 4).abs(), -normal(4).exp(), normal(4), normal(2, 4, 3, 5)
    leaves = [x, delta, A, B, C, D, state]
    for leaf in leaves:
        leaf.requires_grad_()
    weight = normal(2, length, 4, 3)
    results = []
    for operator, options in [(ssd_sequential, {}), (ssd_chunked, {"chunk_size": 8})]:
        y, final = operator(x, delta, A, B, C, D=D, initial_state=state, **options)
        gradients = torch.autograd.grad((y * weight).sum() + final.square().sum(), leaves)
        results.append([y.detach(), final.detach(), *gradients])
    for sequential, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, sequential, rtol=1e-11, atol=1e-11)


def test_strong_decay_gives_finite_gradients():
    x, B, C = torch.ones(1, 16, 1, 2), torch.ones(1, 16, 1, 3), torch.ones(1, 16, 1, 3)
    delta = torch.full((1, 16, 1), 50.0, requires_grad=True)
    y, _ = ssd_chunked(x, delta, torch.tensor([-16.0]), B, C, chunk_size=16)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(delta.grad).all()


def test_parameter_count_of_the_kuairand_setting():
    model = TiM4Rec(TiM4RecConfig(vocab_size=7112, max_len=50, kaiming_init=False))
    assert sum(parameter.numel() for parameter in model.parameters()) == 593_498


@pytest.mark.parametrize("kaiming", [True, False])
def test_initial_values(kaiming):
    torch.manual_seed(0)
    config = TiM4RecConfig(vocab_size=500, max_len=50, kaiming_init=kaiming)
    state = TiM4Rec(config).state_dict()
    mixer = "ssd_layers.0.ssd."
    for name in ("item_embedding.weight", mixer + "in_proj.weight", mixer + "mlp4time_scale.1.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05), name
    assert state["item_embedding.weight"][0].abs().min() > 0
    assert state[mixer + "in_proj.bias"].abs().max() == 0
    conv, bias = state[mixer + "conv1d.weight"], state[mixer + "conv1d.bias"]
    channels = config.d_inner + 2 * config.d_state
    if kaiming:
        assert conv.std().item() == pytest.approx(math.sqrt(2 / (channels * config.d_conv)), rel=0.1)
        assert bias.abs().max() == 0
    else:
        assert 0.48 < conv.abs().max() <= 0.5
        assert 0.45 < bias.abs().max() <= 0.5
    step = torch.nn.functional.softplus(state[mixer + "dt_bias"])
    assert ((step >= 0.999e-3) & (step <= 1.001e-1)).all()
    assert ((state[mixer + "A_log"] >= 0) & (state[mixer + "A_log"] <= math.log(16))).all()
    assert (state[mixer + "D"] == 1).all()
    assert (state[mixer + "norm.weight"] == 1).all()


def test_dropout_acts_in_training_only():
    model = TiM4Rec(dataclasses.replace(SMALL, dropout=0.3, time_dropout=0.3))
    items, lengths, times = batch(SMALL)
    model.train()
    assert not torch.equal(model(items, lengths, times), model(items, lengths, times))
    model.eval()
    assert torch.equal(model(items, lengths, times), model(items, lengths, times))


def test_time_changes_the_output_only_where_it_is_used():
    items, lengths, times = batch(SMALL)
    shifted = times + torch.arange(12) ** 2 * 5000 * (times > 0)
    for use_time in (True, False):
        torch.manual_seed(0)
        config = sibling(
            SMALL, "tim4rec" if use_time else "ssd4rec", mask_padded_time=True, log_time=True, dtype="float64"
        )
        model = TiM4Rec(config)
        initial = {key: value.float() for key, value in model.state_dict().items()}
        model.load_state_dict(perturbed(initial))
        gap = (model(items, lengths, times) - model(items, lengths, shifted)).abs().max().item()
        assert gap > 1e-4 if use_time else gap == 0


def test_masked_and_log_compressed_gaps():
    items, lengths, times = batch(SMALL)
    config = dataclasses.replace(SMALL, mask_padded_time=True, log_time=True, dtype="float64")
    model = TiM4Rec(config)
    channel = model.time_channel(times, lengths)[:, 0].detach().numpy()
    for row, length in enumerate(lengths.tolist()):
        gaps = np.zeros(SMALL.max_len)
        gaps[1:length] = np.log1p(np.diff(times[row, :length].numpy()))
        scaled = (gaps - gaps.mean()) / np.sqrt(gaps.var() + SMALL.norm_eps)
        np.testing.assert_allclose(channel[row], scaled, rtol=0, atol=1e-9)


def test_one_layer_has_no_residual():
    torch.manual_seed(0)
    model = TiM4Rec(sibling(SMALL, "ssd4rec", num_layers=1, use_ffn=False))
    items, lengths, _ = batch(SMALL)
    u = model.in_layer_norm(model.item_embedding(items))
    expected = model.ssd_layers[0].layer_norm(model.ssd_layers[0].ssd(u)[0])
    torch.testing.assert_close(model(items, lengths), expected[torch.arange(4), lengths - 1])


def test_bad_settings():
    with pytest.raises(ValueError, match="vocab_size=0 must be at least 1"):
        TiM4Rec(dataclasses.replace(SMALL, vocab_size=0))
    with pytest.raises(ValueError, match="dtype='bfloat16' must be 'float32' or 'float64'"):
        TiM4Rec(dataclasses.replace(SMALL, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"item_embedding.weight is torch.float64; perturb the float32"):
        perturbed(TiM4Rec(dataclasses.replace(SMALL, dtype="float64")).state_dict())


def test_perturbation_moves_every_parameter_and_repeats():
    initial = TiM4Rec(SMALL).state_dict()
    kept = {name: value.clone() for name, value in initial.items()}
    moved, again = perturbed(initial), perturbed(initial)
    for name, value in initial.items():
        assert torch.equal(value, kept[name]), name
        assert (moved[name] != value.double()).all(), name
        assert torch.equal(moved[name], again[name]), name
