"""Throughput of the whole batch against the time that each request waits for a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.plots import base, modes
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points
from megatron.early_exit.evaluation.report.schema import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 6


def throughput_latency(rows: Sequence[Row]) -> base.Plot | None:
    """A line for each way to decode, over batch sizes. None if none was measured at two."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.batch):
        if row.tokens_per_second and row.seconds_per_token:
            lines.setdefault(row.name, []).append(row)
    lines = _most_telling({name: own for name, own in lines.items() if len(own) > 1})
    if not lines:
        return None
    best = max((row for own in lines.values() for row in own), key=lambda row: row.tokens_per_second)
    return base.Plot(
        "throughput_latency",
        "Tokens per second of all requests together (vertical, logarithmic) against milliseconds that one request "
        "waits for a token (horizontal, logarithmic). Numbers at the markers are batch sizes. Up and to the left is "
        "better.",
        f"The highest throughput is {best.tokens_per_second:,.0f} tokens per second, of {best.name} at batch "
        f"{best.batch}, where a request waits {1e3 * best.seconds_per_token:.1f} ms for a token.",
        lambda: _draw(lines),
    )


def _most_telling(lines: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The full model's and certified ones, then the fastest at the largest batch, in the order of the table."""
    rank = lambda name: (
        not lines[name][0].is_baseline, lines[name][0].level is None, -lines[name][-1].tokens_per_second
    )  # fmt: skip
    chosen = sorted(lines, key=rank)[:MOST_LINES]
    return {name: own for name, own in lines.items() if name in chosen}


def _draw(lines: Mapping[str, list[Row]]) -> Figure:
    figure, axes = base.single()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.1)
    looks = _looks(lines)
    for name, own in lines.items():
        colour, marker, dash = looks[name]
        axes.plot(
            *_places(own), color=colour, marker=marker, linestyle=dash, label=name, markersize=modes.size_of(own[0])
        )
    _plain_numbers(axes)
    axes.set_xlabel("time for a token of one request (ms, logarithmic)")
    axes.set_ylabel("tokens per second, all requests (log.)")
    labels = [_label(row, row is own[-1], looks[name][0]) for name, own in lines.items() for row in own]
    axes.set_xlim(right=1.7 * max(label.x for label in labels))  # room for names
    if any(":" in words for words in label_points(axes, labels)):
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _looks(lines: Mapping[str, list[Row]]) -> dict[str, tuple[str, str, object]]:
    """Colour and marker of the mode; lines of one mode differ in their dashes."""
    seen: dict[str, int] = {}
    looks = {}
    for name, own in lines.items():
        kind = modes.kind_of(own[0])
        seen[kind] = seen.get(kind, -1) + 1
        looks[name] = (*modes.LOOKS[kind][1:], base.DASHES[seen[kind] % len(base.DASHES)])
    return looks


def _label(row: Row, is_last: bool, colour: str) -> Label:
    """The batch size, with the way's name where its line ends."""
    words = f"{row.batch}: {modes.short_name(row)}" if is_last else str(row.batch)
    return Label(1e3 * row.seconds_per_token, row.tokens_per_second, words, colour, is_last, is_last)


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [1e3 * row.seconds_per_token for row in rows], [row.tokens_per_second for row in rows]


def _plain_numbers(axes: object) -> None:
    """1, 2, 5, 10 ... on logarithmic axes instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
