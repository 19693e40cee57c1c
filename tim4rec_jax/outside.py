"""Modules of the user that register a model or a metric on import, and how run folders name them."""

import importlib
import pathlib
from types import ModuleType
from typing import Any


def importable_name(caller: dict[str, Any]) -> str:
    """Returns the name by which other programs import a module; that of a program's file is not "__main__" there.

    Args:
      caller: globals of the module.
    """
    if caller["__name__"] != "__main__":
        return caller["__name__"]
    spec, file = caller.get("__spec__"), caller.get("__file__")
    return spec.name if spec else pathlib.Path(file).stem if file else "__main__"


def import_outside(setting: str, name: str) -> ModuleType:
    """Imports a module that registers something.

    Args:
      setting: that names it, for messages.
      name: as in an import statement.

    Raises:
      ValueError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"{setting}={name} cannot be imported ({type(error).__name__}: {str(error)[:80]}); put its folder on "
            "PYTHONPATH, or start the program there"
        ) from error
