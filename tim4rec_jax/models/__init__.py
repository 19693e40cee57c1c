"""The models by name."""

import difflib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.rows import one_segment
from tim4rec_jax.models.causal_tim4rec import CausalTiM4Rec
from tim4rec_jax.models.echomamba4rec import EchoMamba4Rec
from tim4rec_jax.models.mamba4rec import Mamba4Rec
from tim4rec_jax.models.recommender import Cache, SequentialModel, StateSpaceModel, last_hidden
from tim4rec_jax.models.sasrec import SASRec
from tim4rec_jax.models.tim4rec import TiM4Rec
from tim4rec_jax.models.tisasrec import TiSASRec

MODELS = {
    "echomamba4rec": EchoMamba4Rec,
    "mamba4rec": Mamba4Rec,
    "sasrec": SASRec,
    "tim4rec": TiM4Rec,
    "tisasrec": TiSASRec,
}


def build_model(config: ModelConfig) -> SequentialModel:
    """Returns the Linen module of a model.

    Raises:
      ValueError: for an unknown name, an empty vocabulary, or float64 without JAX's 64-bit mode.
    """
    if config.name not in MODELS:
        near = difflib.get_close_matches(config.name, MODELS, n=3, cutoff=0.5) or sorted(MODELS)
        raise ValueError(f"model.name={config.name!r} is unknown; nearest: {', '.join(near)}")
    if config.vocab_size < 2:
        raise ValueError(f"vocab_size={config.vocab_size} must be at least 2: the padding row and one item")
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")
    if config.name == "tim4rec" and (config.time_mode == "causal" or not config.use_time):
        return CausalTiM4Rec(config)
    return MODELS[config.name](config)


def init_params(model: SequentialModel, key: Array) -> dict[str, Any]:
    """Returns a model's initial parameters; under `jax.eval_shape`, the shapes of its tree.

    Args:
      model: from `build_model`.
      key: typed PRNG key.
    """
    items = jnp.ones((1, model.config.max_len), jnp.int32)
    return model.init(key, items, jnp.zeros_like(items))["params"]


__all__ = [
    "MODELS", "Cache", "SequentialModel", "StateSpaceModel", "build_model", "init_params", "last_hidden",
    "one_segment",
]  # fmt: skip
