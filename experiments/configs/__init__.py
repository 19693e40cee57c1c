"""Experiments by name: one file each, with `def config() -> ExperimentConfig`, or `<data>_<model>` of the family."""

import difflib
import importlib
import pkgutil
from collections.abc import Sequence

from experiments.cli import OptionParser
from experiments.family import DATA_NAMES, MODEL_NAMES, compose, family_names, of_model
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import import_model_module

__all__ = ["DATA_NAMES", "MODEL_NAMES", "chosen", "config_names", "load_config"]


def _file_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def config_names() -> list[str]:
    """Returns the names of all experiments."""
    return sorted({*_file_names(), *family_names()})


def _load_file(name: str) -> ExperimentConfig:
    return importlib.import_module(f"{__name__}.{name}").config()


def load_config(name: str) -> ExperimentConfig:
    """Returns an experiment's settings; a file of its own goes before the family's composition.

    Raises:
      ValueError: for an unknown name; the nearest ones are shown.
    """
    if name in _file_names():
        return _load_file(name)
    names = config_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        raise ValueError(f"--config={name} is unknown; nearest: {', '.join(near)}")
    return compose(name, _load_file)


def chosen(argv: Sequence[str]) -> tuple[ExperimentConfig, ModelConfig]:
    """Returns the experiment of --config, and the settings of the model of --model.name and --model.module.

    A model that is not the experiment's own has its shape.

    Raises:
      ValueError: for an unknown name, or a module that cannot be imported.
    """
    finder = OptionParser(add_help=False)
    finder.add_argument("--config", default="quickstart")
    finder.add_argument("--model.name", "--model-name", dest="model")
    finder.add_argument("--model.module", "--model-module", dest="module")
    found, _ = finder.parse_known_args(argv)
    of_module = None if found.module in (None, "None") else import_model_module(found.module)
    config = load_config(found.config)
    return config, of_model(config.model, found.model or of_module or config.model.name)
