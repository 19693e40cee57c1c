"""Settings and parameters of the original programs, to ours and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models import tim4rec as pytorch
from tests.models.settings import sibling
from tim4rec_jax import build_model, interop
from tim4rec_jax.models import TiM4RecConfig, init_params

pytestmark = pytest.mark.quick

# The TiM4Rec authors' names; every value differs from our default, and numbers come as YAML may read them.
UPSTREAM = {
    "hidden_size": 32,
    "num_layers": 3,
    "dropout_prob": 0.4,
    "time_drop_out": 0.1,
    "d_state": 8,
    "d_conv": 3,
    "expand": 4,
    "head_dim": "16",
    "chunk_size": 16,
    "norm_eps": "1e-5",
    "is_ffn": False,
    "is_time": True,
    "p2p_residual": True,
    "is_kai_ming_init": False,
    "MAX_ITEM_LIST_LENGTH": 20,
    "learning_rate": 0.001,
    "loss_type": "CE",
}
EXPECTED = TiM4RecConfig(
    name="tim4rec",
    vocab_size=0,
    d_model=32,
    num_layers=3,
    dropout=0.4,
    time_dropout=0.1,
    d_state=8,
    d_conv=3,
    expand=4,
    head_dim=16,
    chunk_size=16,
    norm_eps=1e-5,
    use_ffn=False,
    time_gate_per_position=True,
    kaiming_init=False,
    max_len=20,
)
SMALL = TiM4RecConfig(vocab_size=11, max_len=6, d_model=8, head_dim=8, d_state=4)


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


@pytest.mark.parametrize("name", ["TiM4Rec", "tim4rec"])
def test_every_setting_is_carried_over(name):
    config = interop.config_from_upstream(name, UPSTREAM)
    assert config == EXPECTED
    assert isinstance(config.norm_eps, float) and isinstance(config.head_dim, int)
    assert interop.config_from_upstream(name, UPSTREAM | {"n_items": 101}).vocab_size == 101


def test_the_model_without_time_has_no_time_settings():
    settings = without(UPSTREAM, "is_time", "time_drop_out", "p2p_residual")
    expected = sibling(EXPECTED, "ssd4rec")
    assert interop.config_from_upstream("SSD4Rec", settings) == expected
    assert interop.config_from_upstream("TiM4Rec", settings | {"is_time": False}) == expected


def test_every_missing_setting_is_named_and_as_many_bad_ones_as_fit_into_a_line():
    bad = {"hidden_size": "wide", "dropout_prob": None, "is_ffn": 1}
    with pytest.raises(ValueError) as raised:
        interop.config_from_upstream("TiM4Rec", without(UPSTREAM, "d_state", "p2p_residual") | bad)
    assert str(raised.value) == (
        "the settings do not describe a TiM4Rec: missing: d_state, p2p_residual; hidden_size='wide' is not a whole "
        "number; dropout_prob=None is not a number; is_ffn=1 is not a yes-or-no value (true or false)"
    )
    with pytest.raises(ValueError) as raised:
        interop.config_from_upstream("TiM4Rec", dict.fromkeys(UPSTREAM, "x" * 10**6))
    assert len(str(raised.value)) < 300 and "; and " in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("num_layers", 2.5, "whole number"),
        ("expand", True, "whole number"),
        ("d_conv", float("inf"), "whole number"),
        ("d_conv", 10**400, "whole number"),
        ("time_drop_out", True, "number"),
        ("norm_eps", float("nan"), "number"),
        ("n_items", "many", "whole number"),
        ("n_items", [1], "whole number"),
        ("is_time", "false", "yes-or-no value"),
    ],
)
def test_settings_of_a_wrong_kind(name, value, kind):
    with pytest.raises(ValueError, match=f"{name}=.* is not a {kind}"):
        interop.config_from_upstream("TiM4Rec", UPSTREAM | {name: value})


@pytest.mark.parametrize("name", ["tim4rec_causal", "mine"])
def test_models_without_a_counterpart(name):
    with pytest.raises(ValueError, match=f"the model '{name}' has no counterpart among the original programs"):
        interop.settings.upstream_from_config(dataclasses.replace(SMALL, name=name))


def test_unknown_names_and_values_out_of_range():
    with pytest.raises(ValueError, match="model_name='TiM5Rec' is unknown; nearest: tim4rec"):
        interop.config_from_upstream("TiM5Rec", UPSTREAM)
    with pytest.raises(ValueError, match=r"head_dim=48 must divide expand\*d_model=128"):
        interop.config_from_upstream("TiM4Rec", UPSTREAM | {"head_dim": 48})
    known = "known: .'echomamba4rec', 'mamba4rec', 'sasrec', 'ssd4rec', 'tim4rec', 'tisasrec'."
    with pytest.raises(ValueError, match=f"model 'other' has no PyTorch form here; {known}"):
        interop.params_to_torch(dataclasses.replace(SMALL, name="other"), {})


CONFIGS = {
    "default": SMALL,
    "gate per position": dataclasses.replace(SMALL, time_gate_per_position=True, kaiming_init=False),
    "time off": sibling(SMALL, "ssd4rec"),
    "one layer, no feed-forward": dataclasses.replace(SMALL, num_layers=1, use_ffn=False),
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def state_dict(config):
    """A state dict of random values, so that no two parameters are alike."""
    generator = torch.Generator().manual_seed(0)
    model = pytorch.TiM4Rec(config)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def shapes_of(config):
    return {"params": jax.eval_shape(functools.partial(init_params, build_model(config)), jax.random.key(0))}


@by_config
def test_both_directions_are_exact(config):
    given = state_dict(config)
    params = interop.params_from_torch(config, given)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes_of(config)["params"]
    )
    back = interop.params_to_torch(config, params)
    assert set(back) == set(given)
    for name, value in given.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], value.numpy(), err_msg=name)
    again = interop.params_from_torch(config, back)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # Arrays that PyTorch takes without a warning or a copy.
    model = pytorch.TiM4Rec(config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in back.items()})


def test_our_parameters_do_not_change_with_theirs():
    given = state_dict(SMALL)
    params = interop.params_from_torch(SMALL, given)
    before = jax.tree.map(np.array, params)
    for value in given.values():
        value.add_(1.0)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_double_precision_is_kept(x64):
    config = dataclasses.replace(SMALL, dtype="float64")
    given = {name: value.double() / 3 for name, value in state_dict(config).items()}
    params = interop.params_from_torch(config, given)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float64")}
    back = interop.params_to_torch(config, params)
    for name, value in given.items():
        np.testing.assert_array_equal(back[name], value.numpy(), err_msg=name)


def test_the_vocabulary_is_taken_from_the_embedding():
    params = interop.params_from_torch(dataclasses.replace(SMALL, vocab_size=0), state_dict(SMALL))
    assert params["item_embedding"]["embedding"].shape == (11, 8)


@pytest.mark.parametrize("vocab_size", [11, 0])
def test_every_difference_of_a_state_dict_is_named_at_once(vocab_size):
    given = {name: value.numpy() for name, value in state_dict(SMALL).items()}
    del given["item_embedding.weight"], given["ssd_layers.1.ssd.D"]
    given["position_embedding.weight"] = np.zeros((6, 8), np.float32)
    given["ssd_layers.0.ssd.conv1d.weight"] = np.zeros((24, 4), np.float32)
    given["ssd_layers.0.ffn.fc1.bias"] = np.zeros(8, np.float32)
    with pytest.raises(ValueError) as raised:
        interop.params_from_torch(dataclasses.replace(SMALL, vocab_size=vocab_size), given)
    assert str(raised.value) == (
        "the state dict does not fit tim4rec: missing: item_embedding.weight, ssd_layers.1.ssd.D; unexpected: "
        "position_embedding.weight; shape of ssd_layers.0.ssd.conv1d.weight: (24, 4), expected (24, 1, 4); and 1 more"
    )


def test_an_embedding_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"shape of item_embedding.weight: \(11, 8\), expected \(12, 8\)"):
        interop.params_from_torch(dataclasses.replace(SMALL, vocab_size=12), state_dict(SMALL))
    flat = state_dict(SMALL) | {"item_embedding.weight": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"shape of item_embedding.weight: \(\), expected"):
        interop.params_from_torch(dataclasses.replace(SMALL, vocab_size=0), flat)


def test_every_difference_of_a_parameter_tree_is_named_at_once():
    params = interop.params_from_torch(SMALL, state_dict(SMALL))
    del params["embedding_norm"], params["layers_0"]["mixer"]["time"]["conv_2"]["bias"]
    params["position_embedding"] = {"embedding": jnp.zeros((6, 8))}
    with pytest.raises(ValueError) as raised:
        interop.params_to_torch(SMALL, params)
    assert str(raised.value) == (
        "the parameters do not fit tim4rec: missing: embedding_norm/bias, embedding_norm/scale, "
        "layers_0/mixer/time/conv_2/bias; unexpected: position_embedding/embedding"
    )


ATTENTION = {
    "hidden_size": 64,
    "inner_size": 256,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dropout_prob": 0.1,
    "attn_dropout_prob": 0.2,
    "hidden_act": "gelu",
    "layer_norm_eps": "1e-12",
    "initializer_range": 0.02,
    "MAX_ITEM_LIST_LENGTH": 50,
    "n_items": 101,
    "time_span": 256,
}


def test_settings_of_the_attention_models():
    timed = interop.config_from_upstream("TiSASRec", ATTENTION)
    assert (timed.name, timed.attention_heads, timed.num_layers, timed.time_span) == ("tisasrec", 4, 2, 256)
    assert (timed.dropout, timed.attention_dropout, timed.norm_eps, timed.vocab_size) == (0.1, 0.2, 1e-12, 101)
    plain = {name: value for name, value in ATTENTION.items() if name != "time_span"}
    assert interop.config_from_upstream("SASRec", plain).name == "sasrec"
    with pytest.raises(ValueError, match="the settings do not describe a TiSASRec: missing: time_span"):
        interop.config_from_upstream("TiSASRec", plain)
    with pytest.raises(ValueError, match="hidden_act='relu' is not offered, only 'gelu'"):
        interop.config_from_upstream("SASRec", plain | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="attention_heads=5 must divide d_model=64"):
        interop.config_from_upstream("SASRec", plain | {"n_heads": 5})
