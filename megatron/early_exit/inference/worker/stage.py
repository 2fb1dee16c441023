"""One rank of a pipeline stage, without input and output: messages are given to it, and it returns what to send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import (
    Free,
    Pass,
    RowsOutput,
    SlotOperation,
    StageInput,
    StageRows,
    Step,
    WorkerDescription,
)
from megatron.early_exit.inference.worker.inbox import Inbox
from megatron.early_exit.inference.worker.scheduled_rows import ScheduledRows
from megatron.early_exit.inference.worker.worker import Worker


@dataclass(frozen=True)
class FlowControl:
    """How many rows a stage runs and sends on at once."""

    max_rows: int = 512
    """In one pass, unless a single message has more."""
    fill_credit: int = 64
    """Rows that are owed no token and may be on their way to the next stage, or lie there. Without a bound the first
    stage, which answers at once, would outrun the others."""
    fill_min_rows: int = 1
    """Rows of a slot that must have exited before they go on; where ranks share cores, more of them pay."""


class StageOutput(NamedTuple):
    """What a pass leaves to be sent."""

    following: StageInput | None
    """For the next stage, with `hidden`; None: nothing."""
    hidden: Tensor | None
    """[rows, h]; None: no rows"""
    credit: int
    """Fill rows that the stage before may send for those that have left the inbox."""
    num_rows: int = 0
    """That ran."""


class Stage:
    """One rank of a pipeline stage. The first tensor-parallel rank chooses passes; the others are given the same inputs
    and passes, and do the same."""

    def __init__(self, worker: Worker, stage: int, num_stages: int, flow: FlowControl = FlowControl()) -> None:
        """stage: its number, from 0."""
        self.worker, self.stage, self.num_stages, self._flow = worker, stage, num_stages, flow
        self.num_inputs = 0
        """Inputs received so far."""
        self._inbox = Inbox()
        self._operations: list[SlotOperation] = []
        """To be handed on."""
        self._dropped_fill_rows = 0
        """That have left the inbox since the last pass."""
        self._num_fills_sent = 0
        """Fill rows that the next stage has not yet taken out of its inbox."""

    @property
    def description(self) -> WorkerDescription:
        return self.worker.description

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def num_waiting_rows(self) -> int:
        """That have come and have not run."""
        return self._inbox.num_rows

    def measure_costs(self) -> StepCosts:
        """Time the layers and heads that are here. Overwrites slot 0."""
        return self.worker.measure_costs()

    @torch.inference_mode()
    def receive(self, message: StageInput | Step, hidden: Tensor | None = None) -> None:
        """Take in what the stage before has sent; the first stage takes the engine's steps. Operations on slots are
        done at once. hidden: [rows, h] of its rows. A rank that does not choose must have received `num_inputs` of a
        pass, no more, before it runs it."""
        self.num_inputs += 1
        for operation in message.operations:
            # Done before rows that lie here run, it disturbs none of them: what lies here of a slot that is freed is of
            # no use any more, and what is copied has run all layers, so it lies in no inbox.
            if isinstance(operation, Free):
                self._dropped_fill_rows += self._inbox.drop(operation.slot)
            self.worker.operate(operation)
        if not self.is_last:
            self._operations += message.operations
        offset = 0
        arrived = [StageRows.of(rows) for rows in message.rows] if isinstance(message, Step) else message.rows
        for rows in arrived:
            mine = None if hidden is None else hidden[offset : offset + rows.num_rows]
            self._dropped_fill_rows += self._inbox.add(rows, mine)
            offset += rows.num_rows

    def add_credit(self, rows: int) -> None:
        """The next stage has taken so many fill rows out of its inbox."""
        self._num_fills_sent -= rows

    def choose(self) -> Pass | None:
        """What to run next; None: there is nothing to run, and nothing to hand on."""
        budget = self._flow.max_rows if self.is_last else max(self._flow.fill_credit - self._num_fills_sent, 0)
        # All requests in one pass would come back together, and leave the other stages idle meanwhile.
        most = -(-len(self.worker.slots) // self.num_stages) if self.stage == 0 else None
        rows = self._inbox.choose(self._flow.max_rows, budget, self._num_fills_sent <= 0, most)
        if not rows and not self._operations and not self._dropped_fill_rows:
            return None
        return Pass(self.num_inputs, tuple(rows), budget)

    @torch.inference_mode()
    def run(self, chosen: Pass, answer: Callable[[list[RowsOutput]], None]) -> StageOutput:
        """Run a pass. answer: called with outputs as soon as they are there, while the rows go on."""
        if chosen.num_inputs != self.num_inputs:
            raise ValueError(f"{self.num_inputs} inputs have come; the pass was chosen after {chosen.num_inputs}")
        operations, self._operations = tuple(self._operations), []
        taken, num_fill_rows = self._inbox.take(chosen.rows)
        credit, self._dropped_fill_rows = num_fill_rows + self._dropped_fill_rows, 0
        taken = [one for one in taken if not self.worker.slots[one[0].rows.slot].has_failed]
        scheduled = [self.worker.schedule(rows) for rows, _ in taken]
        parts = [one for _, one in taken if one is not None]  # of the first stage there are none
        hidden = torch.cat(parts) if parts else None
        budget = 0 if self.is_last else chosen.fill_budget - sum(rows.num_fill_rows for rows, _ in taken)
        num_rows = sum(one.num_rows for one in scheduled)
        reached: list[ScheduledRows] = []
        if scheduled:
            reached, hidden = self.worker.runner.run(scheduled, hidden, budget, self._flow.fill_min_rows, answer)
        if outputs := self._late_outputs(scheduled, reached):
            answer(outputs)
        if self.is_last:
            return StageOutput(None, None, credit, num_rows)
        following = StageInput(operations, tuple(one.following() for one in reached))
        self._num_fills_sent += sum(rows.num_fill_rows for rows in following.rows)
        if not operations and not reached:
            return StageOutput(None, None, credit, num_rows)
        return StageOutput(following, hidden if reached else None, credit, num_rows)

    def _late_outputs(self, scheduled: list[ScheduledRows], reached: list[ScheduledRows]) -> list[RowsOutput]:
        """What is reported at the end of a pass: what the final head gave, which rows have run all layers now, and what
        was lost. reached: those that have run the layers of this stage."""
        ended = [one for one in scheduled if one.slot.has_failed] or (reached if self.is_last else [])
        return [one.output(one.answers) for one in ended]
