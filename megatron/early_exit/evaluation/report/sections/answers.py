"""The full model's answers themselves: loops, variety, rounding, and what the records cost."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.numbers import number, percent, seconds
from megatron.early_exit.evaluation.report.schema import Calibration
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import facts


def _parts(document: Document[Calibration]) -> Parts:
    results = document.results
    rows: list[tuple[Content, Content]] = []
    if text := results.text:
        rows += [
            ("Answers that end in a loop", number(text.loop_rate, percent)),
            ("Distinct tokens (distinct-1)", number(text.distinct_1)),
            ("Distinct pairs (distinct-2)", number(text.distinct_2)),
        ]
    if rounding := results.rounding:
        rows += [
            (
                "Decisions of the full model that differ between batch 1 and the batch",
                number(rounding.batch_1_vs_n, percent),
            ),
            ("Decisions compared", number(rounding.decisions, "{:,}".format)),
        ]
    if cost := results.cost:
        rows += [
            ("Time to take the records", number(cost.record_seconds, seconds)),
            ("Time to answer some of them one by one", number(cost.rounding_seconds, seconds)),
            *((f"Time to certify {level}", number(value, seconds)) for level, value in cost.level_seconds.items()),
            *((f"Time to test {level}", number(value, seconds)) for level, value in cost.test_seconds.items()),
        ]
    return [facts("Answers on which the certificates rest", rows)] if rows else []


SECTION = Section(
    "answers",
    "The answers themselves",
    ("calibrate",),
    "Small models that decode greedily fall into loops, and a loop is easy for an exit: with a high loop rate or few "
    "distinct tokens, agreement and speed look better than they are on good text. Rounding is the floor: no promise "
    "can be tighter than the rate at which the full model differs from itself in another batch.",
    _parts,
)
