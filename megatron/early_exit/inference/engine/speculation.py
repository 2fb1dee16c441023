"""Requests whose tokens are drafted, by an exit or from earlier text, and verified by all layers: some drafts together,
or each on its way through the pipeline stages while the next one is fed already."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.inference.engine.draft_length import DraftWindow, StepLoad
from megatron.early_exit.inference.engine.drafter import Drafter
from megatron.early_exit.inference.engine.generation import GenerationRequest, RunningGeneration
from megatron.early_exit.inference.engine.request import Progress
from megatron.early_exit.inference.engine.slots import Assignment
from megatron.early_exit.inference.protocol import NEVER_TAKEN, DrawnToken, ExitThreshold, Rows, RowsOutput
from megatron.early_exit.inference.results import DraftSource, FinishReason, GeneratedToken, RequestResult


@dataclass(frozen=True, kw_only=True)
class SpeculativeRequest(GenerationRequest):
    """A request whose drafts are verified together."""

    draft_exits: tuple[int, ...]
    """Indices of exits that may draft; across stages the first of them does."""
    drafter: Drafter
    """What is drafted."""

    @property
    def enabled_exits(self) -> tuple[int, ...]:
        return self.draft_exits

    def start(self, assignment: Assignment) -> RunningSpeculation:
        return DraftingThenVerifying(self, assignment)


@dataclass(frozen=True, kw_only=True)
class SpeculativeRequestAcrossStages(SpeculativeRequest):
    """A request whose rows go on through all layers while their drafts are fed, instead of being verified together."""

    window: DraftWindow

    def start(self, assignment: Assignment) -> RunningSpeculation:
        return SpeculatingAcrossStages(self, assignment)


class RunningSpeculation(RunningGeneration):
    """What both ways have in common: drafts, where they are from, and what becomes of those that are rejected."""

    request: SpeculativeRequest

    def __init__(self, request: SpeculativeRequest, assignment: Assignment) -> None:
        super().__init__(request, assignment)
        self.drafter = request.drafter
        self.drafts: list[int] = []
        """Tokens behind `tokens` that are not verified."""
        self._draft_sources: deque[DraftSource] = deque()
        """Of each of them."""
        self._num_drafted: Counter[DraftSource] = Counter()
        self._num_accepted: Counter[DraftSource] = Counter()
        self.drafter.extend(self.tokens)

    @property
    def _num_known(self) -> int:
        """Positions whose token is known, or drafted."""
        return len(self.tokens) + len(self.drafts)

    @property
    def _exits(self) -> set[int]:
        return set(self.request.draft_exits)

    def _unsubmitted(self) -> list[int]:
        """Tokens and drafts that are known and have no row yet."""
        return [self.tokens[-1], *self.drafts][self.num_rows - (len(self.tokens) - 1) :]

    def _add_drafts(self, source: DraftSource, tokens: Sequence[int]) -> None:
        self.drafts += tokens
        self._draft_sources += [source] * len(tokens)
        self._num_drafted[source] += len(tokens)

    def _verified(self, drawn: DrawnToken, draft: DraftSource | None) -> GeneratedToken:
        """draft: what had drafted the token; None: nothing, or something else was drafted."""
        if draft is not None:
            self._num_accepted[draft] += 1
        # Of exits that were asked beside a verification only the drafter learns.
        return self._generated(drawn, drawn.predictions[-1:], is_draft=draft is not None)

    def _roll_back(self) -> None:
        """Make rows behind the last token stale: it is as if they never ran, the next ones overwrite their keys and
        values."""
        self.epoch += 1
        self.num_rows = len(self.tokens) - 1
        self.complete_to = min(self.complete_to, self.num_rows)

    def result(self, reason: FinishReason, error: str | None = None) -> RequestResult:
        result = super().result(reason, error)
        statistics = replace(
            result.statistics,
            drafted=self._num_drafted.total(),
            accepted=self._num_accepted.total(),
            ngram_drafted=self._num_drafted["ngram"],
            ngram_accepted=self._num_accepted["ngram"],
        )
        return replace(result, statistics=statistics)


class DraftingThenVerifying(RunningSpeculation):
    """Rounds of some drafts, which all layers then verify together."""

    def __init__(self, request: SpeculativeRequest, assignment: Assignment) -> None:
        super().__init__(request, assignment)
        self._has_begun = False
        """Whether it is chosen what is drafted before the next verification; it may be nothing."""
        self._drafting_exit: int | None = None
        """The exit that is in the middle of a draft."""
        self._num_to_draft = 0
        """Tokens of it at most."""

    @property
    def is_drafting(self) -> bool:
        """Whether an exit is in the middle of a draft."""
        return self._drafting_exit is not None

    @property
    def has_finished_draft(self) -> bool:
        """Whether what an exit has drafted waits to be verified."""
        return self._has_begun and not self.is_drafting and self.num_rows < self._num_known

    def choose_draft(self, load: StepLoad) -> None:
        """Begin the next draft if it is time to; all requests do so before any of them says which rows it needs."""
        if self._has_begun or self.num_rows >= self._num_known or self.is_prefilling:
            return
        request = self.request
        # Verification yields one token more than it accepts; the rows of all drafts need positions.
        room = min(request.max_tokens - len(self.generated) - 1, request.model.num_positions - len(self.tokens))
        choice = self.drafter.choose(load, room)
        self._has_begun = True
        self._drafting_exit, self._num_to_draft = choice.exit, choice.length
        if choice.tokens:
            self._add_drafts("ngram", choice.tokens)

    def _decoding_rows(self, load: StepLoad) -> Rows | None:
        if self.num_rows >= self._num_known:
            return None  # the next token is not known
        if self._drafting_exit is not None:
            token = self.drafts[-1] if self.drafts else self.tokens[-1]
            return self._rows("draft", [token], (ExitThreshold(self._drafting_exit, 0.0),), None)
        if load.is_drafting:
            return None
        asked = tuple([ExitThreshold(index, NEVER_TAKEN) for index in self.drafter.exits_to_ask(load)])
        return self._rows("verify", self._unsubmitted(), asked, len(self.tokens) - 1)

    def _receive_decoded(self, output: RowsOutput) -> Progress:
        if not output.answers:
            return Progress()  # rows that were answered before have run all layers
        self._layer_runs += output.layer_runs
        if not self.is_drafting:
            return self._verify(output.tokens)
        self._add_drafts("exit", [output.tokens[0].token])
        if not self.drafter.goes_on(output.tokens[0].confidence) or len(self.drafts) >= self._num_to_draft:
            self._drafting_exit = None
        return Progress()

    def _verify(self, drawn: Sequence[DrawnToken]) -> Progress:
        """Accept drafts as far as all layers draw the same tokens, and add the one that they draw then.

        Drafts and all layers draw with the same noise, so the answer is what they draw without drafts (Gumbel coupling,
        arXiv:2408.07978); greedily both take the most probable token."""
        drafts, tokens = self.drafts, []
        self._has_begun = False
        if not drafts:  # as in most steps of a large batch
            token = self._verified(drawn[-1], None)
            self.drafter.observe(0, 0, (token.token,), drawn[-1])
            return self._add(token)
        self.drafts = []
        reason, num_accepted = None, 0
        for one, draft in zip(drawn, [*drafts, None], strict=True):
            is_accepted = one.token == draft
            num_accepted += is_accepted
            token = self._verified(one, self._draft_sources.popleft() if is_accepted else None)
            tokens.append(token)
            reason = self._emit(token)
            if reason is not None or not is_accepted:
                break
        self._draft_sources.clear()
        self.drafter.observe(len(drafts), num_accepted, [one.token for one in tokens], drawn[-1])
        if num_accepted < len(drafts):
            self._roll_back()
        return Progress(tokens, reason)


class SpeculatingAcrossStages(RunningSpeculation):
    """Rows that go on through the pipeline stages, each with its draft behind it."""

    request: SpeculativeRequestAcrossStages

    def _decoding_rows(self, load: StepLoad) -> Rows | None:
        """The row of the last token or draft that is known, while those before it are on their way."""
        request, num_unverified = self.request, self.num_rows - (len(self.tokens) - 1)
        remaining = min(request.max_tokens - len(self.generated), request.model.num_positions - len(self.tokens) + 1)
        most = min(request.window.next(load.num_requests), remaining)
        if num_unverified >= most:
            return None
        if self.num_rows == self._num_known:
            self._add_drafts("ngram", self.drafter.guesses(self.drafts, most - num_unverified))
            if self.num_rows == self._num_known:
                return None  # the next token is not known
        is_drafted = request.draft_exits and most > 1 and num_unverified + 1 < remaining
        exits = (ExitThreshold(request.draft_exits[0], 0.0),) if is_drafted else ()
        return self._rows("speculate", self._unsubmitted()[:1], exits, self.num_rows)

    def _receive_decoded(self, output: RowsOutput) -> Progress:
        return self._compare(output) if output.answers else self._add_draft(output)

    def _add_draft(self, output: RowsOutput) -> Progress:
        """Take what an exit drafts behind a row; it may come later than the token that all layers draw there."""
        if output.tokens and output.stop == self._num_known:
            self._add_drafts("exit", [output.tokens[0].token])
        return Progress()

    def _compare(self, output: RowsOutput) -> Progress:
        """Compare drafts with what all layers draw behind the same rows; a rejected one makes all rows behind it stale.
        See `DraftingThenVerifying._verify`."""
        tokens: list[GeneratedToken] = []
        for one in output.tokens:
            draft = self.drafts.pop(0) if self.drafts else None
            source = None if draft is None else self._draft_sources.popleft()
            token = self._verified(one, source if one.token == draft else None)
            tokens.append(token)
            self.drafter.compare(source, token.token, token.is_draft)
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
        """Layer runs from a row to its token: a draft that is accepted was fed when its exit had given it, whatever the
        other layers took, or at once if earlier text did."""
        model = self.request.model
        if source == "ngram" or not self.request.draft_exits:
            return 0 if is_accepted else model.num_layers
        head = model.exits[self.request.draft_exits[0]]
        return (head.depth if is_accepted else model.num_layers) + (head.has_block and source is not None)
