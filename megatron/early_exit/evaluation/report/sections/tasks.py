"""Scores of lm-eval's tasks, each way to decode beside the full model."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.numbers import UNKNOWN, number, p_value
from megatron.early_exit.evaluation.report.schema import Paired, Score, Task, Tasks, known_interval
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import facts, table

COLUMNS = ("Task", "Items", "Metric", "Mode", "Score ± stderr", "Difference to full (95%)", "McNemar p")


def _parts(document: Document[Tasks]) -> Parts:
    results = document.results
    rows = [row for name, task in results.tasks.items() for row in _rows(name, task)]
    if not rows:
        return []
    modes = [(name, _settings(settings)) for name, settings in results.modes.items()]
    return [table("Scores of tasks", COLUMNS, rows), *([facts("Modes of the tasks", modes)] if modes else [])]


def _rows(name: str, task: Task) -> list[list[Content]]:
    return [
        [
            name, number(task.n, "{:,}".format), metric.removesuffix(",none"), mode, _score(score),
            *_paired(task.paired.get(mode), metric),
        ]
        for metric, by_mode in task.metrics.items()
        for mode, score in by_mode.items()
    ]  # fmt: skip


def _score(score: Score) -> Content:
    if score.stderr is None:
        return number(score.value)
    return [number(score.value), " ± ", number(score.stderr)]


def _paired(paired: Paired | None, metric: str) -> list[Content]:
    if paired is None or paired.metric not in (None, metric):
        return [UNKNOWN, UNKNOWN]
    signed = "{:+.3f}".format
    difference: list[Content] = [number(paired.difference, signed)]
    bounds = known_interval(paired.interval)
    if bounds:
        low, high = (number(bound, signed) for bound in bounds)
        difference += [" (", low, " – ", high, ")"]
    return [difference, number(paired.mcnemar_p, p_value)]


def _settings(settings: object) -> str:
    """In words; what is not set is left out."""
    if isinstance(settings, dict):
        known = [(name, value) for name, value in settings.items() if value not in (None, {}, [])]
        return ", ".join(
            f"{name}: {f'({_settings(value)})' if isinstance(value, dict) else value}" for name, value in known
        )
    return str(settings)


SECTION = Section(
    "tasks",
    "Standard tasks",
    ("tasks",),
    "Scores are lm-eval's, with the standard error over items. What counts is the paired difference to the full model "
    "on the same items: an interval that holds 0, or a large McNemar p, means that no loss was shown, not that there "
    "is none. Traps: with 100 items only differences of ten points show; and a task of likelihoods scores given text "
    "by one head, so a mode without a row there is the full model, and only modes that force an exit say something "
    "of it.",
    _parts,
)
