"""Figures by matplotlib, which is not installed with the library alone: `pip install 'tim4rec_jax[plots]'`."""

import importlib.util
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HINT = "matplotlib is not installed: pip install 'tim4rec_jax[plots]'"


def can_draw() -> bool:
    """Returns whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> "Figure":
    """Returns an empty figure of so many inches, drawn without a screen.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    if not can_draw():
        raise ModuleNotFoundError(HINT)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure
