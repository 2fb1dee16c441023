"""Runs steps in the engine's own process."""

from __future__ import annotations

import time

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.executor.stage_meter import StageMeter
from megatron.early_exit.inference.protocol import RowsOutput, StageLoad, Step
from megatron.early_exit.inference.worker.worker import Worker


class LocalExecutor:
    """The executor of one worker; a step has run when `submit` returns."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.description = worker.description
        self._outputs: list[RowsOutput] = []
        self._meter = StageMeter()

    @property
    def can_submit(self) -> bool:
        return not self._outputs

    def submit(self, step: Step) -> None:
        started = time.perf_counter()
        self._outputs += self.worker.execute(step)
        self._meter.add(started, step.num_rows)

    def poll(self, timeout: float | None = None) -> list[RowsOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def measure_costs(self) -> StepCosts:
        return self.worker.measure_costs()

    def stage_loads(self) -> tuple[StageLoad, ...]:
        return (self._meter.load(),)

    def close(self) -> None:
        pass
