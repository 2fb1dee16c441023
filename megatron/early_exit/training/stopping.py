"""When to stop before the last iteration: a signal, a duration, an iteration number. All ranks decide alike."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from megatron.early_exit.config.optimization import TrainingConfig
from megatron.early_exit.platform.device import device


class StopConditions:
    """Watches SIGTERM, the clock and the iteration number."""

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        self._start = time.monotonic()
        self._got_signal = False
        if training.exit_signal_handler:
            signal.signal(signal.SIGTERM, self._remember_signal)

    def _remember_signal(self, number: int, frame: FrameType | None) -> None:
        self._got_signal = True

    def due(self, iteration: int) -> str | None:
        """Why to stop after `iteration`, by its number, or None."""
        interval = self._training.exit_interval
        return f"--exit-interval {interval}" if interval and iteration % interval == 0 else None

    def interruption(self) -> str | None:
        """Why to stop now: a signal, or the end of the time; or None. All ranks must call it together."""
        training = self._training
        if training.exit_signal_handler or training.exit_duration_in_mins is not None:
            minutes = (time.monotonic() - self._start) / 60
            is_late = training.exit_duration_in_mins is not None and minutes >= training.exit_duration_in_mins
            # One rank may see the signal or the end of its time before the others: all follow the first one. The CPU
            # waits for the answer.
            flags = torch.tensor([self._got_signal, is_late], dtype=torch.int, device=device())
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            got_signal, is_late = flags.tolist()
            if got_signal:
                return "SIGTERM"
            if is_late:
                return f"--exit-duration-in-mins {training.exit_duration_in_mins:g}"
        return None
