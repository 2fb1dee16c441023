"""Ways to decode: measured speed, what the layers saved would give, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content, Markup, element
from megatron.early_exit.evaluation.report.numbers import (
    UNKNOWN,
    decimals,
    number,
    percent,
    seconds,
    times,
    with_interval,
)
from megatron.early_exit.evaluation.report.plots.base import Plot
from megatron.early_exit.evaluation.report.plots.draft_heat_map import draft_heat_map
from megatron.early_exit.evaluation.report.plots.pareto import pareto
from megatron.early_exit.evaluation.report.plots.throughput_latency import throughput_latency
from megatron.early_exit.evaluation.report.schema import Row, Speed
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import table

SPEED_COLUMNS = (
    "Way to decode", "Batch", "Tokens/s", "Speed-up (95%)", "By layer runs", "Overhead", "First token", "Per token",
)  # fmt: skip
QUALITY_COLUMNS = (
    "Way to decode", "Batch", "Agrees with the full model (95%)", "Whole answers identical (95%)", "Drafts accepted",
    "Perplexity", "Answers that loop", "Tokens by head",
)  # fmt: skip


def overhead(row: Row) -> float | None:
    """Share of this way's time that the layer runs do not explain: 1 - speed-up / speed-up by layer runs."""
    if row.speedup is None or not row.layer_run_speedup:
        return None
    return 1 - row.speedup / row.layer_run_speedup


def _parts(document: Document[Speed]) -> Parts:
    results = document.results
    rows = sorted(results.rows, key=lambda row: row.batch)
    if not rows:
        return []
    timed = sorted([*rows, *results.others], key=lambda row: row.batch)
    certified = lambda shown: [number for number, row in enumerate(shown) if row.level is not None]
    plots: list[Content | Plot | None] = [pareto(rows), throughput_latency(rows), draft_heat_map(rows)]
    return [
        table(
            "Speed, over the full model in the same run",
            SPEED_COLUMNS,
            [_speed(row) for row in timed],
            certified(timed),
        ),
        table("Quality of the same answers", QUALITY_COLUMNS, [_quality(row) for row in rows], certified(rows)),
        *(plot for plot in plots if plot),
    ]


def _name(row: Row) -> Markup:
    words = [*(["certified"] if row.level is not None else []), *(["baseline"] if row.is_baseline else [])]
    return element("span", row.name, [[" ", element("span", word, class_="badge")] for word in words])


def _speed(row: Row) -> Sequence[Content]:
    return [
        _name(row),
        number(row.batch, str),
        number(row.tokens_per_second, decimals(1)),
        with_interval(row.speedup, row.speedup_interval, times),
        number(row.layer_run_speedup, times),
        number(overhead(row), percent),
        number(row.first_token_seconds, seconds),
        number(row.seconds_per_token, seconds),
    ]


def _quality(row: Row) -> Sequence[Content]:
    return [
        _name(row),
        number(row.batch, str),
        with_interval(row.agreement, row.agreement_interval, percent),
        with_interval(row.identical_answers, row.identical_interval, percent),
        number(row.acceptance, percent),
        number(row.perplexity, decimals(2)),
        number(row.loop_rate, percent),
        _shares(row.exit_shares),
    ]


def _shares(shares: dict[str, float | None] | None) -> Content:
    known = {name: share for name, share in (shares or {}).items() if share is not None}
    if not known:
        return UNKNOWN
    names = sorted(known, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    return [[", " if i else "", f"{name} ", number(known[name], "{:.0%}".format)] for i, name in enumerate(names)]


SECTION = Section(
    "speed",
    "Speed and quality",
    ("sweep", "benchmark"),
    "Speed-up is tokens per second of decoding over our best full model, on the same prompts in turns, with the "
    "interval over rounds: if it holds 1×, no difference was shown. “By layer runs” is what the layers saved would "
    "give if nothing else took time, and overhead is the part of the time that this does not explain: heads, sampling, "
    "the scheduler. Traps: layers saved are not speed; a speed-up at batch 1 says little about batch 16; agreement is "
    "token by token, so whole answers are identical far less often; greedy answers that loop are easy to predict and "
    "inflate both numbers.",
    _parts,
)
