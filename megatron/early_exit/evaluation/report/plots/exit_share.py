"""Which head gives the token, by its place in the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.plots.labels import Label, label_ends
from megatron.early_exit.evaluation.report.schema import Shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUNDS = ("#F0E442", "#56B4E9", "#009E73", "#D55E00", "#0072B2")
"""Of exits, from light to dark, so that neighbours differ in grey too."""
FINAL = "#4D4D4D"


def exit_share(shares: Sequence[Shares]) -> base.Plot | None:
    """None with fewer than two positions."""
    shares = sorted(shares, key=lambda one: one.position)
    if len(shares) < 2:
        return None
    heads = sorted({name for one in shares for name in one.shares}, key=lambda name: (name == "final", _number(name)))
    series = {name: [one.shares.get(name) or 0.0 for one in shares] for name in heads}
    means = ", ".join(f"{words} {share:.0%}" for words, share in _means(series).items())
    return base.Plot(
        "exit_share",
        "Share of decisions (vertical) that each head gives, by the token's position in the answer (horizontal), one "
        "above the other from the shallowest exit to the final head. Beside them: the mean over positions.",
        f"Mean over {len(shares)} positions: {means}.",
        lambda: _draw([one.position for one in shares], series),
    )


def _number(name: str) -> int:
    return int(name) if name.isdigit() else 0


def _means(series: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {base.layer_words(name): sum(values) / len(values) for name, values in series.items()}


def _draw(positions: Sequence[int], series: Mapping[str, Sequence[float]]) -> Figure:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure, axes = base.single((6.6, 2.9))
    grounds = dict(zip([name for name in series if name != "final"], GROUNDS)) | {"final": FINAL}
    below, labels = [0.0] * len(positions), []
    for (name, values), (words, mean) in zip(series.items(), _means(series).items()):
        above = [low + value for low, value in zip(below, values)]
        axes.fill_between(
            positions, below, above, step="mid", color=grounds.get(name, base.GREY), edgecolor="white", linewidth=0.8,
            zorder=2,
        )  # fmt: skip
        labels.append(Label(positions[-1], (below[-1] + above[-1]) / 2, f"{words}: {mean:.0%}", "#222222"))
        below = above
    axes.set(xlim=(positions[0], positions[-1]), ylim=(0, 1))
    axes.set_xlabel("position in the answer (tokens)")
    axes.set_ylabel("share of decisions")
    base.percents(axes.yaxis)
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine), "figures of `base` have this layout"
    layout.set(rect=(0, 0, 0.84, 1))  # room for the words beside the axes
    label_ends(axes, labels)
    return figure
