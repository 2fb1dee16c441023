"""Words beside points and lines, placed so that they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots.base import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_OFFSETS = (
    (7, 0), (7, 8), (7, -8), (-7, 0), (-7, 8), (-7, -8), (0, 10), (0, -10), (9, 15), (-9, 15), (9, -15), (-9, -15),
    (20, 20), (-20, 20), (20, -20), (-20, -20), (30, 28), (-30, 28), (30, -28), (-30, -28), (40, 40), (-40, -40),
)  # fmt: skip
"""Points of the page, from the nearest to those that need a line to what they name."""
_NEEDS_LINE = 14
_NEAR = tuple(offset for offset in _OFFSETS if abs(offset[1]) <= _NEEDS_LINE)


@dataclass(frozen=True)
class Label:
    """A word for the point (x, y) of the data; an important one may stand further off, with a line."""

    x: float
    y: float
    words: str
    colour: str
    is_important: bool = False
    is_bold: bool = False


def label_points(axes: Axes, labels: Sequence[Label], obstacles: Sequence[tuple[float, float]] = ()) -> list[str]:
    """Write each label where there is room, important ones first; returns the words of those that found none.

    obstacles: points of the data that stay free. Call it last: it needs the final size of the axes."""
    figure = _figure_of(axes)
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    inside = axes.get_window_extent()
    taken = [_around(axes, point, 3.5 * scale) for point in (*obstacles, *((one.x, one.y) for one in labels))]
    left_out = []
    for label in sorted(labels, key=lambda one: not one.is_important):
        box = _write(axes, label, inside, taken)
        if box is None:
            left_out.append(label.words)
        else:
            taken.append(box)
    return left_out


def _figure_of(artist: Axes | Annotation) -> Figure:
    from matplotlib.figure import Figure

    assert isinstance(artist.figure, Figure), "plots have no figures within figures"
    return artist.figure


def _around(axes: Axes, point: tuple[float, float], radius: float) -> Bbox:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(point)
    return Bbox([[x - radius, y - radius], [x + radius, y + radius]])


def _write(axes: Axes, label: Label, inside: Bbox, taken: Sequence[Bbox]) -> Bbox | None:
    from matplotlib.patheffects import withStroke

    ink = INK.get(label.colour, label.colour)
    line = {"arrowstyle": "-", "lw": 0.6, "color": ink, "shrinkB": 3}
    for dx, dy in _OFFSETS if label.is_important else _NEAR:
        text = axes.annotate(
            label.words, (label.x, label.y), (dx, dy), textcoords="offset points", fontsize=7.5, color=ink,
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="center" if abs(dy) <= 8 and dx else "bottom" if dy > 0 else "top",
            fontweight="bold" if label.is_bold else "normal",
            arrowprops=line if abs(dy) > _NEEDS_LINE else None,
            path_effects=[withStroke(linewidth=2, foreground="white")], zorder=5,
        )  # fmt: skip
        text.set_in_layout(False)
        box = _words_alone(text)
        if _holds(inside, box) and not any(box.overlaps(other) for other in taken):
            return box
        text.remove()
    return None


def _words_alone(text: Annotation) -> Bbox:
    """Without the line to what they name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = _figure_of(text).canvas
    assert isinstance(canvas, FigureCanvasAgg), "figures of `base` have this canvas"
    renderer = canvas.get_renderer()
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer).padded(1.0)


def _holds(outer: Bbox, inner: Bbox) -> bool:
    begins_inside = outer.x0 <= inner.x0 and outer.y0 <= inner.y0
    return bool(begins_inside and inner.x1 <= outer.x1 + 2 and inner.y1 <= outer.y1 + 2)


def label_ends(axes: Axes, labels: Sequence[Label], gap: float = 10.0) -> None:
    """Write words to the right of the axes at the heights where lines end, at least `gap` points apart."""
    figure = _figure_of(axes)
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    scale = figure.dpi / 72
    heights = [axes.transData.transform((label.x, label.y))[1] / scale for label in labels]
    order = sorted(range(len(labels)), key=heights.__getitem__)
    placed = dict(zip(order, spread([heights[i] for i in order], gap)))
    for i, label in enumerate(labels):
        axes.annotate(
            label.words, (1.0, (placed[i] * scale - inside.y0) / inside.height), (5, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", color=label.colour, fontsize=8,
            fontweight="bold" if label.is_bold else "normal", annotation_clip=False,
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The ascending `heights` moved as little as brings them `gap` apart: neighbours that are too near form a group
    around their mean."""
    groups: list[list[float]] = []  # [sum of what the first member's height would be, number of members]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and _first(groups[-1]) < _first(groups[-2]) + gap * groups[-2][1]:
            total, count = groups.pop()
            groups[-1][0] += total - count * gap * groups[-1][1]
            groups[-1][1] += count
    return [_first(group) + i * gap for group in groups for i in range(int(group[1]))]


def _first(group: Sequence[float]) -> float:
    return group[0] / group[1]
