"""Throughput of the whole batch against the time that each request waits for a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron.early_exit.evaluation.report.plots import base, modes
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points
from megatron.early_exit.evaluation.report.schema import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 6


class Timed(NamedTuple):
    """A way to decode at one batch size, of which both times are known."""

    row: Row
    tokens_per_second: float
    seconds_per_token: float


Lines = Mapping[str, list[Timed]]
"""By the way's name, in the order of batch sizes."""


def throughput_latency(rows: Sequence[Row]) -> base.Plot | None:
    """A line for each way to decode, over batch sizes. None if none was measured at two."""
    by_name: dict[str, list[Timed]] = {}
    for row in sorted(rows, key=lambda row: row.batch):
        if row.tokens_per_second and row.seconds_per_token:
            by_name.setdefault(row.name, []).append(Timed(row, row.tokens_per_second, row.seconds_per_token))
    lines = _most_telling({name: own for name, own in by_name.items() if len(own) > 1})
    if not lines:
        return None
    best = max((one for own in lines.values() for one in own), key=lambda one: one.tokens_per_second)
    return base.Plot(
        "throughput_latency",
        "Tokens per second of all requests together (vertical, logarithmic) against milliseconds that one request "
        "waits for a token (horizontal, logarithmic). Numbers at the markers are batch sizes. Up and to the left is "
        "better.",
        f"The highest throughput is {best.tokens_per_second:,.0f} tokens per second, of {best.row.name} at batch "
        f"{best.row.batch}, where a request waits {1e3 * best.seconds_per_token:.1f} ms for a token.",
        lambda: _draw(lines),
    )


def _most_telling(lines: Lines) -> Lines:
    """The full model's and certified ones, then the fastest at the largest batch, in the order of the table."""
    rank = lambda name: (
        not lines[name][0].row.is_baseline, lines[name][0].row.level is None, -lines[name][-1].tokens_per_second
    )  # fmt: skip
    chosen = sorted(lines, key=rank)[:MOST_LINES]
    return {name: own for name, own in lines.items() if name in chosen}


def _draw(lines: Lines) -> Figure:
    figure, axes = base.single()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.1)
    looks = _looks(lines)
    for name, own in lines.items():
        colour, marker, dash = looks[name]
        axes.plot(
            *_places(own), color=colour, marker=marker, linestyle=dash, label=name,
            markersize=modes.size_of(own[0].row),
        )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        base.logarithmic(axis, "{:,g}".format)
    axes.set_xlabel("time for a token of one request (ms, logarithmic)")
    axes.set_ylabel("tokens per second, all requests (log.)")
    labels = [_label(one, one is own[-1], looks[name][0]) for name, own in lines.items() for one in own]
    axes.set_xlim(right=1.7 * max(label.x for label in labels))  # room for names
    if any(":" in words for words in label_points(axes, labels)):
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _looks(lines: Lines) -> dict[str, tuple[str, str, base.Dash]]:
    """Colour and marker of the mode; lines of one mode differ in their dashes."""
    seen: dict[str, int] = {}
    looks = {}
    for name, own in lines.items():
        kind = modes.kind_of(own[0].row)
        seen[kind] = seen.get(kind, -1) + 1
        looks[name] = (*modes.LOOKS[kind][1:], base.DASHES[seen[kind] % len(base.DASHES)])
    return looks


def _label(one: Timed, is_last: bool, colour: str) -> Label:
    """The batch size, with the way's name where its line ends."""
    words = f"{one.row.batch}: {modes.short_name(one.row)}" if is_last else str(one.row.batch)
    return Label(1e3 * one.seconds_per_token, one.tokens_per_second, words, colour, is_last, is_last)


def _places(line: Sequence[Timed]) -> tuple[list[float], list[float]]:
    return [1e3 * one.seconds_per_token for one in line], [one.tokens_per_second for one in line]
