"""A request for an answer: its tokens, its drafts, what it cost, and which rows it needs next."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.inference.engine.draft_length import DraftWindow, StepLoad
from megatron.early_exit.inference.engine.drafter import Drafter
from megatron.early_exit.inference.engine.request import Progress, Request, RunningRequest
from megatron.early_exit.inference.engine.slots import Assignment
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    NEVER_TAKEN,
    Admit,
    DrawnToken,
    ExitThreshold,
    HeadScores,
    Rows,
    RowsOutput,
    WorkerDescription,
)
from megatron.early_exit.inference.results import (
    DraftSource,
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
    draft_exits: tuple[int, ...] = ()
    """self_speculative: indices of exits that may draft; across stages the first of them does."""
    drafter: Drafter | None = None
    """self_speculative: what is drafted."""
    draft_window: DraftWindow | None = None
    """self_speculative across stages: rows go on through all layers while their drafts are fed, instead of being
    verified together."""
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
        return self.draft_exits or tuple(one.exit for one in self.thresholds)

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
        return RunningGeneration(self, Assignment(-1, 0, 0, None)).result(reason, error)


class RunningGeneration(RunningRequest):
    """An answer as it grows."""

    request: GenerationRequest

    def __init__(self, request: GenerationRequest, assignment: Assignment) -> None:
        super().__init__(request, assignment, list(request.prompt.tokens))
        self.params = request.params
        self.thresholds = request.thresholds
        """Exits that are evaluated now."""
        self.drafts: list[int] = []
        """Tokens behind `tokens` that are not verified."""
        self._draft_sources: deque[DraftSource] = deque()
        """Of each of them."""
        self._exit_that_drafts: int | None = None
        """Where drafts are verified together."""
        self.num_to_draft: int | None = None
        """Length of the draft that is being made; None: a new one is to be begun."""
        self.generated: list[GeneratedToken] = []
        self.prompt_tokens: list[PromptToken] = []
        if self.params.echo:
            self.prompt_tokens.append(PromptToken(self.tokens[0], None))
        self._num_tokens_of_prefill = 0
        """1 if the first token came out of the prompt's last rows, with no row of its own."""
        self._layer_passes = self._layer_runs = 0
        self._num_drafted: Counter[DraftSource] = Counter()
        self._num_accepted: Counter[DraftSource] = Counter()
        if request.drafter is not None:
            request.drafter.extend(self.tokens)
        self._first_token_at: float | None = None
        self._last_token_at = 0.0

    @property
    def is_prefilling(self) -> bool:
        return self.num_rows < self.request.prefill_stop

    @property
    def is_drafting(self) -> bool:
        """Whether an exit is in the middle of a draft that will be verified together."""
        return self.num_to_draft is not None and len(self.drafts) < self.num_to_draft

    @property
    def has_finished_draft(self) -> bool:
        """Whether what an exit has drafted waits to be verified."""
        return self.num_to_draft is not None and not self.is_drafting and self.num_rows < self._num_known

    @property
    def _num_known(self) -> int:
        """Positions whose token is known, or drafted."""
        return len(self.tokens) + len(self.drafts)

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

    def choose_draft(self, load: StepLoad) -> None:
        """Begin the next draft of a request that has a drafter, if it is time to; all do so before any of them says
        which rows it needs."""
        request = self.request
        is_time = self.num_to_draft is None and self.num_rows < self._num_known and not self.is_prefilling
        if request.draft_window is not None or not is_time:
            return
        # Verification yields one token more than it accepts; the rows of all drafts need positions.
        room = min(request.max_tokens - len(self.generated) - 1, request.model.num_positions - len(self.tokens))
        choice = request.drafter.choose(load, room)
        self._exit_that_drafts, self.num_to_draft = choice.exit, choice.length or len(choice.tokens)
        if choice.tokens:
            self._add_drafts("ngram", choice.tokens)

    def next_rows(self, prefill_budget: int, load: StepLoad) -> Rows | None:
        if self.is_prefilling:
            count = min(self.request.prefill_stop - self.num_rows, prefill_budget)
            return self._prefill_rows(count) if count > 0 else None
        if self.params.echo and self._prompt_rows:
            return None  # an exit might end the answer before the prompt's scores have come
        if self.request.draft_window is not None:
            return self._rows_across_stages(load)
        if self.num_rows >= self._num_known:
            return None  # the next token is not known
        if self.request.drafter is not None:
            return self._speculation_rows(load)
        return self._rows("decode", self.tokens[-1:], exits=self.thresholds, sample_from=self.num_rows)

    def _rows(self, phase: str, tokens: Sequence[int], **changes: object) -> Rows:
        return Rows(
            request_id=self.request_id, slot=self.slot, generation=self.generation, epoch=self.epoch, phase=phase,
            first=self.num_rows, tokens=tuple(tokens), **changes,
        )  # fmt: skip

    def _prefill_rows(self, count: int) -> Rows:
        first, stop = self.num_rows, self.num_rows + count
        draws = stop == self.request.num_prompt_tokens
        wanted: dict[str, object] = {"sample_from": stop - 1} if draws else {}
        if self.params.echo:
            targets = tuple(self.tokens[first + 1 : stop + 1])
            wanted |= {"score_heads": (FINAL_HEAD,), "score_from": first, "targets": targets}
            wanted |= {"score_top": self.params.top_log_probs}
        return self._rows("prefill", self.tokens[first:stop], **wanted)

    def _speculation_rows(self, load: StepLoad) -> Rows | None:
        if load.is_drafting and not self.is_drafting:
            return None
        if self.is_drafting:
            token = self.drafts[-1] if self.drafts else self.tokens[-1]
            return self._rows("draft", [token], exits=(ExitThreshold(self._exit_that_drafts, 0.0),))
        asked = tuple([ExitThreshold(index, NEVER_TAKEN) for index in self.request.drafter.exits_to_ask(load)])
        return self._rows("verify", self._unsubmitted(), exits=asked, sample_from=len(self.tokens) - 1)

    def _add_drafts(self, source: DraftSource, tokens: Sequence[int]) -> None:
        self.drafts += tokens
        self._draft_sources += [source] * len(tokens)
        self._num_drafted[source] += len(tokens)

    def _unsubmitted(self) -> list[int]:
        """Tokens and drafts that are known and have no row yet."""
        return [self.tokens[-1], *self.drafts][self.num_rows - (len(self.tokens) - 1) :]

    def _rows_across_stages(self, load: StepLoad) -> Rows | None:
        """The row of the last token or draft that is known, while those before it are on their way."""
        request, num_unverified = self.request, self.num_rows - (len(self.tokens) - 1)
        remaining = min(request.max_tokens - len(self.generated), request.model.num_positions - len(self.tokens) + 1)
        most = min(request.draft_window.next(load.num_requests), remaining)
        if num_unverified >= most:
            return None
        if self.num_rows == self._num_known:
            self._add_drafts("ngram", request.drafter.guesses(self.drafts, most - num_unverified))
            if self.num_rows == self._num_known:
                return None  # the next token is not known
        is_drafted = request.draft_exits and most > 1 and num_unverified + 1 < remaining
        exits = (ExitThreshold(request.draft_exits[0], 0.0),) if is_drafted else ()
        return self._rows("speculate", self._unsubmitted()[:1], exits=exits, sample_from=self.num_rows)

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
        if not is_prefill and output.answers and self.request.draft_window is None:
            self._layer_runs += output.layer_runs
        for scores in output.scores:
            self._add_prompt_tokens(scores)
        if is_prefill and not output.tokens:
            return Progress(finish_reason=None if self.is_in_flight else self.finished_without_rows())
        if self.request.draft_window is not None and not is_prefill:
            return self._compare(output) if output.answers else self._add_draft(output)
        if not output.answers:
            return Progress()  # rows that were answered before have run all layers
        if self.is_drafting:
            self._add_drafts("exit", [output.tokens[0].token])
            if not self.request.drafter.goes_on(output.tokens[0].confidence):
                self.num_to_draft = len(self.drafts)
            return Progress()
        if self.num_to_draft is not None:
            return self._verify(output.tokens)
        self._num_tokens_of_prefill += is_prefill
        token = self._generated(output.tokens[0])
        return Progress((token,), self._emit(token))

    def _add_prompt_tokens(self, scores: HeadScores) -> None:
        top = scores.top_log_probs or [()] * len(scores.log_probs)
        for log_prob, best in zip(scores.log_probs, top):
            position = len(self.prompt_tokens)
            self.prompt_tokens.append(PromptToken(self.tokens[position], log_prob, tuple(best)))

    def _verify(self, drawn: Sequence[DrawnToken]) -> Progress:
        """Accept drafts as far as all layers draw the same tokens, and add the one that they draw then.

        Drafts and all layers draw with the same noise, so the answer is what they draw without drafts (Gumbel coupling,
        arXiv:2408.07978); greedily both take the most probable token."""
        drafts, tokens = self.drafts, []
        self.num_to_draft = None
        if not drafts:  # as in most steps of a large batch
            token = self._generated(drawn[-1])
            self.request.drafter.observe(0, 0, (token.token,), drawn[-1])
            return Progress((token,), self._emit(token))
        self.drafts = []
        reason, num_accepted = None, 0
        for one, draft in zip(drawn, [*drafts, None], strict=True):
            is_accepted = one.token == draft
            num_accepted += is_accepted
            token = self._generated(one, self._draft_sources.popleft() if is_accepted else None)
            tokens.append(token)
            reason = self._emit(token)
            if reason is not None or not is_accepted:
                break
        self._draft_sources.clear()
        self.request.drafter.observe(len(drafts), num_accepted, [one.token for one in tokens], drawn[-1])
        if num_accepted < len(drafts):
            self._roll_back()
        return Progress(tokens, reason)

    def _add_draft(self, output: RowsOutput) -> Progress:
        """Take what an exit drafts behind a row; it may come later than the token that all layers draw there."""
        if output.tokens and output.stop == self._num_known:
            self._add_drafts("exit", [output.tokens[0].token])
        return Progress()

    def _compare(self, output: RowsOutput) -> Progress:
        """Compare drafts with what all layers draw behind the same rows; a rejected one makes all rows behind it stale.
        See `_verify`."""
        tokens = []
        for one in output.tokens:
            draft = self.drafts.pop(0) if self.drafts else None
            source = None if draft is None else self._draft_sources.popleft()
            token = self._generated(one, source if one.token == draft else None)
            tokens.append(token)
            self.request.drafter.compare(source, token.token, token.is_draft)
            self._layer_runs += self._runs_waited_for(source, token.is_draft)
            reason = self._emit(token)
            if reason is not None or (draft is not None and not token.is_draft):
                self.drafts.clear()
                self._draft_sources.clear()
                self.num_in_flight = 0
                self._roll_back()
                return Progress(tokens, reason)
        return Progress(tokens)

    def _runs_waited_for(self, source: DraftSource | None, is_accepted: bool) -> int:
        """Layer runs from a row to its token, with speculation across stages: a draft that is accepted was fed when its
        exit had given it, whatever the other layers took, or at once if earlier text did."""
        model = self.request.model
        if source == "ngram" or not self.request.draft_exits:
            return 0 if is_accepted else model.num_layers
        head = model.exits[self.request.draft_exits[0]]
        return (head.depth if is_accepted else model.num_layers) + (head.has_block and source is not None)

    def _roll_back(self) -> None:
        """Make rows behind the last token stale: it is as if they never ran, the next ones overwrite their keys and
        values."""
        self.epoch += 1
        self.num_rows = len(self.tokens) - 1
        self.complete_to = min(self.complete_to, self.num_rows)

    def _generated(self, drawn: DrawnToken, draft: DraftSource | None = None) -> GeneratedToken:
        """draft: what had drafted it."""
        exits, is_final = self.request.model.exits, drawn.exit == FINAL_HEAD
        if draft is not None:
            self._num_accepted[draft] += 1
        # Of exits that were asked beside a verification only the drafter learns.
        predictions = drawn.predictions if self.request.drafter is None else drawn.predictions[-1:]
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
            is_draft=draft is not None,
            top_log_probs=tuple(drawn.top_log_probs),
        )  # fmt: skip

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
            drafted=self._num_drafted.total(),
            accepted=self._num_accepted.total(),
            ngram_drafted=self._num_drafted["ngram"],
            ngram_accepted=self._num_accepted["ngram"],
            queue_seconds=self.started - self.request.arrived,
            first_token_seconds=None if first is None else first - self.request.arrived,
            decode_seconds=0.0 if first is None else self._last_token_at - first,
        )
        exits = {one.exit for one in self.thresholds}
        exits |= set(self.request.draft_exits)
        exit_layers = {model.exits[index].layer_number for index in exits}
        exit_layers |= {token.exit_layer for token in self.generated if not token.is_final}
        return RequestResult(
            self.request_id, tuple(self.generated), reason, statistics, tuple(sorted(exit_layers)), model.num_layers,
            prompt=tuple(self.prompt_tokens), error=error,
        )  # fmt: skip
