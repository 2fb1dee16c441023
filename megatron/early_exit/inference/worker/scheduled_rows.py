"""The rows of one slot on their way through a stage, and what the heads make of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from megatron.early_exit.inference.protocol import (
    DrawnToken,
    ExitThreshold,
    HeadScores,
    Prediction,
    RowsOutput,
    StageRows,
)
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.sampling import Draw
from megatron.early_exit.inference.worker.slot_state import SlotState


@dataclass(eq=False)
class ScheduledRows:
    """The rows of one slot in one pass, and what the heads have made of them so far."""

    arrived: StageRows
    slot: SlotState
    predictions: list[Prediction] = field(default_factory=list)
    tokens: list[DrawnToken] = field(default_factory=list)
    """That are to be reported."""
    scores: list[HeadScores] = field(default_factory=list)
    is_answered: bool = False
    """Whether an exit, here or before, has given the token, or something failed: no head is evaluated any more."""
    goes_on: bool = False
    """An exit gave its token, and it is not deferred: it goes to the next stage as fill rows, or is catching up."""
    is_catching_up: bool = False
    """It goes on only because no more rows may be deferred."""
    error: str | None = None

    def __post_init__(self) -> None:
        self.rows, self.first, self.stop = self.arrived.rows, self.arrived.first, self.arrived.stop
        """first: position of its first row in the batch, which changes when deferred rows join."""
        self.thresholds = {one.exit: one for one in self.rows.exits}
        """Of the exits that are still to be evaluated, by index."""
        self.answers, self.is_answered = self.arrived.answers, self.arrived.is_fill
        self.predictions += self.arrived.predictions
        self.layer_passes, self.layer_runs = self.arrived.layer_passes, self.arrived.layer_runs

    @property
    def num_rows(self) -> int:
        return self.stop - self.first

    @property
    def segment(self) -> Segment:
        return Segment(self.rows.slot, self.first, self.num_rows)

    @property
    def is_draft(self) -> bool:
        return self.rows.phase == "draft"

    @property
    def gives_draft(self) -> bool:
        """Whether the token of its exit is a draft, however confident the exit is."""
        return self.rows.phase in ("draft", "speculate")

    def ends_at(self, exit_index: int) -> bool:
        """Whether nothing is wanted of layers behind this exit, not even their keys and values."""
        return self.rows.phase == "score" and self.rows.score_heads[-1] == exit_index

    def is_scored_by(self, head: int) -> bool:
        """Whether the predictions of a head, an exit index or `FINAL_HEAD`, are wanted."""
        return head in self.rows.score_heads and not self.is_answered

    @property
    def scored_from(self) -> int:
        """First position whose predictions may be wanted: rows that are taken along were scored before, or failed."""
        return max(self.rows.score_from, self.rows.first)

    def positions(self, start: int) -> range:
        """Positions of its rows in the batch from `start` on."""
        return range(max(start, self.first), self.stop)

    def complete(self) -> None:
        """Note that its rows have run all layers."""
        # Rows that ran behind a gap of others do not count: what a scoring request skipped, for instance.
        if self.first <= self.slot.complete_to:
            self.slot.complete_to = self.stop

    def fail(self, error: str) -> None:
        """End the request with this error; no head is evaluated any more."""
        self.error, self.is_answered = error, True

    def output(self, answers: int) -> RowsOutput:
        """What is to be reported now. answers: `Rows` that it answers; what came before is not reported again."""
        rows = self.rows
        output = RowsOutput(
            request_id=rows.request_id, slot=rows.slot, generation=rows.generation, epoch=rows.epoch, stop=self.stop,
            tokens=() if self.error else tuple(self.tokens), scores=tuple(self.scores),
            layer_passes=self.layer_passes, layer_runs=self.layer_runs,
            complete_to=self.slot.complete_to, answers=answers, error=self.error,
        )  # fmt: skip
        self.tokens, self.scores, self.layer_passes, self.layer_runs = [], [], 0, 0
        self.answers -= answers
        return output

    def following(self) -> StageRows:
        """The rows as they come to the next stage."""
        return StageRows(
            rows=msgspec.structs.replace(self.rows, exits=tuple(self.thresholds.values())),
            first=self.first,
            tokens=tuple(self.slot.ids[self.first : self.stop]),
            answers=self.answers,
            predictions=() if self.is_answered else tuple(self.predictions),
            layer_passes=self.layer_passes,
            layer_runs=self.layer_runs,
        )


@dataclass(eq=False, slots=True)
class HeadRow:
    """A row of a head's output, and whose it is."""

    row: int
    scheduled: ScheduledRows
    position: int

    @property
    def token_index(self) -> int:
        """Number in the answer of the token behind this position, from 0."""
        return self.position + 1 - self.scheduled.slot.request.num_prompt_tokens

    @property
    def is_plain_argmax(self) -> bool:
        """Whether that token is the head's most probable one."""
        request = self.scheduled.slot.request
        return request.sampling.is_plain_argmax and self.token_index >= request.min_tokens

    @property
    def needs_only_token(self) -> bool:
        """Whether nothing else is reported of the head."""
        request = self.scheduled.slot.request
        return self.is_plain_argmax and not request.log_probs and not request.top_log_probs

    @property
    def draw(self) -> Draw:
        """The draw of the token behind this position."""
        slot, request = self.scheduled.slot, self.scheduled.slot.request
        return Draw(
            row=self.row,
            settings=request.sampling,
            index=self.token_index,
            history=slot.ids[: self.position + 1],
            num_prompt_tokens=request.num_prompt_tokens,
            excluded=slot.excluded(self.token_index),
        )


@dataclass(eq=False, slots=True)
class ExitRow(HeadRow):
    """A row of the output of an exit that may take it."""

    threshold: ExitThreshold

    def at(self, row: int) -> ExitRow:
        """The same in another output."""
        return ExitRow(row, self.scheduled, self.position, self.threshold)
