"""Parts of a step as bars, one bar for each batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

GROUNDS = ("#0072B2", "#F0E442", "#B8B8B8", "#56B4E9", "#E69F00", "#009E73")
"""The first ones, of layers, head and rest, differ in grey too."""


Step = Mapping[str, float]
"""Seconds of each part, none below 0."""


def step_parts(steps: Mapping[int, Step]) -> base.Plot | None:
    """steps: by batch size. None with fewer than two parts."""
    names = list(dict.fromkeys(part for step in steps.values() for part in step))[: len(GROUNDS)]
    if len(names) < 2:
        return None
    return base.Plot(
        "step_parts",
        "Shares of the parts of a decoding step of the full model (horizontal), for each batch size.",
        " ".join(_finding(batch, of_step) for batch, of_step in steps.items()),
        lambda: _draw(steps, names),
    )


def _finding(batch: int, of_step: Step) -> str:
    largest, total = max(of_step, key=of_step.__getitem__), sum(of_step.values())
    share = f": {of_step[largest] / total:.0%}" if total > 0 else ""
    return f"At batch {batch} most of a step of {1e3 * total:.2f} ms goes to {largest}{share}."


def _draw(steps: Mapping[int, Step], names: Sequence[str]) -> Figure:
    figure, axes = base.single((6.6, 1.1 + 0.36 * len(steps)))
    for height, of_step in enumerate(steps.values()):
        shown = {name: of_step.get(name, 0.0) for name in names}
        begin, total = 0.0, sum(shown.values()) or 1.0
        for name, ground in zip(names, GROUNDS):
            share = shown[name] / total
            axes.barh(height, share, 0.72, begin, color=ground, edgecolor="white", linewidth=0.8)
            if share > 0.05:
                ink = "white" if ground == GROUNDS[0] else "black"
                axes.text(begin + share / 2, height, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
            begin += share
    axes.set_yticks(range(len(steps)), [f"batch {batch}" for batch in steps])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1)
    base.percents(axes.xaxis)
    axes.set_xlabel("share of the time of a step")
    handles = [_patch(name, ground) for name, ground in zip(names, GROUNDS)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _patch(name: str, ground: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(facecolor=ground, edgecolor="#888888", linewidth=0.5, label=name)
