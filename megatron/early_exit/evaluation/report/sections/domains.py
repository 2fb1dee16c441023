"""The exits on each kind of text."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.numbers import number, percent, with_interval
from megatron.early_exit.evaluation.report.schema import Exits
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.sections.exits import head_name
from megatron.early_exit.evaluation.report.tables import table


def _parts(document: Document[Exits]) -> Parts:
    results = document.results
    if not results.by_domain:
        return []
    heads = next(iter(results.by_domain.values()))
    exits = [head for head in heads if not head.is_final]
    columns = ["Text", *(f"{head_name(head)} agrees (95%)" for head in exits), "Loss of the final head (nats/token)"]
    rows = []
    for name, own in results.by_domain.items():
        by_layer = {head.layer: head for head in own if not head.is_final}
        final = next((head for head in own if head.is_final), None)
        cells: list[Content] = [name]
        for head in exits:
            one = by_layer.get(head.layer)
            cells.append(with_interval(one.agreement, one.agreement_interval, percent) if one else number(None))
        rows.append([*cells, number(final and final.loss)])
    return [table("Agreement with the full model by kind of text", columns, rows)]


SECTION = Section(
    "domains",
    "By kind of text",
    ("exits",),
    "Exits are better where text is easier. A certificate is an average over its own mixture: if one kind of text here "
    "agrees much less than the others, calibrate on that kind by itself before you serve mostly that. Trap: kinds with "
    "few tokens have wide intervals.",
    _parts,
    "Give the texts of several kinds to the command.",
)
