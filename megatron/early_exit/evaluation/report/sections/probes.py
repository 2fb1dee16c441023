"""Whether probes know better than heads which decisions are right."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.numbers import UNKNOWN, number, percent
from megatron.early_exit.evaluation.report.schema import ProbedExit, Probes, ScoreQuality
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import table

SHARES = ("0.01", "0.05")
"""Of decisions that may differ."""


def _parts(document: Document[Probes]) -> Parts:
    results = document.results
    scores = ("probe", "head")
    columns = [
        "Exit", "Agrees with the full model", *(f"AUROC, {score}" for score in scores),
        *(f"ECE, {score}" for score in scores),
        *(f"Leave at {float(share):.0%}, {score}" for share in SHARES for score in scores),
    ]  # fmt: skip
    count = results.decisions.get("held_out")
    caption = f"Scores on {UNKNOWN if count is None else f'{count:,}'} held-out decisions"
    return [table(caption, columns, [_row(one) for one in results.exits])]


def _row(one: ProbedExit) -> list[Content]:
    both: tuple[ScoreQuality, ...] = (one.probe, one.head)
    return [
        f"exit {one.layer}",
        number(one.agreement, percent),
        *(number(score.auroc) for score in both),
        *(number(score.ece) for score in both),
        *(number(score.leaving.get(share), percent) for share in SHARES for score in both),
    ]


SECTION = Section(
    "probes",
    "Probes",
    ("probes",),
    "A probe is a small network that says whether an exit's token is the full model's, without the exit's head. The "
    "last columns say how many decisions would leave if 1% or 5% of all may differ, by the probe and by the largest "
    "probability of the head. Trap: these thresholds are read off the same decisions; what is promised stands with the "
    "certificates.",
    _parts,
)
