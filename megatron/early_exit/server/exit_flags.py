"""What flags of early exit say together, the same for the server and its client."""

from __future__ import annotations

from collections.abc import Sequence


def check_certified(level: float | None, thresholds: Sequence[float] | None, mode: str | None) -> None:
    """Refuse --certified beside what contradicts it. Raises ValueError."""
    if level is None:
        return
    if thresholds is not None:
        raise ValueError("--certified and --early-exit-thres both say from when on exits are taken; give one")
    if mode not in (None, "early_exit"):
        raise ValueError(f"--certified has no effect with --mode {mode}; leave one out")
