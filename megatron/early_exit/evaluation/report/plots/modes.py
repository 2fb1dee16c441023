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


def short_name(row: Row) -> str:
    """For a label in a plot; the table has the whole name."""
    if row.level is not None:
        return f"certified {100 * row.level:.6g}%"
    if row.draft_exit is None:
        return row.name
    length = f" by {row.draft_length}" if isinstance(row.draft_length, int) else ""
    return f"drafts of exit {row.draft_exit}{length}"


def size_of(row: Row) -> float:
    return SIZES.get(kind_of(row), 6)
