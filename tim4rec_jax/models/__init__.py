"""The models by name."""

import difflib

import jax

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.models.base import SequentialModel
from tim4rec_jax.models.tim4rec import TiM4Rec

MODELS = {"tim4rec": TiM4Rec}


def build_model(config: ModelConfig) -> SequentialModel:
    """Returns the Linen module of a model.

    Raises:
      ValueError: for an unknown name, an empty vocabulary, or float64 without JAX's 64-bit mode.
    """
    if config.name not in MODELS:
        near = difflib.get_close_matches(config.name, MODELS, n=3, cutoff=0.3) or sorted(MODELS)
        raise ValueError(f"model.name={config.name!r} is unknown; nearest: {', '.join(near)}")
    if config.vocab_size < 2:
        raise ValueError(f"vocab_size={config.vocab_size} must be at least 2: the padding row and one item")
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")
    return MODELS[config.name](config)


__all__ = ["MODELS", "SequentialModel", "build_model"]
