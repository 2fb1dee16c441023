"""A request for an answer: its tokens, what it cost, and which rows it needs next.

Here is what decodes token by token, through all layers or with early exits; `speculation.py` has what drafts."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.inference.engine.draft_length import StepLoad
from megatron.early_exit.inference.engine.request import Progress, Request, RunningRequest
from megatron.early_exit.inference.engine.slots import Assignment
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    Admit,
    DrawnToken,
    ExitThreshold,
    HeadScores,
    Phase,
    Prediction,
    Rows,
    RowsOutput,
    TokenLogProb,
    WorkerDescription,
)
from megatron.early_exit.inference.results import (
    FinishReason,
    GeneratedToken,
    HeadPrediction,
    PromptToken,
    RequestResult,
    Statistics,
)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(Request):
    """What is asked for, in terms of the model."""

    params: GenerationParams
    sampling: SamplingSettings
    model: WorkerDescription
    ends: Collection[int]
    """Ids that end any answer."""
    thresholds: tuple[ExitThreshold, ...] = ()
    """early_exit: exits that may give tokens, in the order of layers; all of them, never taken, where they are only
    observed."""
    certificate: Certificate | None = None
    """early_exit: the one that these thresholds are of."""
    is_audited: bool = False
    """Whether its tokens are checked when it has ended."""

    @cached_property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.tokens)

    @cached_property
    def max_tokens(self) -> int:
        """Tokens that it may generate: what it asks for, or what fits. The last one is not fed back."""
        return min(self.params.max_tokens, self.model.num_positions - self.num_prompt_tokens + 1)

    @cached_property
    def enabled_exits(self) -> tuple[int, ...]:
        return tuple(one.exit for one in self.thresholds)

    @cached_property
    def prefill_stop(self) -> int:
        """Where the prompt's rows end that run all layers before the first token is due. The last row of the prompt is
        that of the first token, which may exit or be drafted like any other."""
        runs_to_the_end = self.params.mode == "full" and not self.params.observe_exits and self.max_tokens > 0
        return self.num_prompt_tokens if runs_to_the_end else self.num_prompt_tokens - 1

    @property
    def max_shared(self) -> int:
        return 0 if self.params.echo else self.num_prompt_tokens - 1

    def start(self, assignment: Assignment) -> RunningGeneration:
        return RunningGeneration(self, assignment)

    def result(self, reason: FinishReason, error: str | None = None) -> RequestResult:
        return self.start(Assignment(-1, 0, 0, None)).result(reason, error)


class RunningGeneration(RunningRequest):
    """An answer as it grows."""

    request: GenerationRequest

    def __init__(self, request: GenerationRequest, assignment: Assignment) -> None:
        super().__init__(request, assignment, list(request.prompt.tokens))
        self.params = request.params
        self.thresholds = request.thresholds
        """Exits that are evaluated now."""
        self.generated: list[GeneratedToken] = []
        self.prompt_tokens: list[PromptToken] = []
        if self.params.echo:
            self.prompt_tokens.append(PromptToken(self.tokens[0], None))
        self._num_tokens_of_prefill = 0
        """1 if the first token came out of the prompt's last rows, with no row of its own."""
        self._layer_passes = self._layer_runs = 0
        self._first_token_at: float | None = None
        self._last_token_at = 0.0

    @property
    def is_prefilling(self) -> bool:
        return self.num_rows < self.request.prefill_stop

    @property
    def _exits(self) -> set[int]:
        """Indices of the exits that it evaluates."""
        return {one.exit for one in self.thresholds}

    def admission(self) -> Admit:
        return Admit(
            request_id=self.request_id,
            slot=self.slot,
            generation=self.generation,
            num_prompt_tokens=self.request.num_prompt_tokens,
            prefix=tuple(self.tokens[: self.num_shared]),
            sampling=self.request.sampling,
            exits=self.request.enabled_exits,
            max_deferred=self.params.max_deferred,
            top_log_probs=self.params.top_log_probs,
            log_probs=self.params.log_probs,
            min_tokens=self.params.min_tokens,
            ends=tuple(self.params.all_ends(self.request.ends)) if self.params.min_tokens else (),
        )

    def finished_without_rows(self) -> FinishReason | None:
        return "max_tokens" if self.request.max_tokens == 0 and not self.is_prefilling else None

    # Which rows come next.

    def next_rows(self, prefill_budget: int, load: StepLoad) -> Rows | None:
        if self.is_prefilling:
            count = min(self.request.prefill_stop - self.num_rows, prefill_budget)
            return self._prefill_rows(count) if count > 0 else None
        if self.params.echo and self._prompt_rows:
            return None  # an exit might end the answer before the prompt's scores have come
        return self._decoding_rows(load)

    def _decoding_rows(self, load: StepLoad) -> Rows | None:
        """The rows behind those of the prompt; None: none now."""
        if self.num_rows >= len(self.tokens):
            return None  # the next token is not known
        return self._rows("decode", self.tokens[-1:], self.thresholds, self.num_rows)

    def _rows(
        self, phase: Phase, tokens: Sequence[int], exits: tuple[ExitThreshold, ...], sample_from: int | None
    ) -> Rows:
        return Rows(
            request_id=self.request_id, slot=self.slot, generation=self.generation, epoch=self.epoch, phase=phase,
            first=self.num_rows, tokens=tuple(tokens), exits=exits, sample_from=sample_from,
        )  # fmt: skip

    def _prefill_rows(self, count: int) -> Rows:
        first, stop = self.num_rows, self.num_rows + count
        draws = stop == self.request.num_prompt_tokens
        rows = self._rows("prefill", self.tokens[first:stop], (), stop - 1 if draws else None)
        if not self.params.echo:
            return rows
        return msgspec.structs.replace(
            rows, score_heads=(FINAL_HEAD,), score_from=first, targets=tuple(self.tokens[first + 1 : stop + 1]),
            score_top=self.params.top_log_probs,
        )  # fmt: skip

    # What the heads made of them.

    def receive(self, output: RowsOutput) -> Progress:
        if output.error is not None:
            return Progress(finish_reason="error", error=output.error)
        is_prefill = output.stop <= self.request.prefill_stop
        if not is_prefill:
            self._layer_passes += output.layer_passes
        if output.epoch != self.epoch:
            return Progress()  # rows behind a rejected draft
        self.note(output, is_of_prompt=is_prefill)
        for scores in output.scores:
            self._add_prompt_tokens(scores)
        if not is_prefill:
            return self._receive_decoded(output)
        if not output.tokens:
            return Progress(finish_reason=None if self.is_in_flight else self.finished_without_rows())
        self._num_tokens_of_prefill = 1
        return self._add(self._generated(output.tokens[0], output.tokens[0].predictions))

    def _receive_decoded(self, output: RowsOutput) -> Progress:
        """Take what the workers made of rows behind the prompt's."""
        if not output.answers:
            return Progress()  # rows that were answered before have run all layers
        self._layer_runs += output.layer_runs
        return self._add(self._generated(output.tokens[0], output.tokens[0].predictions))

    def _add_prompt_tokens(self, scores: HeadScores) -> None:
        top: Sequence[Sequence[TokenLogProb]] = scores.top_log_probs or [()] * len(scores.log_probs)
        for log_prob, best in zip(scores.log_probs, top):
            position = len(self.prompt_tokens)
            self.prompt_tokens.append(PromptToken(self.tokens[position], log_prob, tuple(best)))

    def _generated(
        self, drawn: DrawnToken, predictions: Sequence[Prediction], is_draft: bool = False
    ) -> GeneratedToken:
        exits, is_final = self.request.model.exits, drawn.exit == FINAL_HEAD
        return GeneratedToken(
            token=drawn.token,
            exit_layer=self.request.model.num_layers if is_final else exits[drawn.exit].layer_number,
            is_final=is_final,
            confidence=drawn.confidence,
            log_prob=drawn.log_prob,
            predictions=tuple(
                HeadPrediction(
                    None if one.exit == FINAL_HEAD else exits[one.exit].layer_number,
                    one.token, one.confidence, one.is_approximate,
                )
                for one in predictions
            ),
            caught_up=drawn.caught_up,
            is_draft=is_draft,
            top_log_probs=tuple(drawn.top_log_probs),
        )  # fmt: skip

    def _add(self, token: GeneratedToken) -> Progress:
        return Progress((token,), self._emit(token))

    def _emit(self, token: GeneratedToken) -> FinishReason | None:
        """Add the token to the answer. Returns why the answer ends with it, if it does."""
        self._last_token_at = time.perf_counter()
        self._first_token_at = self._first_token_at or self._last_token_at
        self.tokens.append(token.token)
        self.generated.append(token)
        if token.token in self.request.ends and not self.params.ignore_eod:
            return "eod"
        if token.token in self.params.stop_tokens:
            return "stop"
        if len(self.generated) >= self.request.max_tokens:
            return "max_tokens" if self.request.max_tokens == self.params.max_tokens else "max_positions"
        return None

    def result(self, reason: FinishReason, error: str | None = None) -> RequestResult:
        model, first = self.request.model, self._first_token_at
        statistics = Statistics(
            layer_passes=self._layer_passes,
            full_layer_passes=(len(self.generated) - self._num_tokens_of_prefill) * model.num_layers,
            layer_runs=self._layer_runs,
            drafted=0,
            accepted=0,
            queue_seconds=self.started - self.request.arrived,
            first_token_seconds=None if first is None else first - self.request.arrived,
            decode_seconds=0.0 if first is None else self._last_token_at - first,
        )
        exit_layers = {model.exits[index].layer_number for index in self._exits}
        exit_layers |= {token.exit_layer for token in self.generated if not token.is_final}
        return RequestResult(
            self.request_id, tuple(self.generated), reason, statistics, tuple(sorted(exit_layers)), model.num_layers,
            prompt=tuple(self.prompt_tokens), error=error,
        )  # fmt: skip
