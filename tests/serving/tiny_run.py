"""A run folder with a small random model, as training leaves one behind."""

import dataclasses
import pathlib

import jax
import polars as pl

from tests.evaluation.logs import random_log
from tests.models.settings import settings_of
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.models import STATISTICS, build_model
from tim4rec_jax.run_dir import CHECKPOINTS, create_run
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.step import init_state, make_optimizer

NUM_ITEMS, MAX_LEN = 30, 12


STATISTICS_OF_THE_LOG = {"gap_mean": 10.0, "gap_std": 2.0}


def make_config(name: str = "tim4rec", **model) -> ExperimentConfig:
    """Settings of the tiny model; keywords change them."""
    settings = {"vocab_size": NUM_ITEMS + 1, "max_len": MAX_LEN, "d_model": 8, "d_state": 4, "head_dim": 8}
    return ExperimentConfig(
        "tiny",
        model=settings_of(name, **{**settings, "num_layers": 1, "use_ffn": False, **model}),
        data=DataConfig(k_core=0),
        eval=EvalConfig(top_k=(5, 10), monitor="ndcg@10", batch_size=8),
    )


def make_causal_config(**model) -> ExperimentConfig:
    """The same with the causal time branch."""
    return make_config("tim4rec_causal", **{"norm_eps": 1e-6, **model})


def make_log() -> InteractionLog:
    """40 users of 3 to 25 events over 30 items, with titles for all but the last item."""
    log = random_log(num_users=40, num_items=NUM_ITEMS, min_events=3, max_events=25, seed=2)
    titles = [f"Title of {item_id}" for item_id in log.item_ids[:-1]] + [None]
    return dataclasses.replace(log, titles=pl.Series(titles, dtype=pl.String))


def _scaled(part):
    return jax.tree.map(lambda x: 20 * x, part)


def make_run(path: pathlib.Path, log: InteractionLog, config: ExperimentConfig):
    """Writes the folder; returns the parameters saved as best."""
    model = build_model(config.model)
    params = init_state(model, make_optimizer(config.train, 1), seed=0).params
    # Initial embeddings are so small that all scores nearly tie, whatever the times.
    params["item_embedding"] = _scaled(params["item_embedding"])
    if model.uses_time and "layers_0" in params:
        mixer = params["layers_0"]["mixer"]
        mixer["time"] = {name: _scaled(part) if "scale" in name else part for name, part in mixer["time"].items()}
        mixer["in_proj"], mixer["out_proj"] = _scaled(mixer["in_proj"]), _scaled(mixer["out_proj"])
    if statistics := model.data_statistics(**STATISTICS_OF_THE_LOG):
        params[STATISTICS] = statistics
    create_run(path, config, log)
    with Checkpointer(path / CHECKPOINTS) as checkpointer:
        checkpointer.save_best(7, params, {"ndcg@10": 0.1})
    return params
