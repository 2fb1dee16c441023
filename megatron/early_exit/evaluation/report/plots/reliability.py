"""Whether an exit's score means what it says: agreement against score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.schema import Exits, ReliabilityBin

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Bin(NamedTuple):
    """A bin that holds decisions."""

    score: float
    agreement: float
    num_decisions: int


Bins = Mapping[str, Sequence[Bin]]
"""By layer."""


def reliability(results: Exits) -> base.Plot | None:
    """A panel for each exit. None without bins."""
    errors = {str(head.layer): head.ece for head in results.heads if not head.is_final}
    bins = {layer: _known(results.reliability[layer]) for layer in sorted(results.reliability, key=_depth)}
    bins = {layer: known for layer, known in bins.items() if known and (layer in errors or not errors)}
    if not bins:
        return None
    return base.Plot(
        "reliability",
        "For each exit: share of decisions that agree with the full model (vertical) against the mean score of "
        "their bin (horizontal); the area of a marker is the number of decisions. On the dotted diagonal the score "
        "is the probability of being right; below it the exit is too sure of itself.",
        " ".join(_finding(layer, known, errors.get(layer)) for layer, known in bins.items()),
        lambda: _draw(bins, errors),
    )


def _depth(layer: str) -> tuple[bool, int]:
    return (not layer.isdigit(), int(layer) if layer.isdigit() else 0)


def _known(bins: Sequence[ReliabilityBin]) -> list[Bin]:
    return [
        Bin(one.score, one.agreement, one.count)
        for one in bins
        if one.count and one.score is not None and one.agreement is not None
    ]


def _finding(layer: str, bins: Sequence[Bin], error: float | None) -> str:
    total = sum(one.num_decisions for one in bins)
    gap = sum(one.num_decisions * (one.score - one.agreement) for one in bins) / total
    words = (
        "too sure of itself" if gap > 0.02 else "not sure enough of itself" if gap < -0.02 else "calibrated on average"
    )
    said = "" if error is None else f", expected calibration error {error:.3f}"
    return f"Exit {layer} is {words} (score minus agreement {gap:+.3f}{said})."


def _draw(bins: Bins, errors: Mapping[str, float | None]) -> Figure:
    titles = [
        f"exit after layer {layer}" + (f" · ECE {errors[layer]:.3f}" if errors.get(layer) is not None else "")
        for layer in bins
    ]
    figure, all_axes = base.panels(titles)
    most = max(one.num_decisions for known in bins.values() for one in known)
    for axes, known, colour in zip(all_axes, bins.values(), base.EXIT_COLOURS):
        axes.plot([0, 1], [0, 1], color="#555555", linestyle=":", linewidth=1.1)
        scores, shares = [one.score for one in known], [one.agreement for one in known]
        axes.plot(scores, shares, color=colour, linewidth=1.1)
        sizes = [8 + 120 * one.num_decisions / most for one in known]
        axes.scatter(scores, shares, s=sizes, color=colour, edgecolor="white", linewidth=0.5, zorder=3)
        base.percents(axes.yaxis)
    all_axes[0].set(xlim=(0, 1.03), ylim=(0, 1.03), xticks=(0, 0.5, 1))
    figure.supxlabel("score of the exit", fontsize=9)
    figure.supylabel("agrees with the full model", fontsize=9)
    return figure
