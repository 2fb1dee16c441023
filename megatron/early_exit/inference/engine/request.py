"""The state of one request: its tokens, its slot, the rows that wait for deeper layers, the drafts to be verified."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.early_exit.inference.engine.draft_length import Draft, DraftLength
from megatron.early_exit.inference.engine.exit_policy import ExitPolicy
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import (
    FinishReason,
    GeneratedToken,
    PromptToken,
    RequestResult,
    Statistics,
)
from megatron.early_exit.inference.worker.sampling import Sampler


@dataclass
class WaitingRows:
    """Rows first, first + 1, ... that have run the same number of layers and wait there."""

    first: int
    hidden: Tensor
    """[rows, h]"""

    @property
    def stop(self) -> int:
        return self.first + self.hidden.size(0)


@dataclass
class RunningRequest:
    """A request between its arrival and its result. Positions count prompt and answer together, from 0."""

    request_id: int
    params: GenerationParams
    num_prompt_tokens: int
    tokens: list[int]
    """Prompt, then answer."""
    policy: ExitPolicy | None
    asked: tuple[int, ...]
    """Indices of the exits that may be asked."""
    sampler: Sampler
    stop_tokens: frozenset[int]
    max_tokens: int
    """Tokens that it may generate: what it asks for, or what fits."""
    draft_exit: int | None = None
    """Index of the exit that drafts."""
    draft_length: DraftLength | None = None

    slot: int | None = None
    num_rows: int = 0
    """Positions that have been fed; drafts included until they are rejected."""
    waiting: dict[int, WaitingRows] = field(default_factory=dict)
    """By the number of layers that they have run."""
    drafts: list[Draft] = field(default_factory=list)
    num_to_draft: int | None = None
    """Length of the draft that is being made; None: a new one is to be begun."""

    generated: list[GeneratedToken] = field(default_factory=list)
    prompt: list[PromptToken] = field(default_factory=list)
    tokens_of_prefill: int = 0
    """1 if the first token came out of the prompt's last rows, with no row of its own."""
    layer_passes: int = 0
    layer_runs: int = 0
    drafted: int = 0
    accepted: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def prefill_stop(self) -> int:
        """Where the prompt's rows end that run all layers before the first token is due. The last row of the prompt is
        that of the first token, which may exit or be drafted like any other."""
        runs_to_the_end = self.params.mode == "full" and self.max_tokens > 0
        return self.num_prompt_tokens if runs_to_the_end else self.num_prompt_tokens - 1

    @property
    def is_prefilling(self) -> bool:
        return not self.generated and self.num_rows < self.prefill_stop

    @property
    def num_waiting(self) -> int:
        return sum(rows.hidden.size(0) for rows in self.waiting.values())

    def defer(self, depth: int, first: int, hidden: Tensor) -> None:
        """Keep rows that have run `depth` layers, behind those that wait there."""
        before = self.waiting.get(depth)
        if before is not None:
            first, hidden = before.first, torch.cat([before.hidden, hidden])
        self.waiting[depth] = WaitingRows(first, hidden)

    def emit(self, token: GeneratedToken, ends: Collection[int]) -> FinishReason | None:
        """Add a token to the answer. Returns why the answer ends with it, if it does. ends: ids that end any answer."""
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token
        self.tokens.append(token.token)
        self.generated.append(token)
        if token.token in ends and not self.params.ignore_eod:
            return "eod"
        if token.token in self.stop_tokens:
            return "stop"
        if len(self.generated) >= self.max_tokens:
            return "max_tokens" if self.max_tokens == self.params.max_tokens else "max_positions"
        return None

    def result(
        self, reason: FinishReason, exit_layers: tuple[int, ...], num_layers: int, error: str | None
    ) -> RequestResult:
        """The request as it stands. exit_layers: layer numbers of the exits that it may have asked."""
        statistics = Statistics(
            layer_passes=self.layer_passes,
            full_layer_passes=(len(self.generated) - self.tokens_of_prefill) * num_layers,
            layer_runs=self.layer_runs,
            drafted=self.drafted,
            accepted=self.accepted,
            queue_seconds=(self.admitted or time.perf_counter()) - self.arrived,
            first_token_seconds=None if self.first_token is None else self.first_token - self.arrived,
            decode_seconds=0.0 if self.first_token is None else self.last_token - self.first_token,
        )
        return RequestResult(
            self.request_id, tuple(self.generated), reason, statistics, exit_layers, num_layers,
            prompt=tuple(self.prompt), error=error,
        )  # fmt: skip
