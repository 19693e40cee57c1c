"""Run folders of earlier versions, which had one class of settings for all models, are read as today's."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.edited_runs import reseal
from tests.serving.tiny_run import make_causal_config, make_log, make_run
from tim4rec_jax.config import experiment_from_dict
from tim4rec_jax.data.splits import split_log, training_times
from tim4rec_jax.models import (
    MODELS,
    STATISTICS,
    CausalTiM4RecConfig,
    EchoMamba4RecConfig,
    Mamba4RecConfig,
    SASRecConfig,
    SSD4RecConfig,
    TiM4RecConfig,
    TiSASRecConfig,
    build_model,
)
from tim4rec_jax.run_dir import CHECKPOINTS
from tim4rec_jax.serving import user_table
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.streaming import earlier_fingerprint
from tim4rec_jax.serving.user_table import Event, UserTable
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.stored_run import load_log, load_model

# The part "model" of a config.json as it was.
EARLIER = json.loads("""{
"name": "tim4rec", "vocab_size": 31, "vocab_multiple": 1, "max_len": 12, "d_model": 8, "num_layers": 1, "d_state": 4,
"d_conv": 4, "expand": 2, "head_dim": 8, "chunk_size": 32, "dropout": 0.2, "time_dropout": 0.1, "norm_eps": 1e-06,
"use_ffn": false, "use_time": true, "time_mode": "faithful", "gap_mean": 8.5, "gap_std": 3.0, "date_knots": 8,
"first_second": 1000, "last_second": 40000000, "time_gate_per_position": true, "kaiming_init": true,
"mask_padded_time": true, "log_time": true, "attention_heads": 4, "inner_size": 24, "attention_dropout": 0.3,
"time_span": 99, "dtype": "float32", "ssd_implementation": null, "conv_implementation": null,
"scan_implementation": null}""")
SHAPE = {"vocab_size": 31, "max_len": 12, "d_model": 8, "num_layers": 1, "norm_eps": 1e-6}
MIXER = SHAPE | {"d_state": 4}
SSD = MIXER | {"head_dim": 8, "use_ffn": False}
ATTENTION = SHAPE | {"attention_heads": 4, "inner_size": 24, "attention_dropout": 0.3}


def read(train=None, **changes):
    return experiment_from_dict({"name": "old", "model": EARLIER | changes, "train": train or {}})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            TiM4RecConfig(**SSD, time_dropout=0.1, time_gate_per_position=True, mask_padded_time=True, log_time=True),
        ),
        ({"time_mode": "causal"}, CausalTiM4RecConfig(**SSD, time_dropout=0.1, date_knots=8)),
        ({"use_time": False}, SSD4RecConfig(**SSD)),
        ({"use_time": False, "time_mode": "causal"}, SSD4RecConfig(**SSD)),
        ({"name": "mamba4rec"}, Mamba4RecConfig(**MIXER, use_ffn=False)),
        ({"name": "echomamba4rec"}, EchoMamba4RecConfig(**MIXER)),
        ({"name": "sasrec"}, SASRecConfig(**ATTENTION)),
        ({"name": "tisasrec"}, TiSASRecConfig(**ATTENTION, time_span=99)),
        ({"name": "tisasrec", "use_time": False}, SASRecConfig(**ATTENTION)),
    ],
)
def test_every_model(changes, expected):
    config = read(**changes)
    assert config.model == expected and type(config.model) is MODELS[expected.name].Config
    assert experiment_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_backends():
    both = {"ssd_implementation": "pallas_triton_interpreted", "conv_implementation": "pallas_triton_interpreted"}
    config = read(train={"loss_implementation": "xla"}, **both)
    assert (config.model.kernels, config.train.loss_in_tiles) == ("pallas_triton", True)
    apart = read(train={"loss_implementation": None}, ssd_implementation="reference", conv_implementation="xla")
    assert (apart.model.kernels, apart.train.loss_in_tiles) == (None, False)


def test_what_cannot_be_read_is_refused():
    assert read(time_features="gap").model == read().model
    with pytest.raises(ValueError, match=r"model.time_features='gap\+bins' is no longer offered, only 'gap'"):
        read(time_features="gap+bins")
    with pytest.raises(ValueError, match="model.time_mode='casual' must be"):
        read(time_mode="casual")
    with pytest.raises(ValueError, match=r"unknown settings \['model.hed_dim'\]"):
        read(hed_dim=8)


def test_a_checkpoint_without_statistics_of_the_data(tmp_path):
    """They are measured again on the log of the folder, and are what training measured."""
    log, config = make_log(), make_causal_config()
    params = make_run(tmp_path / "run", log, config)
    times = training_times(log, split_log(log, config.data))
    statistics = build_model(config.model).data_statistics(**times)
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)
    bare = {name: part for name, part in params.items() if name != STATISTICS}
    with Checkpointer(tmp_path / "run" / CHECKPOINTS) as checkpoints:
        checkpoints.save_best(7, bare, {})
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    values["model"] = EARLIER | {"time_mode": "causal", "norm_eps": 1e-6, "date_knots": config.model.date_knots}
    values["model"] |= {"time_dropout": config.model.time_dropout}
    values["train"]["loss_implementation"] = None
    del values["train"]["loss_in_tiles"]
    file.write_text(json.dumps(values))
    reseal(tmp_path / "run")
    stored = load_model(tmp_path / "run")
    assert stored.config == config
    jax.tree.map(np.testing.assert_array_equal, stored.params, bare | {STATISTICS: statistics})
    assert set(stored.variables) == {"params", STATISTICS}
    assert Recommender.from_run(tmp_path / "run").earlier_settings == values["model"]
    assert load_log(tmp_path / "run").fingerprint == log.fingerprint


def test_the_hash_of_a_model_is_the_earlier_one():
    """As that version itself computed it: statistics of the data were among the settings."""
    params = {"bias": np.arange(3, dtype=np.float32), STATISTICS: {"gap_mean": np.float32(8.5)}}
    assert earlier_fingerprint(EARLIER | {"time_mode": "causal"}, params, ["a", "b"]) == (
        "9fce4ef739cf6aaf1dc2ba4ad66bf7983031825c24b870e3bc48ac656f18976b"
    )


def test_a_table_of_user_states(tmp_path, monkeypatch):
    """One that the earlier version left is read, and saved again under today's hash; a changed model is refused."""
    make_run(tmp_path / "run", make_log(), make_causal_config())
    recommender = Recommender.from_run(tmp_path / "run")
    assert recommender.earlier_settings is None
    earlier = EARLIER | {"time_mode": "causal"}
    table = UserTable(recommender)
    table.add([Event("u", recommender.item_ids[0], 2000)])
    with monkeypatch.context() as before:
        before.setattr(user_table, "fingerprint", lambda model, *rest: earlier_fingerprint(earlier, *rest))
        table.save(tmp_path / "users")
    with pytest.raises(ValueError, match="of another model or of other parameters"):
        UserTable.load(tmp_path / "users", recommender)
    recommender.earlier_settings = earlier | {"norm_eps": 0.1}
    with pytest.raises(ValueError, match="of another model or of other parameters"):
        UserTable.load(tmp_path / "users", recommender)
    recommender.earlier_settings = earlier
    loaded = UserTable.load(tmp_path / "users", recommender)
    assert loaded.users == ["u"] and loaded.events_of("u") == 1
    loaded.save(tmp_path / "users")
    recommender.earlier_settings = None
    assert UserTable.load(tmp_path / "users", recommender).users == ["u"]
