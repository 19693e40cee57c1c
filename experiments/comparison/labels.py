"""Names beside the points of a figure, none over another, over a point or beyond the panel while there is room."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# Points of the page between a point and its name, and from one try to the next.
_GAP, _STEP, _TRIES = 5.0, 4.0, 60


def place_labels(panel: "Axes", points: Mapping[str, tuple[float, float, float]]) -> "list[Annotation]":
    """Writes each name as near to its point as there is room, with a thin line where that is not beside it.

    Args:
      panel: in its figure at last: its size and limits do not change any more.
      points: by name: x, y and half of the bar through it along y, in data.
    """
    from matplotlib.transforms import Bbox

    figure = panel.figure
    figure.canvas.draw()  # Only now the layout is known.
    figure.set_layout_engine("none")
    scale = figure.dpi / 72.0
    places = {name: tuple(panel.transData.transform(point[:2])) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 3 * scale, y - 3 * scale, 6 * scale, 6 * scale) for x, y in places.values()]
    for x, y, half in points.values():
        (left, low), (_, high) = panel.transData.transform([(x, y - half), (x, y + half)])
        taken.append(Bbox.from_bounds(left - 2 * scale, low, 4 * scale, high - low))
    inside, labels = panel.get_window_extent(), []
    for name, (x, y) in sorted(places.items(), key=lambda item: (-item[1][1], item[1][0])):
        label = panel.annotate(name, points[name][:2], xytext=(0, 0), textcoords="offset points", fontsize="small")
        box = label.get_window_extent()
        # Letters are moved to whole pixels where they are drawn.
        width, height = box.width + 2, box.height + 2
        tried = [*_offsets(width, height, scale), *_elsewhere(inside, (x, y), width, height)]
        boxes = (Bbox.from_bounds(x + dx, y + dy, width, height) for dx, dy in tried)
        dx, dy = next((of for of, own in zip(tried, boxes, strict=False) if _is_free(own, inside, taken)), tried[0])
        own = Bbox.from_bounds(x + dx, y + dy, width, height)
        label.set_position(((dx + 1) / scale, (dy + 1) / scale))
        if abs(dy + height / 2) > height or abs(dx) > width + 2 * _GAP * scale:
            panel.annotate(
                "",
                points[name][:2],
                xytext=((dx + (0 if dx > 0 else width)) / scale, (dy + height / 2) / scale),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.6},
            )
        taken.append(own)
        labels.append(label)
    return labels


def _is_free(own: "Bbox", inside: "Bbox", taken: "list[Bbox]") -> bool:
    within = inside.x0 <= own.x0 and own.x1 <= inside.x1 and inside.y0 <= own.y0 and own.y1 <= inside.y1
    return within and not any(own.overlaps(other) for other in taken)


def _offsets(width: float, height: float, scale: float) -> list[tuple[float, float]]:
    """Lower left corners of a name from its point, in pixels, the nearest first."""
    right, left, step = _GAP * scale, -_GAP * scale - width, _STEP * scale
    return [
        (dx, sign * turn * step - height / 2)
        for turn in range(_TRIES)
        for sign in ((1, -1) if turn else (1,))
        for dx in (right, left)
    ]


def _elsewhere(
    inside: "Bbox", point: tuple[float, float], width: float, height: float
) -> Iterator[tuple[float, float]]:
    """Offsets of places all over the panel, from above."""
    for y in np.arange(inside.y1 - height, inside.y0, -height / 2):
        for x in np.arange(inside.x0, inside.x1 - width, width / 4):
            yield float(x - point[0]), float(y - point[1])
