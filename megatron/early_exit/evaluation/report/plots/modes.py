"""How ways to decode look in all plots: a colour and a marker for each mode, and for certified thresholds."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.plots.base import BLACK, BLUE, GREEN, VERMILION
from megatron.early_exit.evaluation.report.schema import Row

LOOKS = {
    "full": ("full model", BLACK, "s"),
    "early_exit": ("early exit", BLUE, "o"),
    "self_speculative": ("self-speculative", VERMILION, "^"),
    "certified": ("certified thresholds", GREEN, "*"),
}
"""Name, colour and marker of each kind."""
SIZES = {"certified": 12}
"""Of markers (points), where they are not 6."""


def kind_of(row: Row) -> str:
    """A key of LOOKS."""
    return "certified" if row.level is not None else row.mode if row.mode in LOOKS else "early_exit"


def size_of(row: Row) -> float:
    return SIZES.get(kind_of(row), 6)
