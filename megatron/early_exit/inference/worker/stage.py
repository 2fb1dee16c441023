"""One rank of a pipeline stage, without input and output: messages are given to it, and it returns what to send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron.early_exit.inference.protocol import Pass, RowsOutput, StageInput, Step
from megatron.early_exit.inference.worker.worker import Worker


@dataclass(frozen=True)
class FlowControl:
    """How many rows a stage runs and sends on at once."""

    max_rows: int = 512
    """In one pass, unless a single message has more."""
    fill_credit: int = 64
    """Rows that are owed no token and may be on their way to the next stage, or wait there."""
    fill_min_rows: int = 1
    """Rows of a slot that must have exited before they go on; where ranks share cores more of them pay."""


class StageOutput(NamedTuple):
    """What a pass leaves to be sent."""

    following: StageInput | None
    """For the next stage, with `hidden`; None: nothing."""
    hidden: Tensor | None
    """[rows, h]; None: no rows"""
    credit: int
    """Rows without a token owed that have left the inbox: the stage before may send as many more."""


class Stage:
    """One rank of a pipeline stage. The first tensor-parallel rank chooses passes; the others are given the same inputs
    and passes, and do the same."""

    def __init__(self, worker: Worker, stage: int, num_stages: int, flow: FlowControl = FlowControl()) -> None: ...

    num_inputs: int
    """Inputs received so far."""

    def receive(self, message: StageInput | Step, hidden: Tensor | None = None) -> None:
        """Take in what the stage before has sent; the first stage takes the engine's steps. Operations on slots are
        done at once. hidden: [rows, h] of its rows. A rank that does not choose must have received `num_inputs` of a
        pass, no more, before it runs it."""

    def add_credit(self, rows: int) -> None:
        """The next stage has taken in so many rows that were owed no token."""

    def choose(self) -> Pass | None:
        """What to run next; None: there is nothing to run, and nothing to hand on."""

    def run(self, chosen: Pass, answer: Callable[[list[RowsOutput]], None]) -> StageOutput:
        """Run a pass. answer: called with outputs as soon as they are there, while the rows go on."""
        ...
