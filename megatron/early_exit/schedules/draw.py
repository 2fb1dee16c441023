"""Timelines of a pipeline as a picture: a row for each rank, a box for each pass, several timelines below each other.

Predicted and measured timelines are the same to it. Colours are told apart by colour-blind eyes (Okabe and Ito's
palette): blue for the batch's passes, green for those that fill bubbles, orange for exits; backwards are darker, and
passes of a rank's later model chunks paler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.schedules.plan import Kind
from megatron.early_exit.schedules.simulate import TimedAction, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")

_FORWARD, _BACKWARD, _EXIT = "#8ECDF2", "#0072B2", "#F0A30A"
_FILL_FORWARD, _FILL_BACKWARD = "#9FE3C6", "#00805C"
_IDLE = "#EDEDED"
_LEGEND = {
    "forward": _FORWARD, "backward": _BACKWARD, "exits": _EXIT, "fill: forward": _FILL_FORWARD,
    "fill: backward": _FILL_BACKWARD, "idle": _IDLE,
}  # fmt: skip
_LATER_CHUNKS = {_FORWARD: "#D3ECFA", _BACKWARD: "#5AA5D2"}
"""Paler, of model chunks after a rank's first."""
_LEGEND_LATER_CHUNKS = {
    "forward, later chunk": _LATER_CHUNKS[_FORWARD],
    "backward, later chunk": _LATER_CHUNKS[_BACKWARD],
}
_INCHES_WIDE, _FONT_SIZE, _SMALLEST_FONT = 11.0, 9.0, 5.0


def draw_timelines(timelines: Sequence[Timeline], outputs: Sequence[str | Path], title: str | None = None) -> None:
    """Draw `timelines` from top to bottom with one axis of time, into every file of `outputs`.

    The dashed line is the end of the first one. Boxes carry the number of their microbatch where there is room. Raises
    ValueError for a format that is not one of FORMATS, or without timelines."""
    paths = [Path(output) for output in outputs]
    check_outputs(paths)
    if not timelines:
        raise ValueError("there is no timeline to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    longest = max(timeline.iteration_sec for timeline in timelines)
    per_unit, unit = (1.0, "s") if longest >= 3 else (1e3, "ms") if longest >= 3e-3 else (1e6, "µs")
    row_inches = 0.36 if max(timeline.num_ranks for timeline in timelines) <= 8 else 0.2
    heights = [timeline.num_ranks * row_inches + 0.42 for timeline in timelines]
    with pyplot.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "plan", "font.size": _FONT_SIZE, "hatch.linewidth": 0.6}
    ):
        figure, rows = pyplot.subplots(
            len(timelines), squeeze=False, sharex=True, layout="constrained", height_ratios=heights,
            figsize=(_INCHES_WIDE, sum(heights) + (1.25 if title else 0.95)),
        )  # fmt: skip
        first_sec = timelines[0].iteration_sec
        for axes, timeline in zip(rows[:, 0], timelines, strict=True):
            axes.set_xlim(0, longest * per_unit * 1.005)
            _draw_one(axes, timeline, per_unit)
            axes.axvline(first_sec * per_unit, color="black", linewidth=1.1, linestyle=(0, (4, 3)), zorder=4)
            axes.set_title(_heading(timeline, first_sec), loc="left", fontsize=_FONT_SIZE + 0.5, pad=3)
        rows[-1, 0].set_xlabel(f"time ({unit})")
        used = _used_colours(timelines)
        legend = _LEGEND | _LEGEND_LATER_CHUNKS
        handles = [Patch(facecolor=colour, label=name) for name, colour in legend.items() if colour in used]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, handlelength=1.3,
            columnspacing=1.6,
        )  # fmt: skip
        if title:
            figure.suptitle(title, fontsize=_FONT_SIZE + 2.5, x=0.01, ha="left")
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if path.suffix == ".svg" else None  # the same picture is the same file
            figure.savefig(path, dpi=140, metadata=metadata)
        pyplot.close(figure)


def check_outputs(outputs: Sequence[str | Path]) -> None:
    """Raises ValueError for a file whose suffix is no format."""
    for output in outputs:
        if Path(output).suffix not in FORMATS:
            raise ValueError(f"{output}: the suffix of a picture says its format, one of {', '.join(FORMATS)}")


