"""What the engine needs of any request, whatever it asks for: while it queues, and while it has a slot."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.early_exit.inference.engine.draft_length import StepLoad
from megatron.early_exit.inference.engine.slots import Assignment, PromptBlocks
from megatron.early_exit.inference.protocol import Admit, Rows, RowsOutput
from megatron.early_exit.inference.results import FinishReason, GeneratedToken, RequestResult, ScoreResult

Result = RequestResult | ScoreResult


@dataclass(frozen=True, kw_only=True)
class Request(ABC):
    """A request as it was added, checked against the model."""

    request_id: int
    prompt: PromptBlocks
    arrived: float = field(default_factory=time.perf_counter)

    @property
    @abstractmethod
    def enabled_exits(self) -> tuple[int, ...]:
        """Indices of the exits that may be evaluated."""

    @property
    @abstractmethod
    def max_shared(self) -> int:
        """Rows of the prompt that another request may have computed; those behind it have outputs of their own."""

    @abstractmethod
    def start(self, assignment: Assignment) -> RunningRequest:
        """The request in its slot."""

    @abstractmethod
    def result(self, reason: FinishReason, error: str | None = None) -> Result:
        """What is reported if it ends before it has started."""


@dataclass(frozen=True)
class Progress:
    """What the outputs of one step brought a request."""

    tokens: Sequence[GeneratedToken] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


class RunningRequest(ABC):
    """A request that has a slot. Positions count prompt and answer together, from 0."""

    def __init__(self, request: Request, assignment: Assignment, tokens: list[int]) -> None:
        self.request, self.tokens = request, tokens
        self.slot, self.generation = assignment.slot, assignment.generation
        self.num_shared = assignment.num_shared
        self.epoch = 0
        self.num_rows = assignment.num_shared
        """Positions that have been submitted; drafts included until they are rejected."""
        self.complete_to = assignment.num_shared
        """Positions before this one have keys and values in all layers."""
        self.num_in_flight = 0
        """`Rows` of this epoch, beside those of the prompt, whose answers have not come."""
        self._prompt_rows: deque[int] = deque()
        """Of each `Rows` of the prompt whose answer has not come: how many rows it has. They are answered in order."""
        self.started = time.perf_counter()

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_prompt_rows_in_flight(self) -> int:
        return sum(self._prompt_rows)

    @property
    def is_in_flight(self) -> bool:
        """Whether outputs will come."""
        return self.num_in_flight > 0 or bool(self._prompt_rows)

    @abstractmethod
    def admission(self) -> Admit:
        """What the workers are told of it."""

    @abstractmethod
    def next_rows(self, prefill_budget: int, load: StepLoad) -> Rows | None:
        """The rows to run next, of which at most `prefill_budget` may be prompt rows; None: none now."""

    @abstractmethod
    def receive(self, output: RowsOutput) -> Progress:
        """Take what the workers made of its rows."""

    @abstractmethod
    def result(self, reason: FinishReason, error: str | None = None) -> Result:
        """The request as it stands."""

    def finished_without_rows(self) -> FinishReason | None:
        """Why it ends, if there is nothing to run for it at all."""
        return None

    def submit(self, rows: Rows) -> Rows:
        """Note that `rows` are on their way."""
        self.num_rows = rows.stop
        if rows.phase in ("prefill", "score"):
            self._prompt_rows.append(len(rows.tokens))
        else:
            self.num_in_flight += 1
        return rows

    def note(self, output: RowsOutput, is_of_prompt: bool) -> None:
        """Note how far the workers are, as an output of this epoch tells."""
        if is_of_prompt:
            for _ in range(output.answers):
                self._prompt_rows.popleft()
        else:
            self.num_in_flight -= output.answers
        # Outputs of several stages may overtake each other, and not all know it.
        self.complete_to = max(self.complete_to, output.complete_to)
