"""TiM4Rec and its family: state-space sequential recommenders in JAX."""

import importlib
from typing import Any

from tim4rec_jax import interop
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.data_config import SyntheticConfig
from tim4rec_jax.evaluation.measures import register_metric
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import MODELS, StateSpaceModel, build_model, register_model

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "Callback",
    "DataConfig",
    "EvalConfig",
    "ExperimentConfig",
    "ModelConfig",
    "Recommender",
    "StateSpaceModel",
    "Stream",
    "SyntheticConfig",
    "TrainConfig",
    "build_model",
    "compare",
    "evaluate",
    "fit",
    "interop",
    "load_log",
    "register_metric",
    "register_model",
]

# What reads logs and checkpoints is imported when it is asked for: it takes longer than all the rest.
_LAZY = {
    "Callback": "tim4rec_jax.training.callbacks",
    "Recommender": "tim4rec_jax.serving.recommender",
    "Stream": "tim4rec_jax.serving.live",
    "compare": "tim4rec_jax.comparing",
    "evaluate": "tim4rec_jax.fitting",
    "fit": "tim4rec_jax.fitting",
    "load_log": "tim4rec_jax.data.interactions",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
