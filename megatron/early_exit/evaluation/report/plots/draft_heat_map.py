"""Speed of self-speculation by drafting exit and length of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron.early_exit.evaluation.report.plots import base
from megatron.early_exit.evaluation.report.schema import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drafting(NamedTuple):
    """Self-speculation from one exit, whose speed is known."""

    exit_layer: int
    length: int | str
    batch: int
    speedup: float
    acceptance: float | None


def _drafting(rows: Sequence[Row]) -> list[Drafting]:
    return [
        Drafting(row.draft_exit, row.draft_length, row.batch, row.speedup, row.acceptance)
        for row in rows
        if row.draft_exit and row.draft_length is not None and row.speedup is not None
    ]


def draft_heat_map(rows: Sequence[Row]) -> base.Plot | None:
    """Of the smallest batch. None with fewer than two lengths and exits together."""
    drafting = _drafting(rows)
    smallest = min((one.batch for one in drafting), default=0)
    drafting = [one for one in drafting if one.batch == smallest]
    if len({(one.exit_layer, one.length) for one in drafting}) < 2:
        return None
    best = max(drafting, key=lambda one: one.speedup)
    return base.Plot(
        "draft_heat_map",
        f"Measured speed-up of self-speculative decoding over the full model at batch {smallest}, by drafting exit "
        "(vertical) and tokens drafted at once (horizontal); below it, the share of drafts that was accepted.",
        f"The best is {best.speedup:.2f} times the full model's speed, with drafts of {best.length} from exit "
        f"{best.exit_layer}.",
        lambda: _draw(drafting),
    )


def _draw(drafting: Sequence[Drafting]) -> Figure:
    exits = sorted({one.exit_layer for one in drafting})
    lengths = sorted({one.length for one in drafting}, key=lambda length: (isinstance(length, str), length))
    cells = {(one.exit_layer, one.length): one for one in drafting}
    figure, axes = base.single((6.6, 1.2 + 0.55 * len(exits)))
    values = [[cells[e, n].speedup if (e, n) in cells else float("nan") for n in lengths] for e in exits]
    distance = max(abs(one.speedup - 1) for one in drafting) or 0.1
    image = axes.imshow(values, cmap="PuOr", vmin=1 - distance, vmax=1 + distance, aspect="auto")
    best = max(drafting, key=lambda one: one.speedup)
    for (exit_layer, length), one in cells.items():
        is_dark = abs(one.speedup - 1) > 0.6 * distance
        accepted = "" if one.acceptance is None else f"\n{one.acceptance:.0%}"
        axes.text(
            lengths.index(length), exits.index(exit_layer), f"{one.speedup:.2f}×{accepted}", ha="center", va="center",
            fontsize=8, color="white" if is_dark else "black", fontweight="bold" if one is best else "normal",
        )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [str(one) for one in lengths])
    axes.set_yticks(range(len(exits)), [f"exit {one}" for one in exits])
    axes.set_xlabel("tokens drafted at once")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("speed-up (×), 1 = full model", fontsize=8)
    bar.outline.set_visible(False)
    return figure
