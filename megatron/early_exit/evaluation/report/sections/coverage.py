"""What leaves at each exit, and how much of that is wrong."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.document import Document
from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.plots.base import Plot
from megatron.early_exit.evaluation.report.plots.coverage_risk import coverage_risk
from megatron.early_exit.evaluation.report.plots.exit_share import exit_share
from megatron.early_exit.evaluation.report.schema import Calibration
from megatron.early_exit.evaluation.report.sections.base import Parts, Section


def _parts(document: Document[Calibration]) -> Parts:
    results = document.results
    plots: list[Content | Plot | None] = [
        coverage_risk(results.coverage_risk),
        exit_share(results.exit_share_by_position),
    ]
    return [plot for plot in plots if plot]


SECTION = Section(
    "coverage",
    "What leaves where",
    ("calibrate",),
    "Left to right, the threshold falls and more decisions leave. A good exit keeps its line near zero for long; the "
    "distance to the dashed oracle is what a better score could win, and where even the oracle rises only a better "
    "exit helps. Exits that give few tokens at all positions cost their evaluation and bring little. Trap: these are "
    "decisions along the full model's answers; after a wrong token a free-running answer goes its own way.",
    _parts,
)
