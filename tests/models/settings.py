"""Settings of any model from those of several."""

import dataclasses
from typing import Any

from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import SASRecConfig, model_class

# With every kind of dropout, in float64.
SMALL_SASREC = SASRecConfig(
    vocab_size=23,
    max_len=12,
    d_model=8,
    attention_heads=2,
    inner_size=8,
    dropout=0.3,
    attention_dropout=0.2,
    norm_eps=1e-5,
    num_layers=1,
    dtype="float64",
)


def settings_of(name: str | None = None, /, **values: Any) -> ModelConfig:
    """Returns the settings of a model; what it does not read is left out."""
    name = name or values["name"]
    kind = model_class(name).Config
    read = kind.reads()
    return kind(**{key: value for key, value in values.items() if key in read} | {"name": name})


def sibling(config: ModelConfig, name: str, **changes: Any) -> ModelConfig:
    """Returns the settings of another model: all that both read, and changes."""
    return settings_of(name, **dataclasses.asdict(config) | changes)
