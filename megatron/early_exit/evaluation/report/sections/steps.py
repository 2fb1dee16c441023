"""Where the time of a step goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.numbers import UNKNOWN, number, percent, seconds
from megatron.early_exit.evaluation.report.plots.step_parts import step_parts
from megatron.early_exit.evaluation.report.schema import Speed, StepPart
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import table
from megatron.early_exit.evaluation.step_parts import REST, within_step


def _parts(document: Document[Speed]) -> Parts:
    results = document.results
    steps = _steps(results.step)
    if not steps:
        return []
    names = list(dict.fromkeys(part for step in steps.values() for part in step))
    rows = [_row(batch, names, step) for batch, step in steps.items()]
    plot = step_parts(steps)
    columns = ("Batch", "Step", *names)
    return [table("Parts of a decoding step of the full model", columns, rows), *([plot] if plot else [])]


def _steps(parts: Sequence[StepPart]) -> dict[int, dict[str, float]]:
    """By batch size. Documents of early versions have a rest below 0."""
    found: dict[int, dict[str, float]] = {}
    for one in sorted(parts, key=lambda one: one.batch):
        if one.seconds is not None:
            found.setdefault(one.batch, {})[one.part] = one.seconds
    return {
        batch: within_step(sum(step.values()), {part: value for part, value in step.items() if part != REST})
        if step.get(REST, 0.0) < 0 else step
        for batch, step in found.items()
    }  # fmt: skip


def _row(batch: int, names: Sequence[str], step: Mapping[str, float]) -> list[Content]:
    total = sum(step.values())
    cells = [_cell(step[name], total) if name in step else UNKNOWN for name in names]
    return [number(batch, str), number(total, seconds), *cells]


def _cell(value: float, total: float) -> Content:
    return [number(value, seconds), " (", number(value / total, percent), ")"] if total else number(value, seconds)


SECTION = Section(
    "step",
    "Where a step goes",
    ("benchmark",),
    "Exits save time in the layers alone. If heads, sampling or the host take most of a step, leaving early cannot "
    "bring much however often it happens. What is left after the parts that were measured by themselves is the rest. "
    "Where these add up to more than the step, as a part by itself may be slower than within a step, nothing is known "
    "of the rest: it is 0, and the step is theirs in proportion. Trap: shares of a small model do not carry over "
    "to a large one, whose layers weigh more.",
    _parts,
)
