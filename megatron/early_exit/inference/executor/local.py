"""Runs steps in the engine's own process."""

from __future__ import annotations

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import RowsOutput, Step
from megatron.early_exit.inference.worker.worker import Worker


class LocalExecutor:
    """The executor of one worker; a step has run when `submit` returns."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.description = worker.description
        self._outputs: list[RowsOutput] = []

    @property
    def can_submit(self) -> bool:
        return not self._outputs

    def submit(self, step: Step) -> None:
        self._outputs += self.worker.execute(step)

    def poll(self, timeout: float | None = None) -> list[RowsOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def measure_costs(self) -> StepCosts:
        return self.worker.measure_costs()

    def close(self) -> None:
        pass
