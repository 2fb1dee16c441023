"""Agreement with the full model against measured speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron.early_exit.evaluation.report.plots import base, modes
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points
from megatron.early_exit.evaluation.report.schema import Interval, Row, known_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MOST_PANELS = 4


class Point(NamedTuple):
    """A way to decode of which both numbers are known."""

    row: Row
    speedup: float
    agreement: float


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Rows of which a number is unknown are left out."""
    return [
        Point(row, row.speedup, row.agreement) for row in rows if row.speedup is not None and row.agreement is not None
    ]


def pareto(rows: Sequence[Row]) -> base.Plot | None:
    """A panel for each batch size. None if fewer than two ways to decode have both numbers."""
    known = _fastest_drafts(points_of(rows))
    batches = sorted({point.row.batch for point in known})[:MOST_PANELS]
    known = [point for point in known if point.row.batch in batches]
    if len(known) < 2:
        return None
    return base.Plot(
        "pareto",
        "Share of tokens that the full model would have taken (vertical, does not begin at zero) against measured "
        "speed-up over the full model (horizontal), with 95% intervals (at 100% agreement those are in the table "
        "alone). Up and to the right is better. The grey line joins the ways that no other beats in both. Of drafts "
        "from one exit, the fastest length alone is shown.",
        _finding(known),
        lambda: _draw(known, batches),
    )


def _fastest_drafts(points: Sequence[Point]) -> list[Point]:
    """All points but those of self-speculation that another length from the same exit beats: all of them give the full
    model's answers, and would lie on one line."""
    best: dict[object, Point] = {}
    for point in points:
        row = point.row
        key = (row.batch, row.draft_exit) if row.draft_exit else id(row)
        if key not in best or point.speedup > best[key].speedup:
            best[key] = point
    return list(best.values())


def _finding(points: Sequence[Point]) -> str:
    fastest = max(points, key=lambda point: point.speedup)
    words = f"The fastest is {fastest.row.name} at batch {fastest.row.batch}: {fastest.speedup:.2f} times the full "
    words += f"model's speed with {fastest.agreement:.1%} agreement."
    by_level: dict[float, list[Point]] = {}
    for point in points:
        if point.row.level is not None:
            by_level.setdefault(point.row.level, []).append(point)
    for level in sorted(by_level):
        own = sorted(by_level[level], key=lambda point: point.row.batch)
        speeds = ", ".join(f"{one.speedup:.2f} times ({one.agreement:.1%}) at batch {one.row.batch}" for one in own)
        words += f" Certified at {100 * level:.6g}%: {speeds}."
    return words


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both numbers, from slow to fast."""
    best, found = -1.0, []
    for point in sorted(points, key=lambda point: (-point.speedup, -point.agreement)):
        if point.agreement > best:
            best = point.agreement
            found.append(point)
    return found[::-1]


def _draw(points: Sequence[Point], batches: Sequence[int]) -> Figure:
    if len(batches) == 1:
        figure, axes = base.single()
        all_axes = [axes]
    else:
        figure, all_axes = base.panels([f"batch {batch}" for batch in batches], (3.4, 3.0), num_columns=2)
    for axes in all_axes:
        axes.margins(0.12)
        axes.set_ylim(*_heights(points))
        axes.axvline(1, color="#999999", linewidth=0.9, linestyle=":")
        base.percents(axes.yaxis)
    of_batch = [[point for point in points if point.row.batch == batch] for batch in batches]
    for axes, own in zip(all_axes, of_batch):
        _points(axes, own)
    figure.supxlabel("measured speed-up over the full model (×)", fontsize=9)
    figure.supylabel("tokens that agree with the full model", fontsize=9)
    kinds = [kind for kind in modes.LOOKS if any(modes.kind_of(one.row) == kind for one in points)]
    figure.legend(handles=[_handle(kind) for kind in kinds], loc="outside upper left", ncols=len(kinds))
    for axes, own in zip(all_axes, of_batch):
        best = frontier(own)
        rank = lambda point, best=best: (point.row.level is None, not point.row.is_baseline, point not in best)
        labels = [_label(one, one in best or one.row.is_baseline) for one in sorted(own, key=rank)]
        label_points(axes, labels, [place for point in own for place in _along_errors(point)])
    return figure


def _label(point: Point, is_important: bool) -> Label:
    row, speedup, agreement = point
    is_certified = row.level is not None
    colour = modes.LOOKS[modes.kind_of(row)][1]
    return Label(speedup, agreement, modes.short_name(row), colour, is_important or is_certified, is_certified)


def _along_errors(point: Point) -> list[tuple[float, float]]:
    """Places on the lines of the intervals, which labels leave free."""
    across = _steps(*_bounds(point.speedup, point.row.speedup_interval))
    up = _steps(*_bounds(point.agreement, _agreement_interval(point.row)))
    return [*((x, point.agreement) for x in across), *((point.speedup, y) for y in up)]


def _steps(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 40 for i in range(41)]


def _agreement_interval(row: Row) -> Interval:
    """None where all agree: what few prompts leave open there would be lines across all the rest."""
    return None if row.agreement == 1 else row.agreement_interval


def _bounds(value: float, interval: Interval) -> tuple[float, float]:
    return known_interval(interval) or (value, value)


def _heights(points: Sequence[Point]) -> tuple[float, float]:
    """All points; intervals of few prompts may be longer than what is left to see of the points."""
    lowest = min(point.agreement for point in points)
    room = max(1 - lowest, 0.02)
    return lowest - 0.35 * room, 1 + 0.12 * room


def _handle(kind: str) -> Line2D:
    from matplotlib.lines import Line2D

    name, colour, marker = modes.LOOKS[kind]
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=name, markersize=modes.SIZES.get(kind, 6))


def _points(axes: Axes, points: Sequence[Point]) -> None:
    best = frontier(points)
    axes.plot([point.speedup for point in best], [point.agreement for point in best], color="#BBBBBB", zorder=1)
    for row, speedup, agreement in points:
        _, colour, marker = modes.LOOKS[modes.kind_of(row)]
        axes.errorbar(
            speedup, agreement, xerr=_errors(speedup, row.speedup_interval),
            yerr=_errors(agreement, _agreement_interval(row)), color=colour, marker=marker,
            markersize=modes.size_of(row), markeredgecolor="white", markeredgewidth=0.6, elinewidth=0.9, zorder=3,
        )  # fmt: skip


def _errors(value: float, interval: Interval) -> list[list[float]] | None:
    """Lengths below and above the value, as matplotlib wants them."""
    low, high = _bounds(value, interval)
    return None if low == high else [[max(value - low, 0)], [max(high - value, 0)]]
