"""The settings of thresholds along which a promise was tested: risk at each, and where the tests stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points
from megatron.early_exit.evaluation.report.schema import Certificate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Tested(NamedTuple):
    """A point of the path of which all numbers are known."""

    budget: float
    risk: float
    p_value: float
    is_of_thresholds: bool
    """Whether it is one threshold of all exits, rather than a risk that thresholds were tuned for."""


def tested(card: Certificate) -> list[Tested]:
    """In the order of the test."""
    return [
        Tested(
            one.budget, one.risk, one.p_value,
            is_of_thresholds=bool(one.thresholds) and set((one.thresholds or {}).values()) == {one.budget},
        )
        for one in card.path
        if one.budget is not None and one.risk is not None and one.p_value is not None
    ]  # fmt: skip


def certificate_path(card: Certificate) -> base.Plot | None:
    """None with fewer than two points."""
    points = tested(card)
    if len(points) < 2:
        return None
    num_accepted = accepted(points, card.delta_of_test)
    what = "threshold of all exits" if _is_of_thresholds(points) else "risk for which they were tuned"
    return base.Plot(
        f"certificate_path_{1e4 * card.level:.0f}",
        f"Settings of thresholds from safe (left) to risky, fixed before the calibration prompts were looked at "
        f"(horizontal: the {what}), and their risk on the calibration prompts (vertical). Filled: p at most "
        f"{card.delta_of_test:g} there and at all settings before. Tests stop at the first that fails.",
        _finding(card, points, num_accepted),
        lambda: _draw(card, points, num_accepted, what),
    )


def accepted(points: Sequence[Tested], delta: float) -> int:
    """How many points in a row, from the first, the test accepts."""
    return next((number for number, point in enumerate(points) if point.p_value > delta), len(points))


def _is_of_thresholds(points: Sequence[Tested]) -> bool:
    return all(point.is_of_thresholds for point in points)


def _finding(card: Certificate, points: Sequence[Tested], num_accepted: int) -> str:
    if not num_accepted:
        return f"Promise {card.level:.6g}: not even the safest setting is accepted, with p = {points[0].p_value:.3f}."
    last = points[num_accepted - 1]
    return (
        f"For a risk of at most {1 - card.level:.2%}, {num_accepted} settings in a row are accepted; the last one has "
        f"a risk of {last.risk:.2%} on the calibration prompts (p = {last.p_value:.3f})."
    )


def _draw(card: Certificate, points: Sequence[Tested], num_accepted: int, what: str) -> Figure:
    figure, axes = base.single((6.6, 2.7))
    bound, budgets, risks = 1 - card.level, [point.budget for point in points], [point.risk for point in points]
    axes.axhline(bound, color="#555555", linestyle=(0, (5, 2)), linewidth=1.1)
    axes.plot(budgets, risks, color="#BBBBBB", linewidth=1.1, zorder=1)
    axes.plot(budgets[:num_accepted], risks[:num_accepted], "o", color=base.GREEN, markersize=4.5, label="accepted")
    axes.plot(
        budgets[num_accepted:], risks[num_accepted:], "o", color=base.VERMILION, markerfacecolor="white",
        label="not accepted",
    )  # fmt: skip
    if _is_of_thresholds(points):
        axes.margins(0.06)
        axes.invert_xaxis()
    else:
        axes.set_xscale("log")
        axes.margins(0.06)
        base.logarithmic(axes.xaxis, lambda value: f"{100 * value:.6g}%")
    axes.set_ylim(0, 1.18 * max(bound, *risks))
    base.percents(axes.yaxis)
    axes.set_xlabel(f"{what}{'' if _is_of_thresholds(points) else ' (logarithmic)'}")
    axes.set_ylabel("risk on calibration prompts")
    figure.legend(loc="outside upper left", ncols=2)
    axes.annotate(
        f"promised: at most {100 * bound:.6g}%", (0.01, bound), (0, 3), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", fontsize=8, color="#444444",
    )  # fmt: skip
    if num_accepted:
        last = points[num_accepted - 1]
        words = f"certified: {last.risk:.2%}, p = {last.p_value:.3f}"
        label_points(axes, [Label(last.budget, last.risk, words, base.GREEN, True, True)], list(zip(budgets, risks)))
    return figure