def _heading(timeline: Timeline, first_sec: float) -> str:
    seconds = timeline.iteration_sec
    shown = f"{seconds:.2f} s" if seconds >= 3 else f"{seconds * 1e3:.1f} ms" if seconds >= 3e-3 else f"{seconds:.2g} s"
    longer = f" ({seconds / first_sec - 1:+.1%})" if first_sec and seconds != first_sec else ""
    idle = sum(map(timeline.idle_share, range(timeline.num_ranks))) / max(timeline.num_ranks, 1)
    return f"{timeline.name}: {shown}{longer}, idle {idle:.0%}"


@dataclass(frozen=True)
class _Box:
    """One coloured box, in units of the axis."""

    rank: int
    start: float
    width: float
    colour: str
    text: str


def _boxes(timeline: Timeline, per_unit: float) -> list[_Box]:
    origin = min((timed.start_sec for timed in timeline.actions), default=0.0)
    boxes = []
    for timed in timeline.actions:
        if timed.action.kind.is_message or timed.end_sec <= timed.start_sec:
            continue
        text = str(timed.action.microbatch)
        start, width = (timed.start_sec - origin) * per_unit, (timed.end_sec - timed.start_sec) * per_unit
        exit_width = timed.exit_sec * per_unit
        boxes.append(_Box(timed.rank, start, width - exit_width, _colour(timed), text))
        if exit_width:
            boxes.append(_Box(timed.rank, start + width - exit_width, exit_width, _EXIT, text))
    return boxes


def _draw_one(axes: Axes, timeline: Timeline, per_unit: float) -> None:
    for rank in range(timeline.num_ranks):
        _draw_bar(axes, _Box(rank, 0, timeline.iteration_sec * per_unit, _IDLE, ""))
    boxes = _boxes(timeline, per_unit)
    # The axes are about nine tenths of the figure; a digit is 0.62 of its height wide.
    points = 72 * _INCHES_WIDE * 0.92 / (axes.get_xlim()[1] - axes.get_xlim()[0])
    fitting = lambda box: (box.width * points - 1.5) / (0.62 * len(box.text))
    font_sizes = {
        colour: min(_FONT_SIZE, max(_SMALLEST_FONT, min(fitting(box) for box in boxes if box.colour == colour)))
        for colour in {box.colour for box in boxes}
    }
    for box in boxes:
        _draw_bar(axes, box)
        size = font_sizes[box.colour]
        if fitting(box) >= size:
            axes.text(
                box.start + box.width / 2, box.rank, box.text, ha="center", va="center", fontsize=size,
                color="white" if box.colour in (_BACKWARD, _FILL_BACKWARD) else "black", zorder=3,
            )  # fmt: skip
    axes.set_ylim(timeline.num_ranks - 0.45, -0.55)
    axes.set_yticks(range(timeline.num_ranks), [f"rank {rank}" for rank in range(timeline.num_ranks)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_bar(axes: Axes, box: _Box) -> None:
    is_idle = box.colour == _IDLE
    axes.broken_barh(
        [(box.start, box.width)], (box.rank - 0.42, 0.84), facecolors=box.colour, edgecolors="white",
        linewidths=0.0 if is_idle else 0.7, zorder=1 if is_idle else 2,
    )  # fmt: skip


def _colour(timed: TimedAction) -> str:
    if timed.action.kind == Kind.EXIT:
        return _EXIT
    is_forward = timed.action.kind == Kind.FORWARD
    if timed.action.is_partial:
        return _FILL_FORWARD if is_forward else _FILL_BACKWARD
    colour = _FORWARD if is_forward else _BACKWARD
    return _LATER_CHUNKS[colour] if timed.action.chunk else colour


def _used_colours(timelines: Sequence[Timeline]) -> set[str]:
    actions = [timed for timeline in timelines for timed in timeline.actions]
    used = {_colour(timed) for timed in actions if not timed.action.kind.is_message}
    return used | {_IDLE} | ({_EXIT} if any(timed.exit_sec for timed in actions) else set())
