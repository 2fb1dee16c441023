"""The few numbers that a reader looks for first, one row for each model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron.early_exit.evaluation.report.markup import Content, Markup
from megatron.early_exit.evaluation.report.numbers import UNKNOWN, number, percent, plain_percent, times, with_interval
from megatron.early_exit.evaluation.report.schema import Calibration, Exits, Row, Speed
from megatron.early_exit.evaluation.report.sources import Evaluated
from megatron.early_exit.evaluation.report.tables import table

COLUMNS = (
    "Model", "Exits agree with the full model", "Certificates", "Fastest certified way, smallest batch",
    "Fastest lossless way, smallest batch",
)  # fmt: skip


def summary(models: Sequence[Evaluated]) -> Markup:
    return table("One row for each model", COLUMNS, [_row(model) for model in models])


def _row(model: Evaluated) -> list[Content]:
    rows = [row for document in model.with_results(Speed) for row in document.results.rows]
    return [
        f"{model.name} ({model.model.num_layers} layers)",
        _exits(model),
        _certificates(model),
        _fastest(row for row in rows if row.level is not None),
        _fastest(row for row in rows if row.mode == "self_speculative"),
    ]


def _exits(model: Evaluated) -> Content:
    heads = [head for document in model.with_results(Exits) for head in document.results.heads if not head.is_final]
    return _joined([f"exit {head.layer}: ", number(head.agreement, percent)] for head in heads)


def _certificates(model: Evaluated) -> Content:
    cards = [card for document in model.with_results(Calibration) for card in document.results.certificates]
    return _joined(f"{plain_percent(card.level)} {card.status}" for card in cards)


def _joined(parts: Iterable[Content]) -> Content:
    return [[", " if i else "", part] for i, part in enumerate(parts)] or UNKNOWN


def _fastest(rows: Iterable[Row]) -> Content:
    """At the smallest batch at which there is one."""
    known = [(row.speedup, row) for row in rows if row.speedup is not None]
    if not known:
        return UNKNOWN
    smallest = min(row.batch for _, row in known)
    speedup, best = max((one for one in known if one[1].batch == smallest), key=lambda one: one[0])
    return [f"{best.name}, batch {best.batch}: ", with_interval(speedup, best.speedup_interval, times)]
