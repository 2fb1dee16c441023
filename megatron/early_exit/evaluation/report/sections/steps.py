"""Where the time of a step goes."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.numbers import UNKNOWN, number, percent, seconds
from megatron.early_exit.evaluation.report.plots.step_parts import step_parts
from megatron.early_exit.evaluation.report.schema import Document, Speed, StepPart
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import table


def _parts(document: Document) -> Parts:
    results: Speed = document.results
    known = [part for part in results.step if part.seconds is not None]
    names = list(dict.fromkeys(part.part for part in known))
    batches = sorted({part.batch for part in known})
    rows = [_row(batch, names, [part for part in known if part.batch == batch]) for batch in batches]
    plot = step_parts(known)
    if not rows:
        return []
    columns = ("Batch", "Step", *names)
    return [table("Parts of a decoding step of the full model", columns, rows), *([plot] if plot else [])]


def _row(batch: int, names: Sequence[str], parts: Sequence[StepPart]) -> list[Content]:
    by_name = {part.part: part.seconds for part in parts}
    total = sum(by_name.values())
    cells = [_cell(by_name[name], total) if name in by_name else UNKNOWN for name in names]
    return [number(batch, str), number(total, seconds), *cells]


def _cell(value: float, total: float) -> Content:
    return [number(value, seconds), " (", number(value / total, percent), ")"] if total else number(value, seconds)


SECTION = Section(
    "step",
    "Where a step goes",
    ("benchmark",),
    "Exits save time in the layers alone. If heads, sampling or the host take most of a step, leaving early cannot "
    "bring much however often it happens. What is left after the parts that were measured by themselves is the rest; "
    "it can fall below 0 where these were measured at a slower moment. Trap: shares of a small model do not carry over "
    "to a large one, whose layers weigh more.",
    _parts,
)
