"""The models by name, and how others join them."""

import dataclasses
import difflib
import sys

import jax

from tim4rec_jax.layers.rows import one_segment
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models.bert4rec import BERT4Rec, BERT4RecConfig
from tim4rec_jax.models.caser import Caser, CaserConfig
from tim4rec_jax.models.cloze import MASK, draw_masks
from tim4rec_jax.models.echomamba4rec import EchoMamba4Rec, EchoMamba4RecConfig
from tim4rec_jax.models.gru4rec import GRU4Rec, GRU4RecConfig
from tim4rec_jax.models.lrurec import LRURec, LRURecConfig
from tim4rec_jax.models.mamba4rec import Mamba4Rec, Mamba4RecConfig
from tim4rec_jax.models.recommender import (
    STATISTICS,
    Cache,
    SequentialModel,
    StateSpaceModel,
    apply_method,
    init_params,
    item_scores,
    last_hidden,
    scores_read_history,
    variables,
)
from tim4rec_jax.models.sasrec import SASRec, SASRecConfig
from tim4rec_jax.models.ssd4rec import SSD4Rec, SSD4RecConfig
from tim4rec_jax.models.tim4rec import TiM4Rec, TiM4RecConfig
from tim4rec_jax.models.tim4rec_causal import CausalTiM4Rec, CausalTiM4RecConfig
from tim4rec_jax.models.tisasrec import TiSASRec, TiSASRecConfig
from tim4rec_jax.outside import import_outside, importable_name

MODELS: dict[str, type[SequentialModel]] = {
    "tim4rec": TiM4Rec,
    "tim4rec_causal": CausalTiM4Rec,
    "ssd4rec": SSD4Rec,
    "mamba4rec": Mamba4Rec,
    "echomamba4rec": EchoMamba4Rec,
    "sasrec": SASRec,
    "tisasrec": TiSASRec,
    "gru4rec": GRU4Rec,
    "lrurec": LRURec,
    "caser": Caser,
    "bert4rec": BERT4Rec,
}


# Modules whose import registers a model from outside.
_REGISTERED_BY: dict[str, str] = {}


def register_model(name: str, Config: type[ModelConfig], Module: type[SequentialModel]) -> None:
    """Adds a model: it is then built, trained, evaluated and served as the library's own are.

    A run folder names the module that calls this, and every program imports it first: register on import.

    Args:
      name: as in `--model.name`.
      Config: frozen dataclass that inherits from `ModelConfig` and has `name` as its default name.
      Module: its call is `SequentialModel.__call__`; has `Config` from now on.

    Raises:
      ValueError: the name is another model's, or the classes are not such.
    """
    known = MODELS.get(name)
    # A module that is imported again registers again.
    if known is not None and (name not in _REGISTERED_BY or known.__qualname__ != Module.__qualname__):
        raise ValueError(f"model {name!r} is registered already, by {known.__module__}.{known.__qualname__}")
    for given, base in ((Config, ModelConfig), (Module, SequentialModel)):
        if not issubclass(given, base):
            raise ValueError(f"model {name!r}: {given.__name__} must inherit from {base.__name__}")
    if Config().name != name:
        raise ValueError(f"{Config.__name__} has name={Config().name!r}; write `name: str = {name!r}` into it")
    Module.Config = Config
    MODELS[name], _REGISTERED_BY[name] = Module, importable_name(sys._getframe(1).f_globals)


def model_class(name: str) -> type[SequentialModel]:
    """Returns a registered model.

    Raises:
      ValueError: for an unknown name; the nearest are shown.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.5) or sorted(MODELS)
        raise ValueError(
            f"model.name={name!r} is unknown; nearest: {', '.join(near)}; of your own: import its module, or "
            "give --model.module"
        )
    return MODELS[name]


def import_model_module(module: str) -> str | None:
    """Imports a module that registers a model.

    Args:
      module: its name, as in an import statement; `my_models:RNN4Rec` says which of its models is meant.

    Returns:
      The name under which the class behind the colon is registered, or the only one of the module; else None.

    Raises:
      ValueError: it cannot be imported, or does not register the class.
    """
    name, _, wanted = module.partition(":")
    imported = import_outside("model.module", name)
    names = [model for model, by in _REGISTERED_BY.items() if by == name]
    if wanted:
        names = [model for model in names if MODELS[model] is getattr(imported, wanted, None)]
    if not names:
        raise ValueError(f"model.module={module}: {name} registers no such model; call register_model there")
    return names[0] if len(names) == 1 else None


def full_config(config: ModelConfig) -> ModelConfig:
    """Returns settings in the class of their model; a plain `ModelConfig` has the model's own at their defaults.

    `module` becomes whoever registered the model, None for the library's own.

    Raises:
      ValueError: for an unknown name, or settings of another model.
    """
    model = model_class(config.name)
    if type(config) is ModelConfig and model.Config is not ModelConfig:
        values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
        config = model.Config(**{name: value for name, (value, default) in values.items() if value != default})
    if not isinstance(config, model.Config):
        raise ValueError(
            f"model.name={config.name!r} with {type(config).__name__}: give {model.Config.__name__}, the settings of "
            "that model"
        )
    module = _REGISTERED_BY.get(config.name)
    return config if config.module == module else dataclasses.replace(config, module=module)


def build_model(config: ModelConfig) -> SequentialModel:
    """Returns the Linen module of a model.

    Raises:
      ValueError: for an unknown name, settings of another model, an empty vocabulary, or float64 without JAX's 64-bit
        mode.
    """
    config = full_config(config)
    if config.vocab_size < 2:
        raise ValueError(f"vocab_size={config.vocab_size} must be at least 2: the padding row and one item")
    require_x64(config)
    return model_class(config.name)(config)


def require_x64(config: ModelConfig) -> None:
    """Raises ValueError for float64 without JAX's 64-bit mode."""
    if config.dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("dtype='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")


__all__ = [
    "MASK",
    "MODELS",
    "STATISTICS",
    "BERT4RecConfig",
    "Cache",
    "CaserConfig",
    "CausalTiM4RecConfig",
    "EchoMamba4RecConfig",
    "GRU4RecConfig",
    "LRURecConfig",
    "Mamba4RecConfig",
    "ModelConfig",
    "SASRecConfig",
    "SSD4RecConfig",
    "SequentialModel",
    "StateSpaceModel",
    "TiM4RecConfig",
    "TiSASRecConfig",
    "apply_method",
    "build_model",
    "draw_masks",
    "full_config",
    "import_model_module",
    "init_params",
    "item_scores",
    "last_hidden",
    "model_class",
    "one_segment",
    "register_model",
    "require_x64",
    "scores_read_history",
    "variables",
]
