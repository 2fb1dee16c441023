"""What all plots share: a picture with its words, colours that colour-blind eyes tell apart, small multiples.

Colours are Okabe and Ito's. No plot relies on them: markers, dashes and labels at the lines say the same in grey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#767676",
)  # fmt: skip
INK = {
    ORANGE: "#8A5A00", SKY: "#1B6A9C", GREEN: "#00694D", BLUE: "#005A8C", VERMILION: "#A84400", PURPLE: "#8A3A66",
}  # fmt: skip
"""Darker, for words in the colour of what they name."""
EXIT_COLOURS = (ORANGE, BLUE, GREEN, PURPLE, VERMILION, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
Dash = str | tuple[float, tuple[float, ...]]
"""A style of lines, as matplotlib has it."""
DASHES: tuple[Dash, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))

SETTINGS: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#444444", "lines.linewidth": 1.6,
    "lines.markersize": 5.5, "legend.frameon": False, "savefig.facecolor": "white",
    "text.parse_math": False,  # dollars in names are dollars
}  # fmt: skip
"""Of matplotlib, for all plots."""

PANEL_INCHES = (2.45, 2.5)
FIGURE_INCHES = (6.6, 3.8)


@dataclass(frozen=True)
class Plot:
    """A picture that can be drawn, and what it says to those who do not see it."""

    name: str
    """Of its file, without the ending."""
    caption: str
    """What is drawn, with units."""
    finding: str
    """What the picture shows, in numbers: the alternative text."""
    draw: Callable[[], Figure]
    """Within SETTINGS."""


def single(inches: tuple[float, float] = FIGURE_INCHES) -> tuple[Figure, Axes]:
    figure = _figure(inches)
    return figure, figure.subplots()


def _figure(inches: tuple[float, float]) -> Figure:
    """With a canvas that knows how wide words are; pyplot and its list of figures are left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=inches, layout="constrained")).figure


def panels(
    titles: Sequence[str], inches: tuple[float, float] = PANEL_INCHES, num_columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """One panel for each title, at most `num_columns` beside each other, with common axes."""
    num_columns = min(len(titles), num_columns)
    num_rows = ceil(len(titles) / num_columns)
    width = max(inches[0] * num_columns, 3.4)
    figure = _figure((width, inches[1] * num_rows))
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for axes, title in zip(grid, titles):
        axes.set_title(title)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(titles) :]:
        axes.remove()
    return figure, grid[: len(titles)]


def percents(axis: Axis, places: int | None = None) -> None:
    """Show the shares of an axis as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=places))


def logarithmic(axis: Axis, format_: Callable[[float], str]) -> None:
    """Label 1, 2, 5, 10 ... of a logarithmic axis instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_(value)))
    axis.set_minor_formatter(NullFormatter())


def layer_words(layer: str | int) -> str:
    """ "8" -> "exit 8"; "final" stays."""
    return "final head" if str(layer) == "final" else f"exit {layer}"
