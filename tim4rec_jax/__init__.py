"""TiM4Rec and its family: state-space sequential recommenders in JAX."""

from tim4rec_jax import interop
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ModelConfig, TrainConfig
from tim4rec_jax.data_config import SyntheticConfig
from tim4rec_jax.models import MODELS, build_model

__version__ = "0.1.0"

__all__ = [
    "MODELS", "DataConfig", "EvalConfig", "ExperimentConfig", "ModelConfig", "SyntheticConfig", "TrainConfig",
    "build_model", "interop",
]  # fmt: skip
