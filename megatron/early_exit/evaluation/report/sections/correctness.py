"""Whether modes that must give the full model's answers do."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content, element
from megatron.early_exit.evaluation.report.numbers import UNKNOWN, number, percent, with_interval
from megatron.early_exit.evaluation.report.schema import Comparison, Correctness, Difference
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import table

COLUMNS = ("Way to decode", "Mode", "Prompts", "Identical answers (95%)", "Errors", "Tokens")
DIFFERENCES = ("Way to decode", "Prompt", "Position", "Full model", "Here", "Gap (nats)", "Margin (nats)")
MOST_DIFFERENCES = 20


def _parts(document: Document[Correctness]) -> Parts:
    results = document.results
    if not results.rows:
        return []
    differences = [(row, one) for row in results.rows for one in row.first_differences]
    shown = [_difference(row, one) for row, one in differences[:MOST_DIFFERENCES]]
    title = "Where answers first differ"
    if len(differences) > len(shown):
        title += f" (the first {len(shown)} of {len(differences)}; all are in {document.path.name})"
    return [
        table("Answers against the full model's", COLUMNS, [_row(row) for row in results.rows]),
        *([table(title, DIFFERENCES, shown)] if shown else []),
    ]


def _row(row: Comparison) -> list[Content]:
    share = row.identical / row.prompts if row.prompts else None
    count = number(row.prompts, "{:,}".format)
    identical = [number(row.identical, "{:,}".format), ": ", with_interval(share, row.identical_interval, percent)]
    return [row.name, row.mode, count, identical, number(row.errors, str), number(row.tokens, "{:,}".format)]


def _difference(row: Comparison, one: Difference) -> list[Content]:
    few_digits = "{:.2g}".format
    tokens = [_text(one.prompt), number(one.position, "{:,}".format), _text(one.expected), _text(one.got)]
    return [row.name, *tokens, number(one.gap, few_digits), number(one.margin, few_digits)]


def _text(value: object) -> Content:
    if value is None:
        return UNKNOWN
    words = value if isinstance(value, str) else str(value)
    return element("code", words if len(words) <= 60 else words[:57] + "…")


SECTION = Section(
    "correctness",
    "Correctness",
    ("correctness",),
    "Self-speculative decoding, other batches and early exit with no exit taken must give the full model's answer. A "
    "few answers may differ by rounding, since other batch shapes add numbers in another order: then the gap, by which "
    "the full model prefers the expected token to the one that came, is tiny (below about 0.001 nats in fp32, 0.25 in "
    "bf16). A difference with a large gap is an error of the program. Early exit with thresholds may differ; that is "
    "the price it states. Trap: no difference in n answers only shows that fewer than about 3/n differ.",
    _parts,
)
