"""What the engine sees of its workers, wherever they run."""

from __future__ import annotations

from typing import Protocol

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import RowsOutput, StageLoad, Step, WorkerDescription


class ExecutorError(RuntimeError):
    """The workers cannot go on: one has ended, hangs, or has lost the others. All requests in flight have failed."""


class Executor(Protocol):
    """Carries steps to workers and outputs back. It knows neither requests nor tensors."""

    description: WorkerDescription

    @property
    def can_submit(self) -> bool:
        """Whether another step may be submitted before more outputs have come."""

    def submit(self, step: Step) -> None:
        """Have the workers run a step. Raises ExecutorError."""

    def poll(self, timeout: float | None = None) -> list[RowsOutput]:
        """Outputs that have come; waits until there are some, for at most `timeout` seconds (None: as long as the
        workers live). Each `Rows` of a step gives one output. Raises ExecutorError."""

    def measure_costs(self) -> StepCosts:
        """Time layers and heads; no request may be running. Raises ExecutorError."""

    def stage_loads(self) -> tuple[StageLoad, ...]:
        """What each stage has done, as far as it has told. Raises ExecutorError."""

    def close(self) -> None:
        """End the workers and give back what they hold. May be called twice."""
