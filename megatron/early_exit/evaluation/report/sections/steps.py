"""Where the time of a step goes."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.numbers import number, percent, seconds
from megatron.early_exit.evaluation.report.plots.step_parts import step_parts
from megatron.early_exit.evaluation.report.schema import Document, Speed
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import table


def _parts(document: Document) -> Parts:
    results: Speed = document.results
    known = [part for part in results.step if part.seconds is not None]
    total = sum(part.seconds for part in known)
    if not total:
        return []
    rows = [[part.part, number(part.seconds, seconds), number(part.seconds / total, percent)] for part in known]
    rows.append(["all", number(total, seconds), number(1.0, percent)])
    plot = step_parts(known)
    return [table("Parts of a decoding step", ("Part", "Time", "Share"), rows), *([plot] if plot else [])]


SECTION = Section(
    "step",
    "Where a step goes",
    ("benchmark",),
    "Exits save time in the layers alone. If heads, sampling or the host take most of a step, leaving early cannot "
    "bring much however often it happens. Trap: shares of a small model do not carry over to a large one, whose layers "
    "weigh more.",
    _parts,
)
