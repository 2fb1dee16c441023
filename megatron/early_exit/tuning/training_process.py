"""The training program as a process of its own, which gives all memory back: `python -m ...training_process FLAGS`."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence

from megatron.early_exit.platform.command_line import STATUS_INTERRUPTED


class TrainingFailed(RuntimeError):
    """The program has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the training ended with status {status}")
        self.status = status


class TrainingStopped(KeyboardInterrupt):
    """By a signal; it has saved what it had."""


def run_training(words: Sequence[str]) -> None:
    """Train with these flags, to the end. A rank that torchrun started trains with the others.

    Raises TrainingFailed, or TrainingStopped after Ctrl-C and SIGTERM, which the program is given time to save after.
    """
    is_verbose = logging.getLogger().isEnabledFor(logging.INFO)  # `run_program` has taken -v out of the flags
    command = [sys.executable, "-m", __name__, *words, *(["--verbose"] if is_verbose else [])]
    stopped_by: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = subprocess.Popen(command)

    def pass_on(number: int, _: object) -> None:
        stopped_by.append(number)
        process.send_signal(number)

    try:
        for number in before:
            signal.signal(number, pass_on)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
    if stopped_by or status == STATUS_INTERRUPTED:
        raise TrainingStopped
    if status:
        raise TrainingFailed(status)


if __name__ == "__main__":
    from megatron.early_exit.platform.processes import die_with_parent
    from megatron.early_exit.training.program import run

    die_with_parent()
    sys.exit(run())
