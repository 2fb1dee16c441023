"""How often an exit errs on the share of tokens that leave there, as the threshold falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.schema import CoveragePoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """A point of a curve whose place is known."""

    coverage: float
    risk: float
    oracle_risk: float | None


Curves = Mapping[str, Sequence[Point]]
"""By layer, from small coverage to all."""


def coverage_risk(by_layer: Mapping[str, Sequence[CoveragePoint]]) -> base.Plot | None:
    """A panel for each exit. None without points."""
    curves = {layer: _known(by_layer[layer]) for layer in sorted(by_layer, key=int)}
    curves = {layer: points for layer, points in curves.items() if points}
    if not curves:
        return None
    return base.Plot(
        "coverage_risk",
        "For each exit: of the decisions that would leave there, the share that differ from the full model "
        "(vertical) against the share that leave (horizontal), from high thresholds at the left to low ones at the "
        "right. Dashed: the oracle, a score that puts every right decision before every wrong one.",
        " ".join(_finding(layer, points) for layer, points in curves.items()),
        lambda: _draw(curves),
    )


def _known(points: Sequence[CoveragePoint]) -> list[Point]:
    known = [
        Point(point.coverage, point.risk, point.oracle_risk)
        for point in points
        if point.coverage is not None and point.risk is not None
    ]
    return sorted(known, key=lambda point: point.coverage)


def _finding(layer: str, points: Sequence[Point]) -> str:
    safe = [point.coverage for point in points if point.risk <= 0.05]
    share = f"{max(safe):.0%} of the decisions can leave" if safe else "no share of the decisions leaves"
    return f"Exit {layer}: {share} with at most 5% of these wrong; {points[-1].risk:.0%} are wrong if all leave."


def _draw(curves: Curves) -> Figure:
    figure, all_axes = base.panels([f"exit after layer {layer}" for layer in curves])
    for axes, points, colour, marker in zip(all_axes, curves.values(), base.EXIT_COLOURS, base.MARKERS):
        coverage = [point.coverage for point in points]
        axes.plot(coverage, [point.risk for point in points], color=colour, label="exit's score")
        shown = points[:: max(len(points) // 6, 1)]
        axes.plot(
            [p.coverage for p in shown], [p.risk for p in shown], color=colour, marker=marker, linestyle="", zorder=3
        )
        oracle = [(point.coverage, point.oracle_risk) for point in points if point.oracle_risk is not None]
        axes.plot(
            [covered for covered, _ in oracle], [risk for _, risk in oracle], color="#555555", linestyle=(0, (5, 2)),
            linewidth=1.2, label="oracle",
        )  # fmt: skip
        base.percents(axes.xaxis)
        base.percents(axes.yaxis)
    highest = max(point.risk for points in curves.values() for point in points)
    all_axes[0].set(xlim=(0, 1.02), xticks=(0, 0.5, 1), ylim=(0, min(1.08 * highest + 1e-3, 1.02)))
    handles = all_axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2, fontsize=8)
    figure.supxlabel("decisions that leave here", fontsize=9)
    figure.supylabel("of these, wrong", fontsize=9)
    return figure
