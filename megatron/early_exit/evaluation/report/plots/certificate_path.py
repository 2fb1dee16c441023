"""The grid along which thresholds were tested: risk at each point, and where the tests stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points
from megatron.early_exit.evaluation.report.schema import Certificate, PathPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def certificate_path(card: Certificate) -> base.Plot | None:
    """None with fewer than two points."""
    points = [point for point in card.path if None not in (point.budget, point.risk, point.p_value)]
    if len(points) < 2:
        return None
    num_accepted = accepted(points, card.delta)
    chosen = f"point {num_accepted} of {len(points)}" if num_accepted else "none"
    return base.Plot(
        f"certificate_path_{1000 * card.level:.0f}",
        f"Promise {card.level:.1%}: risk on the calibration prompts (vertical) at the points of the grid that was "
        f"fixed before (horizontal: the risk for which each point was tuned). Filled: the test with p ≤ "
        f"{card.delta:g} says that the risk is below the promised bound (dashed), there and at all points before.",
        f"Of the grid the last accepted is {chosen}"
        + (f", with a calibration risk of {points[num_accepted - 1].risk:.2%}." if num_accepted else "."),
        lambda: _draw(card, points, num_accepted),
    )


def accepted(points: Sequence[PathPoint], delta: float) -> int:
    """How many points in a row, from the first, the test accepts."""
    for number, point in enumerate(points):
        if point.p_value > delta:
            return number
    return len(points)


def _draw(card: Certificate, points: Sequence[PathPoint], num_accepted: int) -> Figure:
    figure, axes = base.single((6.6, 2.7))
    bound = 1 - card.level
    axes.axhline(bound, color="#555555", linestyle=(0, (5, 2)), linewidth=1.1)
    budgets, risks = [point.budget for point in points], [point.risk for point in points]
    axes.plot(budgets, risks, color="#BBBBBB", linewidth=1.1, zorder=1)
    axes.plot(budgets[:num_accepted], risks[:num_accepted], "o", color=base.GREEN, label="accepted")
    axes.plot(
        budgets[num_accepted:], risks[num_accepted:], "o", color=base.VERMILION, markerfacecolor="white",
        label="not accepted",
    )  # fmt: skip
    axes.margins(0.06)
    axes.set_ylim(0, 1.15 * max(bound, *risks))
    base.percents(axes.xaxis)
    base.percents(axes.yaxis)
    axes.set_xlabel("risk for which the thresholds were tuned")
    axes.set_ylabel("risk on calibration prompts")
    figure.legend(loc="outside upper left", ncols=2)
    left = min(budgets)
    axes.annotate(
        f"promised: at most {bound:.1%}", (left, bound), (0, 3), textcoords="offset points", fontsize=8, color="#444444"
    )
    if num_accepted:
        last = points[num_accepted - 1]
        words = f"certified: {last.risk:.2%}, p = {last.p_value:.3f}"
        label_points(axes, [Label(last.budget, last.risk, words, base.GREEN, True)], list(zip(budgets, risks)))
    return figure
