"""Every named experiment holds the values of the paper's program and builds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import DATA_NAMES, MODEL_NAMES, config_names, load_config
from experiments.family import family_names, file_name
from tests.models.settings import settings_of
from tim4rec_jax import build_model
from tim4rec_jax.config import ExperimentConfig, TrainConfig, experiment_from_dict
from tim4rec_jax.data.loader import Batch
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.model_config import SSDConfig
from tim4rec_jax.training.step import init_state, make_optimizer, train_step

# Columns of the original programs' settings: model, l, d, n, head_dim, dropout, eps, Kaiming, batch, learning rate,
# patience; of the time branch: dropout, gate per position.
EXPECTED = {
    "ml1m_tim4rec": ("tim4rec", 200, 64, 32, 32, 0.2, 1e-12, True, 2048, 1e-3, 20, 0.2, False),
    "ml1m_tim4rec_256d": ("ssd4rec", 200, 256, 64, 128, 0.2, 1e-12, True, 512, 1e-3, 20),
    "ml1m_ssd4rec": ("ssd4rec", 200, 64, 32, 32, 0.2, 1e-12, True, 2048, 1e-3, 20),
    "ml100k_tim4rec": ("tim4rec", 50, 64, 32, 32, 0.2, 1e-12, True, 2048, 1e-3, 20, 0.2, False),
    "beauty_tim4rec": ("tim4rec", 50, 64, 32, 32, 0.4, 1e-5, False, 2048, 1e-3, 20, 0.0, True),
    "videogames_tim4rec": ("tim4rec", 50, 64, 32, 32, 0.4, 1e-5, False, 2048, 1e-3, 20, 0.0, True),
    "kuairand_tim4rec": ("ssd4rec", 50, 64, 32, 32, 0.2, 1e-10, False, 2048, 1e-3, 10),
    "steam_tim4rec": ("tim4rec", 50, 64, 32, 32, 0.2, 1e-10, True, 2048, 5e-4, 20, 0.2, False),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_the_original_programs(name):
    config = load_config(name)
    model, train = config.model, config.train
    assert config.name == name
    of_time = (model.time_dropout, model.time_gate_per_position) if model.name == "tim4rec" else ()
    assert EXPECTED[name] == (
        model.name,
        model.max_len,
        model.d_model,
        model.d_state,
        model.head_dim,
        model.dropout,
        model.norm_eps,
        model.kaiming_init,
        train.batch_size,
        train.learning_rate,
        train.patience,
        *of_time,
    )
    assert (model.num_layers, model.expand, model.d_conv, model.chunk_size, model.use_ffn) == (2, 2, 4, 32, True)
    assert (train.epochs, train.loss, train.weight_decay, train.clip_norm, train.schedule) == (
        300,
        "ce",
        0.0,
        None,
        "constant",
    )
    assert (config.eval.batch_size, config.eval.top_k, config.eval.monitor) == (4096, (10, 20, 50), "ndcg@10")
    assert config.data.k_core == 5


# Columns: model, attention heads, dropout, batch, patience.
FAMILY = {
    "ml1m_mamba4rec": ("mamba4rec", None, 0.2, 2048, 20),
    "ml1m_echomamba4rec": ("echomamba4rec", None, 0.2, 2048, 10),
    "ml1m_sasrec": ("sasrec", 2, 0.2, 2048, 20),
    "ml1m_tisasrec": ("tisasrec", 4, 0.2, 256, 20),
    "beauty_ssd4rec": ("ssd4rec", None, 0.4, 2048, 20),
    "beauty_mamba4rec": ("mamba4rec", None, 0.4, 2048, 20),
    "beauty_echomamba4rec": ("echomamba4rec", None, 0.2, 2048, 10),
    "beauty_sasrec": ("sasrec", 2, 0.4, 2048, 20),
    "videogames_tisasrec": ("tisasrec", 4, 0.4, 256, 20),
    "ml100k_tisasrec": ("tisasrec", 4, 0.2, 2048, 20),
}


# Columns: length, rows per batch, epochs, dropout, share of events that are masked.
MASKED = {
    "quickstart_bert4rec": (20, 32, 60, 0.0, 0.2),
    "ml100k_bert4rec": (200, 8, 100, 0.2, 0.2),
    "ml1m_bert4rec": (200, 32, 150, 0.2, 0.2),
    "beauty_bert4rec": (50, 32, 100, 0.4, 0.6),
}


@pytest.mark.parametrize("name", MASKED)
def test_values_of_the_masked_experiments(name):
    config = load_config(name)
    train, model = config.train, config.model
    assert (train.positions, train.loss, train.masking[1]) == ("masked", "ce", 1 / 11)
    assert MASKED[name] == (model.max_len, train.batch_size, train.epochs, model.dropout, train.masking[0])


# Columns: length, rows per batch, epochs, dropout, learning rate, layers.
EVERY_POSITION = {
    "ml1m_tim4rec_causal": (200, 32, 10, 0.2, 8e-3, 2),
    "ml100k_tim4rec_causal": (200, 8, 20, 0.2, 1e-3, 2),
    "beauty_tim4rec_causal": (50, 32, 10, 0.4, 4e-3, 2),
    "ml1m_gru4rec": (200, 32, 10, 0.2, 1e-2, 1),
    "ml100k_gru4rec": (200, 8, 20, 0.2, 1e-2, 1),
    "beauty_lrurec": (50, 32, 10, 0.4, 4e-3, 2),
    "ml100k_lrurec": (200, 8, 20, 0.2, 4e-3, 2),
    "videogames_caser": (50, 32, 10, 0.4, 1e-2, 1),
    "ml100k_caser": (200, 8, 20, 0.2, 1e-2, 1),
}


@pytest.mark.parametrize("name", EVERY_POSITION)
def test_values_of_the_experiments_on_every_position(name):
    config = load_config(name)
    model, train = config.model, config.train
    assert EVERY_POSITION[name] == (
        model.max_len,
        train.batch_size,
        train.epochs,
        model.dropout,
        train.learning_rate,
        model.num_layers,
    )
    assert (train.schedule, train.warmup_steps) == ("cosine", 40)
    data, _, own = name.partition("_")
    assert (config.name, model.name, train.positions, model.d_model) == (name, own, "all", 64)
    base = load_config(f"{data}_tim4rec")
    assert config.data == dataclasses.replace(base.data, timestamp_precision="int64")


@pytest.mark.quick
def test_only_the_model_of_no_paper_scores_what_was_seen():
    with_bias = {name for name in family_names() if load_config(name).model.seen_bias}
    assert with_bias == {f"{file_name(data)}_tim4rec_causal" for data in DATA_NAMES}


@pytest.mark.parametrize("name", FAMILY)
def test_values_of_the_family(name):
    config = load_config(name)
    model, train = config.model, config.train
    assert FAMILY[name] == (
        model.name,
        getattr(model, "attention_heads", None),
        model.dropout,
        train.batch_size,
        train.patience,
    )
    base = load_config(name.partition("_")[0] + "_tim4rec")
    assert config.name == name and config.eval == base.eval
    assert config.data == dataclasses.replace(base.data, timestamp_precision="int64")
    assert (model.max_len, model.d_model, model.num_layers) == (base.model.max_len, 64, 2)
    assert load_config("ml100k_echomamba4rec").model.num_layers == 1


def test_only_the_papers_own_experiments_order_events_as_its_program_does():
    published = {name for name in config_names() if load_config(name).data.timestamp_precision != "int64"}
    data = ("ml1m", "beauty", "kuairand", "steam")
    assert published == {*(f"{name}_tim4rec" for name in data), "ml1m_tim4rec_256d"}
    assert {load_config(name).data.timestamp_precision for name in published} == {"published"}


def test_every_config_is_covered():
    combinations = {f"{file_name(data)}_{model}" for data in DATA_NAMES for model in MODEL_NAMES}
    assert set(config_names()) == {*EXPECTED, *combinations, "quickstart"}
    assert load_config("quickstart_tim4rec").model == load_config("quickstart").model


class GivenBatches:
    """A loader whose payload is the batch."""

    num_batches, resident = 1, ()

    def batch(self, resident, payload):
        return payload


@functools.cache
def prepare_a_step(model, train):
    """Returns an update on three rows of random items, and a function that makes the state before it."""
    config = ExperimentConfig("test", model, train=train)
    lengths = np.array([1, model.max_len // 2, model.max_len], np.int32)
    items = np.random.default_rng(0).integers(1, model.vocab_size, (3, model.max_len), np.int32)
    items *= np.arange(model.max_len) < lengths[:, None]
    timestamps = np.cumsum(items, axis=1).astype(np.int32)
    given = items, lengths, timestamps, np.array([3, 4, 5], np.int32), np.ones(3, np.float32)
    batch = Batch(*(jnp.asarray(a) for a in given))

    built, optimizer = build_model(model), make_optimizer(train, 1)
    groups = (LengthGroup(model.max_len, 3),)
    step = functools.partial(train_step, built, optimizer, config, groups, GivenBatches())
    return lambda state: step(state, (), batch), functools.partial(init_state, built, optimizer, train.seed)


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize("data", DATA_NAMES)
def test_every_combination_has_a_step(data, model):
    """At the combination's own shapes and options, traced and not compiled."""
    config = load_config(f"{file_name(data)}_{model}")
    train = TrainConfig(learning_rate=config.train.learning_rate, adam_eps=config.train.adam_eps)
    step, make_state = prepare_a_step(dataclasses.replace(config.model, vocab_size=30), train)
    before = jax.eval_shape(make_state)
    after, loss = jax.eval_shape(step, before)
    assert loss.shape == () and jax.tree.map(str, after) == jax.tree.map(str, before)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", MODEL_NAMES)
def test_every_model_takes_a_step(model):
    """Narrow, for the compiler's sake."""
    config = load_config(f"quickstart_{model}")
    narrow = {"vocab_size": 30, "d_model": 8, "d_state": 4, "head_dim": 4, "inner_size": 8}
    step, make_state = prepare_a_step(settings_of(**dataclasses.asdict(config.model) | narrow), TrainConfig())
    before = make_state()
    after, loss = jax.jit(step)(before)
    assert abs(float(loss) - np.log(30)) < 0.5
    moved = after.params["item_embedding"]["embedding"] != before.params["item_embedding"]["embedding"]
    assert moved.any(axis=1)[3:6].all() and int(after.step) == 1


@pytest.mark.parametrize("name", config_names())
def test_every_config_builds_and_survives_json(name):
    config = load_config(name)
    assert experiment_from_dict(config.to_dict()) == config
    model = build_model(dataclasses.replace(config.model, vocab_size=50))
    items = jnp.ones((2, config.model.max_len), jnp.int32)
    shapes = jax.eval_shape(lambda key: model.init_with_output(key, items, items)[0][0], jax.random.key(0))
    assert shapes.shape == (2, config.model.max_len, config.model.table_width)


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
        SSDConfig(**change)


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
