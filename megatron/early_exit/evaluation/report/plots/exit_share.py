"""Which exit gives the token, by its place in the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.schema import Shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROUNDS = ("#F6C65B", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
_FINAL = "#4D4D4D"


def exit_share(shares: Sequence[Shares]) -> base.Plot | None:
    """None without positions."""
    shares = sorted(shares, key=lambda one: one.position)
    if not shares:
        return None
    heads = sorted({name for one in shares for name in one.shares}, key=lambda name: (name == "final", _number(name)))
    series = {name: [one.shares.get(name) or 0.0 for one in shares] for name in heads}
    means = ", ".join(f"{base.layer_words(name)} {sum(values) / len(values):.0%}" for name, values in series.items())
    return base.Plot(
        "exit_share",
        "Share of tokens (vertical) that each head gives, by the token's place in the answer (horizontal), one above "
        "the other from the shallowest exit to the final head.",
        f"Mean over {len(shares)} positions: {means}.",
        lambda: _draw([one.position for one in shares], series),
    )


def _number(name: str) -> int:
    return int(name) if name.isdigit() else 0


def _draw(positions: Sequence[int], series: dict[str, list[float]]) -> Figure:
    figure, axes = base.single((6.6, 3.0))
    grounds = dict(zip([name for name in series if name != "final"], _GROUNDS)) | {"final": _FINAL}
    bottoms = [0.0] * len(positions)
    width = _bar_width(positions)
    for name, values in series.items():
        axes.bar(
            positions, values, width, bottoms, color=grounds.get(name, base.GREY), edgecolor="white", linewidth=0.3,
            label=base.layer_words(name),
        )  # fmt: skip
        bottoms = [below + value for below, value in zip(bottoms, values)]
    axes.set(xlim=(positions[0] - width, positions[-1] + width), ylim=(0, 1))
    axes.set_xlabel("position in the answer (tokens)")
    axes.set_ylabel("share of tokens")
    axes.grid(visible=False, axis="x")
    base.percents(axes.yaxis)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", title="given by")
    return figure


def _bar_width(positions: Sequence[int]) -> float:
    steps = [later - one for one, later in zip(positions, positions[1:])]
    return 0.95 * min(steps, default=1)
