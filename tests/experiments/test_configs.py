"""Every named experiment holds the values of the paper's program and builds."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import config_names, load_config
from tim4rec_jax import build_model
from tim4rec_jax.config import ExperimentConfig, ModelConfig, TrainConfig, experiment_from_dict

# Columns of the original programs' settings: l, d, n, head_dim, dropout, time dropout, eps, gate per position, Kaiming,
# time, batch, learning rate, patience.
EXPECTED = {
    "ml1m_tim4rec": (200, 64, 32, 32, 0.2, 0.2, 1e-12, False, True, True, 2048, 1e-3, 20),
    "ml1m_tim4rec_256d": (200, 256, 64, 128, 0.2, 0.2, 1e-12, False, True, False, 512, 1e-3, 20),
    "ml1m_ssd4rec": (200, 64, 32, 32, 0.2, 0.2, 1e-12, False, True, False, 2048, 1e-3, 20),
    "ml100k_tim4rec": (50, 64, 32, 32, 0.2, 0.2, 1e-12, False, True, True, 2048, 1e-3, 20),
    "beauty_tim4rec": (50, 64, 32, 32, 0.4, 0.0, 1e-5, True, False, True, 2048, 1e-3, 20),
    "kuairand_tim4rec": (50, 64, 32, 32, 0.2, 0.0, 1e-10, False, False, False, 2048, 1e-3, 10),
    "steam_tim4rec": (50, 64, 32, 32, 0.2, 0.2, 1e-10, False, True, True, 2048, 5e-4, 20),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_the_original_programs(name):
    config = load_config(name)
    model, train = config.model, config.train
    assert config.name == name
    assert EXPECTED[name] == (
        model.max_len, model.d_model, model.d_state, model.head_dim, model.dropout, model.time_dropout, model.norm_eps,
        model.time_gate_per_position, model.kaiming_init, model.use_time, train.batch_size, train.learning_rate,
        train.patience,
    )  # fmt: skip
    assert (model.num_layers, model.expand, model.d_conv, model.chunk_size, model.use_ffn) == (2, 2, 4, 32, True)
    assert (train.epochs, train.loss, train.weight_decay, train.clip_norm, train.schedule) == (
        300, "ce", 0.0, None, "constant",
    )  # fmt: skip
    assert (config.eval.batch_size, config.eval.top_k, config.eval.monitor) == (4096, (10, 20, 50), "ndcg@10")
    assert (config.data.timestamp_precision, config.data.k_core) == ("float32", 5)


def test_every_config_is_covered():
    assert set(config_names()) == {*EXPECTED, "quickstart"}


@pytest.mark.parametrize("name", config_names())
def test_every_config_builds_and_survives_json(name):
    config = load_config(name)
    assert experiment_from_dict(config.to_dict()) == config
    model = build_model(dataclasses.replace(config.model, vocab_size=50))
    items = jnp.ones((2, config.model.max_len), jnp.int32)
    shapes = jax.eval_shape(
        lambda key: model.init_with_output(
            key, items, jnp.ones(2, jnp.int32), items, deterministic=True, method="encode"
        )[0],
        jax.random.key(0),
    )
    assert shapes.shape == (2, config.model.max_len, config.model.d_model)


def test_unknown_config_shows_the_nearest():
    with pytest.raises(ValueError, match=r"--config=ml1m_tim4rek is unknown; nearest: ml1m_tim4rec"):
        load_config("ml1m_tim4rek")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, r"head_dim=48 must divide expand\*d_model=128; choose one of \[16, 32, 64, 128\]"),
        ({"max_len": 0}, r"max_len=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"norm_eps": 0.0}, r"norm_eps=0.0 must be positive"),
        ({"dtype": "float16"}, r"dtype='float16' must be one of"),
    ],
)
def test_model_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0 must be positive"),
        ({"clip_norm": -1.0}, r"clip_norm=-1.0 must be positive, or None"),
        ({"max_steps": 0}, r"max_steps=0 must be at least 1, or None"),
    ],
)
def test_training_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_unknown_stored_setting_is_named():
    values = load_config("quickstart").to_dict()
    values["train"]["lerning_rate"] = 1.0
    with pytest.raises(ValueError, match=r"unknown settings \['train.lerning_rate'\]"):
        experiment_from_dict(values)
    assert isinstance(experiment_from_dict(load_config("quickstart").to_dict()), ExperimentConfig)
