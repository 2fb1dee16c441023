"""Parts of a step as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.schema import StepPart

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def step_parts(parts: Sequence[StepPart]) -> base.Plot | None:
    """None with fewer than two parts."""
    if len(parts) < 2:
        return None
    total = sum(part.seconds for part in parts)
    largest = max(parts, key=lambda part: part.seconds)
    return base.Plot(
        "step_parts",
        "Milliseconds of each part of a decoding step.",
        f"Most of a step of {1e3 * total:.2f} ms goes to {largest.part}: {largest.seconds / total:.0%}.",
        lambda: _draw(parts, total),
    )


def _draw(parts: Sequence[StepPart], total: float) -> Figure:
    figure, axes = base.single((6.6, 0.9 + 0.27 * len(parts)))
    milliseconds = [1e3 * part.seconds for part in parts]
    axes.barh(range(len(parts)), milliseconds, color=base.BLUE, height=0.68)
    for height, (part, length) in enumerate(zip(parts, milliseconds)):
        axes.annotate(
            f"{part.seconds / total:.0%}", (length, height), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(parts)), [part.part for part in parts])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.08 * max(milliseconds))
    axes.set_xlabel("milliseconds")
    return figure
