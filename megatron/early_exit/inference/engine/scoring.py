"""A request for what heads predict over given tokens: nothing is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.early_exit.inference.engine.draft_length import StepLoad
from megatron.early_exit.inference.engine.request import Progress, Request, RunningRequest
from megatron.early_exit.inference.engine.slots import Assignment
from megatron.early_exit.inference.params import SamplingSettings, ScoreParams
from megatron.early_exit.inference.protocol import FINAL_HEAD, Admit, HeadScores, Rows, RowsOutput, WorkerDescription
from megatron.early_exit.inference.results import FinishReason, ScoredHead, ScoreResult


@dataclass(frozen=True, kw_only=True)
class ScoringRequest(Request):
    """What is to be scored, in terms of the model."""

    params: ScoreParams
    model: WorkerDescription
    heads: tuple[int, ...]
    """Exit indices in the order of layers, `FINAL_HEAD` last."""

    @property
    def enabled_exits(self) -> tuple[int, ...]:
        return tuple(index for index in self.heads if index != FINAL_HEAD)

    @property
    def max_shared(self) -> int:
        return self.params.score_from

    def start(self, assignment: Assignment) -> RunningScoring:
        return RunningScoring(self, assignment)

    def result(self, reason: FinishReason, error: str | None = None) -> ScoreResult:
        return ScoreResult(self.request_id, (), error or reason)


class RunningScoring(RunningRequest):
    """Scores as they come, chunk by chunk."""

    request: ScoringRequest

    def __init__(self, request: ScoringRequest, assignment: Assignment) -> None:
        super().__init__(request, assignment, list(request.prompt.tokens))
        self._stop = len(self.tokens) - request.params.num_targets
        """Rows from here on do not run."""
        self._scores: dict[int, list[HeadScores]] = {head: [] for head in request.heads}

    def admission(self) -> Admit:
        return Admit(
            request_id=self.request_id, slot=self.slot, generation=self.generation,
            num_prompt_tokens=len(self.tokens), prefix=tuple(self.tokens[: self.num_shared]),
            sampling=SamplingSettings(), exits=self.request.enabled_exits,
        )  # fmt: skip

    def next_rows(self, prefill_budget: int, load: StepLoad) -> Rows | None:
        first, params = self.num_rows, self.request.params
        stop = min(first + prefill_budget, self._stop)
        if stop <= first:
            return None
        scored_from = max(first, params.score_from)
        return Rows(
            request_id=self.request_id, slot=self.slot, generation=self.generation, epoch=self.epoch, phase="score",
            first=first, tokens=tuple(self.tokens[first:stop]), score_heads=self.request.heads,
            score_from=params.score_from, targets=tuple(self.tokens[scored_from + 1 : stop + 1]),
            score_top=params.top_log_probs, score_logits=params.logits, score_states=params.states,
        )  # fmt: skip

    def receive(self, output: RowsOutput) -> Progress:
        if output.error is not None:
            return Progress(finish_reason="error", error=output.error)
        self.note(output, is_of_prompt=True)
        for scores in output.scores:
            self._scores[scores.exit].append(scores)
        has_all = self.num_rows == self._stop and not self.is_in_flight
        return Progress(finish_reason="max_tokens" if has_all else None)

    @property
    def is_in_flight(self) -> bool:
        """The heads of several stages report on their own: those of a later one may come first."""
        num_scored = max(self.num_rows - max(self.request.params.score_from, self.num_shared), 0)
        num_received = min(sum(len(part.tokens) for part in parts) for parts in self._scores.values())
        return super().is_in_flight or num_received < num_scored

    def result(self, reason: FinishReason, error: str | None = None) -> ScoreResult:
        if error is not None or reason != "max_tokens":
            return ScoreResult(self.request_id, (), error or reason)
        return ScoreResult(self.request_id, tuple(self._head(head, parts) for head, parts in self._scores.items()))

    def _head(self, head: int, parts: list[HeadScores]) -> ScoredHead:
        model, params = self.request.model, self.request.params
        return ScoredHead(
            None if head == FINAL_HEAD else model.exits[head].layer_number,
            tokens=tuple(token for part in parts for token in part.tokens),
            confidences=tuple(value for part in parts for value in part.confidences),
            log_probs=tuple(value for part in parts for value in part.log_probs),
            top_log_probs=tuple(tuple(top) for part in parts for top in part.top_log_probs),
            logits=_rows_of(parts, "logits") if params.logits else None,
            states=_rows_of(parts, "states") if params.states and head != FINAL_HEAD else None,
        )


def _rows_of(parts: list[HeadScores], name: str) -> np.ndarray:
    """[positions, columns] of a field that holds bytes."""
    values = np.concatenate([np.frombuffer(getattr(part, name), np.float32) for part in parts])
    return values.reshape(sum(len(part.tokens) for part in parts), -1)
