"""Experiments by name: one file each, with `def config() -> ExperimentConfig`, or `<data>_<model>` of the family."""

import difflib
import importlib
import pkgutil

from experiments.family import DATA_NAMES, MODEL_NAMES, compose, family_names
from tim4rec_jax.config import ExperimentConfig

__all__ = ["DATA_NAMES", "MODEL_NAMES", "config_names", "load_config"]


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
