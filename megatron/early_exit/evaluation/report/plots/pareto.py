"""Agreement with the full model against measured speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base, modes
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points
from megatron.early_exit.evaluation.report.schema import Interval, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 4


def pareto(rows: Sequence[Row]) -> base.Plot | None:
    """A panel for each batch size. None if fewer than two ways to decode have both numbers."""
    known = _fastest_drafts([row for row in rows if row.speedup is not None and row.agreement is not None])
    batches = sorted({row.batch for row in known})[:MOST_PANELS]
    known = [row for row in known if row.batch in batches]
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


def _fastest_drafts(rows: Sequence[Row]) -> list[Row]:
    """All rows but those of self-speculation that another length from the same exit beats: all of them give the full
    model's answers, and would lie on one line."""
    best: dict[object, Row] = {}
    for row in rows:
        key = (row.batch, row.draft_exit) if row.draft_exit else id(row)
        if key not in best or row.speedup > best[key].speedup:
            best[key] = row
    return list(best.values())


def _finding(rows: Sequence[Row]) -> str:
    fastest = max(rows, key=lambda row: row.speedup)
    words = f"The fastest is {fastest.name} at batch {fastest.batch}: {fastest.speedup:.2f} times the full model's "
    words += f"speed with {fastest.agreement:.1%} agreement."
    certified = sorted((row for row in rows if row.level is not None), key=lambda row: (row.level, row.batch))
    by_level = {row.level: [one for one in certified if one.level == row.level] for row in certified}
    for level, own in by_level.items():
        speeds = ", ".join(f"{row.speedup:.2f} times ({row.agreement:.1%}) at batch {row.batch}" for row in own)
        words += f" Certified at {100 * level:.6g}%: {speeds}."
    return words


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats in both numbers, from slow to fast."""
    best, found = -1.0, []
    for row in sorted(rows, key=lambda row: (-row.speedup, -row.agreement)):
        if row.agreement > best:
            best = row.agreement
            found.append(row)
    return found[::-1]


def _draw(rows: Sequence[Row], batches: Sequence[int]) -> Figure:
    if len(batches) == 1:
        figure, axes = base.single()
        all_axes = [axes]
    else:
        figure, all_axes = base.panels([f"batch {batch}" for batch in batches], (3.4, 3.0), num_columns=2)
    for axes in all_axes:
        axes.margins(0.12)
        axes.set_ylim(*_heights(rows))
        axes.axvline(1, color="#999999", linewidth=0.9, linestyle=":")
        base.percents(axes.yaxis)
    of_batch = [[row for row in rows if row.batch == batch] for batch in batches]
    for axes, own in zip(all_axes, of_batch):
        _points(axes, own)
    figure.supxlabel("measured speed-up over the full model (×)", fontsize=9)
    figure.supylabel("tokens that agree with the full model", fontsize=9)
    kinds = [kind for kind in modes.LOOKS if any(modes.kind_of(row) == kind for row in rows)]
    figure.legend(handles=[_handle(kind) for kind in kinds], loc="outside upper left", ncols=len(kinds))
    for axes, own in zip(all_axes, of_batch):
        best = frontier(own)
        labels = [
            _label(row, row in best or row.is_baseline)
            for row in sorted(own, key=lambda row: (row.level is None, not row.is_baseline, row not in best))
        ]
        label_points(axes, labels, [point for row in own for point in _along_errors(row)])
    return figure


def _label(row: Row, is_important: bool) -> Label:
    is_certified = row.level is not None
    colour = modes.LOOKS[modes.kind_of(row)][1]
    return Label(row.speedup, row.agreement, modes.short_name(row), colour, is_important or is_certified, is_certified)


def _along_errors(row: Row) -> list[tuple[float, float]]:
    """Points on the lines of the intervals, which labels leave free."""
    across = _steps(*_bounds(row.speedup, row.speedup_interval))
    up = _steps(*_bounds(row.agreement, _agreement_interval(row)))
    return [*((x, row.agreement) for x in across), *((row.speedup, y) for y in up)]


def _steps(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 40 for i in range(41)]


def _agreement_interval(row: Row) -> Interval:
    """None where all agree: what few prompts leave open there would be lines across all the rest."""
    return None if row.agreement == 1 else row.agreement_interval


def _bounds(value: float, interval: Interval) -> tuple[float, float]:
    return (value, value) if not interval or None in interval else interval


def _heights(rows: Sequence[Row]) -> tuple[float, float]:
    """All points; intervals of few prompts may be longer than what is left to see of the points."""
    lowest = min(row.agreement for row in rows)
    room = max(1 - lowest, 0.02)
    return lowest - 0.35 * room, 1 + 0.12 * room


def _handle(kind: str) -> object:
    from matplotlib.lines import Line2D

    name, colour, marker = modes.LOOKS[kind]
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=name, markersize=modes.SIZES.get(kind, 6))


def _points(axes: Axes, rows: Sequence[Row]) -> None:
    best = frontier(rows)
    axes.plot([row.speedup for row in best], [row.agreement for row in best], color="#BBBBBB", zorder=1)
    for row in rows:
        _, colour, marker = modes.LOOKS[modes.kind_of(row)]
        axes.errorbar(
            row.speedup, row.agreement, xerr=_errors(row.speedup, row.speedup_interval),
            yerr=_errors(row.agreement, _agreement_interval(row)), color=colour, marker=marker,
            markersize=modes.size_of(row), markeredgecolor="white", markeredgewidth=0.6, elinewidth=0.9, zorder=3,
        )  # fmt: skip


def _errors(value: float, interval: Interval) -> list[list[float]] | None:
    """Lengths below and above the value, as matplotlib wants them."""
    low, high = _bounds(value, interval)
    return None if low == high else [[max(value - low, 0)], [max(high - value, 0)]]
