"""Experiments by name: one file each, with `def config() -> ExperimentConfig`."""

import difflib
import importlib
import pkgutil

from tim4rec_jax.config import ExperimentConfig


def config_names() -> list[str]:
    """Returns the names of all experiments."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_config(name: str) -> ExperimentConfig:
    """Returns an experiment's settings.

    Raises:
      ValueError: for an unknown name; the nearest ones are shown.
    """
    names = config_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        raise ValueError(f"--config={name} is unknown; nearest: {', '.join(near)}")
    return importlib.import_module(f"{__name__}.{name}").config()
