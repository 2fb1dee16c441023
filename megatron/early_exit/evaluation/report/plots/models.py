"""Several models beside each other: agreement of their exits by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points
from megatron.early_exit.evaluation.report.schema import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def models(heads: Mapping[str, Sequence[Head]]) -> base.Plot | None:
    """heads: by the model's name. None with fewer than two models."""
    lines = {name: _line(own) for name, own in heads.items()}
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if len(lines) < 2:
        return None
    return base.Plot(
        "models",
        "Share of tokens on which a head agrees with the full model (vertical), by the share of the layers that lie "
        "below it (horizontal). The final head agrees with itself. Each model was measured on its own text.",
        " ".join(f"{name}: {_exits(line)}." for name, line in lines.items()),
        lambda: _draw(lines),
    )


def _line(heads: Sequence[Head]) -> list[tuple[float, float]]:
    known = sorted((head.layer, head.agreement) for head in heads if head.agreement is not None)
    return [(layer / known[-1][0], agreement) for layer, agreement in known]


def _exits(line: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{agreement:.0%} at {depth:.0%} of the depth" for depth, agreement in line[:-1])


def _draw(lines: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    figure, axes = base.single((6.6, 3.2))
    looks = zip(base.EXIT_COLOURS[1:] + base.EXIT_COLOURS[:1], base.MARKERS, base.DASHES)
    labels = []
    for (name, line), (colour, marker, dash) in zip(lines.items(), looks):
        axes.plot(*zip(*line), color=colour, marker=marker, linestyle=dash)
        depth, agreement = line[-2]
        labels.append(Label(depth, agreement, name, colour, True, True))
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04))
    base.percents(axes.xaxis)
    base.percents(axes.yaxis)
    axes.set_xlabel("depth of the head (share of layers)")
    axes.set_ylabel("agrees with the full model")
    label_points(axes, labels, [point for line in lines.values() for point in line])
    return figure
