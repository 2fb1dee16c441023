"""How good each exit is, and whether its score knows."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content, Markup
from megatron.early_exit.evaluation.report.numbers import decimals, number, percent, with_interval
from megatron.early_exit.evaluation.report.plots.reliability import reliability
from megatron.early_exit.evaluation.report.schema import Exits, Head
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import table

COLUMNS = (
    "Head", "Loss (nats/token)", "Perplexity", "Right next token", "Agrees with the full model (95%)", "ECE",
    "AUROC of the score", "Cost (layers)",
)  # fmt: skip


def heads_table(caption: str, heads: Sequence[Head]) -> Markup:
    return table(caption, COLUMNS, [_row(head) for head in heads])


def head_name(head: Head) -> str:
    return f"final head ({head.layer})" if head.is_final else f"exit {head.layer}"


def _row(head: Head) -> list[Content]:
    return [
        head_name(head),
        number(head.loss),
        number(head.perplexity, decimals(2)),
        number(head.accuracy, percent),
        with_interval(head.agreement, head.agreement_interval, percent),
        number(head.ece),
        number(head.auroc),
        number(head.cost_in_layers, decimals(1)),
    ]


def _parts(document: Document[Exits]) -> Parts:
    results = document.results
    if not results.heads:
        return []
    plot = reliability(results)
    others = [heads_table(f"Heads of {one.checkpoint} on the same text", one.heads) for one in results.compare]
    own = heads_table(f"Heads on {results.tokens:,} tokens of text", results.heads)
    return [own, *([plot] if plot else []), *others]


SECTION = Section(
    "exits",
    "Exits",
    ("exits",),
    "Agreement says how often an exit alone names the token that the full model names. ECE (0 is best) says how far "
    "its score is from the share of times that it is right; AUROC (0.5 is guessing, 1 is best) whether right decisions "
    "get higher scores than wrong ones: thresholds live on AUROC, and a certificate does not need a small ECE. Cost is "
    "what evaluating the head takes, in layers of the model. Trap: agreement over all tokens is not agreement of the "
    "tokens that leave, which is much higher at a good threshold; and an exit that costs many layers must be taken "
    "often to pay.",
    _parts,
)
