"""Counts and times what a stage runs."""

from __future__ import annotations

import time

from megatron.early_exit.inference.protocol import StageLoad


class StageMeter:
    """Of one stage."""

    def __init__(self) -> None:
        self._busy_seconds, self._passes, self._rows = 0.0, 0, 0

    def add(self, started: float, num_rows: int) -> None:
        """A pass has ended. started: by `time.perf_counter`."""
        if num_rows:  # else it only handed operations on
            self._busy_seconds += time.perf_counter() - started
            self._passes += 1
            self._rows += num_rows

    def load(self, backlog: int = 0) -> StageLoad:
        """So far."""
        return StageLoad(self._busy_seconds, self._passes, self._rows, backlog)
