"""Runs the rows of one pass up the layers of a stage, in one batch: at exits, rows leave and are deferred, or deferred
rows join.

Rows that exit leave the batch and are deferred where they left; when a later row of the same slot passes that exit,
they go on with it. So no layer sees a row twice, and every cache entry is what the full model computes. A draft is a
row that always exits; verifying is a row that does not, with the rows of the drafts as those that were deferred.

Where there is a next stage, rows that exit may go on at once, as fill rows: they are owed no token any more.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    DrawnToken,
    ExitThreshold,
    HeadScores,
    Prediction,
    RowsOutput,
    StageRows,
)
from megatron.early_exit.inference.worker.attention import AttentionMetadata, Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import AnyOutput, HeadOutput
from megatron.early_exit.inference.worker.sampling import Draw
from megatron.early_exit.inference.worker.slot_state import SlotState
from megatron.early_exit.platform.device import to_device

log = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits are not finite: its weights hold NaN or infinite values, or overflow"


Answer = Callable[[list[RowsOutput]], None]
"""Takes outputs as soon as they are there."""


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


@dataclass
class _Batch:
    """Rows on their way up, in the order of slots, one after the other."""

    scheduled: list[ScheduledRows]
    hidden: Tensor
    attention: AttentionMetadata

    def offsets(self) -> list[int]:
        """Where each one's rows begin."""
        return [0, *itertools.accumulate(one.num_rows for one in self.scheduled)][:-1]


class _Wanted(NamedTuple):
    """A row of a head's output, and whose it is."""

    row: int
    scheduled: ScheduledRows
    position: int
    threshold: ExitThreshold | None = None
    """Of an exit that is evaluated."""

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


class StageRunner:
    """Runs rows through the layers of one decoder, which has all layers of the model, or those of a stage."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        # By depth; of two exits at one depth the one with the smaller index comes first.
        self._exits = [one.index for one in sorted(decoder.exits, key=lambda one: (one.depth, one.index))]
        self._is_last = decoder.last_layer == decoder.num_layers
        self._fill_budget, self._fill_min_rows = 0, 1
        self._answer: Answer | None = None

    def run(
        self,
        scheduled: list[ScheduledRows],
        hidden: Tensor | None = None,
        fill_budget: int = 0,
        fill_min_rows: int = 1,
        answer: Answer | None = None,
    ) -> tuple[list[ScheduledRows], Tensor | None]:
        """Run the rows of `scheduled`, in the order of slots, until all have left or reached the end.

        Fills in what the heads make of each, and keeps rows that are deferred with their slots.
        hidden: [rows, h], what comes from the stage before; None: tokens are embedded. fill_budget: rows that may go
        on to the next stage after they were answered. fill_min_rows: of one slot, or else they are deferred. answer:
        gets outputs of exits at once; None: the caller takes them from `scheduled` at the end.

        Returns the rows that reached the end of these layers, and their hidden states. What fails for one request is
        noted with it. What fails for all is noted with all; a tensor-parallel rank raises it, since the others may not
        have failed."""
        self._fill_budget, self._fill_min_rows, self._answer = fill_budget, fill_min_rows, answer
        try:
            batch = self._run_layers(scheduled, hidden)
        except Exception as error:
            if self.decoder.weights.tp.size > 1:
                raise
            log.warning("rows of %d requests failed", len(scheduled), exc_info=True)
            for one in scheduled:
                one.fail(f"the step that it was part of failed ({type(error).__name__}: {error})")
                one.slot.has_failed = True
            return [], None
        return batch.scheduled, batch.hidden

    def _run_layers(self, scheduled: list[ScheduledRows], hidden: Tensor | None) -> _Batch:
        """The rows that reach the end of these layers."""
        attention = self.decoder.attention_metadata([one.segment for one in scheduled])
        if hidden is None:
            hidden = self.decoder.embed([token for one in scheduled for token in one.arrived.tokens], attention)
        batch, residual, depth = _Batch(scheduled, hidden, attention), hidden, self.decoder.first_layer
        exits = list(self._exits)
        while batch.scheduled:
            while exits and not any(self._has_business(one, exits[0]) for one in batch.scheduled):
                exits.pop(0)
            following = self.decoder.exit(exits[0]).depth if exits else self.decoder.last_layer
            if following > depth:
                batch.hidden, residual = self.decoder.run_layers(batch.hidden, batch.attention, depth, following)
                for one in batch.scheduled:
                    one.layer_passes += one.num_rows * (following - depth)
                    one.layer_runs += following - depth
                depth = following
            if not exits:
                break
            batch = self._at_exit(exits.pop(0), batch, residual)
        if self._is_last:
            self._at_end(batch)
        return batch

    def _has_business(self, one: ScheduledRows, exit_index: int) -> bool:
        """Whether something happens to these rows at an exit."""
        return (
            exit_index in one.thresholds
            or exit_index in one.slot.deferred
            or exit_index in one.rows.score_heads
            or (exit_index in one.slot.request.exits and self.decoder.exit(exit_index).block is not None)
        )

    # At an exit.

    def _at_exit(self, index: int, batch: _Batch, residual: Tensor) -> _Batch:
        """Evaluate the exit, let rows leave, and let the rows that are deferred here join those that go on."""
        head = self.decoder.exit(index)
        states = residual if head.mlp is not None else batch.hidden
        offsets = batch.offsets()
        if head.block is not None:
            states = self._run_block(index, batch, offsets)
        evaluated, last_rows, scored, scored_rows = [], [], [], []
        probed, probed_rows = [], []
        for one, offset in zip(batch.scheduled, offsets, strict=True):
            threshold = one.thresholds.pop(index, None)
            if threshold is not None:
                by_probe = threshold.score == "probe"
                wanted, rows = (probed, probed_rows) if by_probe else (evaluated, last_rows)
                wanted.append(_Wanted(len(wanted), one, one.stop - 1, threshold))
                rows.append(offset + one.num_rows - 1)
            if one.is_scored_by(index):
                for position in one.positions(one.scored_from):
                    scored.append(_Wanted(len(scored), one, position))
                    scored_rows.append(offset + position - one.first)
        answered = self._evaluate(index, evaluated, take_rows(states, last_rows)) if evaluated else []
        if probed:
            answered += self._evaluate_behind_probe(index, probed, take_rows(states, probed_rows))
        if scored:
            read = take_rows(states, scored_rows)
            self._score(index, self.decoder.exit_output(index, read), scored, read)
        following = self._leave_and_join(index, batch, offsets, {one.rows.slot for one in answered})
        if self._answer is not None:
            self._answer_now(index, batch, answered, scored)
        return following

    def _answer_now(self, index: int, batch: _Batch, answered: list[ScheduledRows], scored: list[_Wanted]) -> None:
        """Report what an exit has given."""
        drafts = [one for one in answered if one.rows.phase == "speculate"]
        ended = [one for one in batch.scheduled if one.ends_at(index)]
        partly = {one.rows.slot: one for one in (wanted.scheduled for wanted in scored) if one not in ended}
        failed = [one for one in batch.scheduled if one.error is not None and one.answers]
        outputs = [one.output(0) for one in (*drafts, *partly.values()) if one.error is None]
        done = {one.rows.slot: one for one in (*answered, *ended, *failed) if one not in drafts}
        outputs += [one.output(one.answers) for one in done.values()]
        if outputs:
            self._answer(outputs)

    def _leave_and_join(self, index: int, batch: _Batch, offsets: list[int], answered: set[int]) -> _Batch:
        """answered: slots whose rows got their token from this exit."""
        is_end = self.decoder.exit(index).depth == self.decoder.num_layers
        staying, parts, has_changed = [], [], False
        for one, offset in zip(batch.scheduled, offsets, strict=True):
            rows, slot = slice(offset, offset + one.num_rows), one.slot
            if one.ends_at(index):
                has_changed = True
                continue
            if one.rows.slot in answered and one.rows.phase != "speculate":
                one.thresholds.clear()
                # A row that has run all layers is complete, but a draft is deferred until its verification.
                is_complete = is_end and not one.is_draft
                if is_complete:
                    one.complete()
                if not one.goes_on:
                    has_changed = True
                    if not is_complete:
                        slot.defer(index, one.first, batch.hidden[rows])
                    continue
            staying.append(one)
            deferred = slot.deferred.pop(index, None)
            if deferred is not None:
                assert deferred.stop == one.first, "deferred rows are not followed by those that join them"
                has_changed = True
                parts.append(deferred.hidden)
                one.first = deferred.first
            parts.append(batch.hidden[rows])
        if not has_changed:
            return batch
        if not staying:
            return _Batch([], batch.hidden[:0], batch.attention)
        attention = self.decoder.attention_metadata([one.segment for one in staying])
        return _Batch(staying, torch.cat(parts), attention)

    def _may_fill(self, index: int, one: ScheduledRows) -> bool:
        """Whether rows that this exit answers, and those deferred here before, go on as fill rows: the next stage must
        take them."""
        deferred = one.slot.deferred.get(index)
        count = one.num_rows + (0 if deferred is None else deferred.hidden.size(0))
        if self._is_last or count < self._fill_min_rows or count > self._fill_budget:
            return False
        self._fill_budget -= count
        return True

    def _evaluate(self, index: int, wanted: list[_Wanted], states: Tensor) -> list[ScheduledRows]:
        """Evaluate the exit on each one's last row. Returns those that it gives a token.

        An approximate head only says which rows may leave: the exit's own head then decides, and gives the token; so
        the confidence that counts is the smaller of both, and an exit that is observed reports that one. Drafts come
        from the approximate head, since they are verified anyway. states: [wanted, h]"""
        tokens_only = all(one.scheduled.gives_draft and one.is_plain_argmax for one in wanted)
        output = self.decoder.approximate_output(index, states, tokens_only=tokens_only)
        is_approximate = self.decoder.has_approximate_heads
        taken = [one for one in wanted if one.scheduled.gives_draft]
        candidates = []
        for one in wanted:
            if one.scheduled.gives_draft:
                continue
            reaches = one.threshold.is_observed or one.threshold.is_reached(output.confidence(one.row))
            if is_approximate and not reaches:
                one.scheduled.predictions.append(_prediction(index, output, one.row, is_approximate=True))
            else:
                candidates.append(one)
        answered = self._take(index, output, taken)
        approximate = output
        if candidates and is_approximate:
            output = self.decoder.exit_output(index, take_rows(states, [one.row for one in candidates]))
        confident = []
        for row, one in enumerate(candidates):
            approximate_row, one = one.row, one._replace(row=row if is_approximate else one.row)
            prediction = _prediction(index, output, one.row)
            if one.threshold.is_observed and is_approximate:
                least = min(prediction.confidence, approximate.confidence(approximate_row))
                prediction = msgspec.structs.replace(prediction, confidence=least)
            one.scheduled.predictions.append(prediction)
            if one.threshold.is_reached(output.confidence(one.row)):
                confident.append(one)
        return answered + self._take(index, output, confident)

    def _evaluate_behind_probe(self, index: int, wanted: list[_Wanted], states: Tensor) -> list[ScheduledRows]:
        """Ask the exit's probe about each one's last row, and evaluate the exit's own head for those that leave or that
        are observed. Returns those that it gives a token. states: [wanted, h]"""
        scores = self.decoder.probe_scores(index, states)
        leaving = [one for one in wanted if one.threshold.is_observed or one.threshold.is_reached(scores[one.row])]
        if not leaving:
            return []
        tokens_only = all(one.needs_only_token for one in leaving)
        output = self.decoder.exit_output(
            index, take_rows(states, [one.row for one in leaving]), tokens_only=tokens_only
        )
        reached = []
        for row, one in enumerate(leaving):
            one.scheduled.predictions.append(Prediction(index, output.token(row), scores[one.row]))
            if one.threshold.is_reached(scores[one.row]):
                reached.append(one._replace(row=row))
        return self._take(index, output, reached)

    def _take(self, index: int, output: AnyOutput, wanted: list[_Wanted]) -> list[ScheduledRows]:
        """The exit gives these rows their tokens. Returns those to which it could."""
        is_end = self.decoder.exit(index).depth == self.decoder.num_layers
        answered = []
        for one, token, log_prob in self._draw(output, [one for one in wanted if self._check_finite(one, output)]):
            rows, slot = one.scheduled, one.scheduled.slot
            if rows.rows.phase != "speculate":
                rows.is_answered = True
                if not is_end and not rows.is_draft:
                    rows.goes_on = self._may_fill(index, rows)
                    may_defer = slot.num_deferred + rows.num_rows <= slot.request.max_deferred
                    rows.is_catching_up = not rows.goes_on and not may_defer
                    rows.goes_on |= rows.is_catching_up
            rows.tokens.append(self._drawn_token(one, output, index, token, log_prob))
            answered.append(rows)
        return answered

    def _run_block(self, index: int, batch: _Batch, offsets: list[int]) -> Tensor:
        """Run the exit's block over the rows of all slots that may evaluate this exit, now or later; deferred rows that
        left here have been through it. Returns states for every row of the batch; those of other slots are as before.
        """
        users = [i for i, one in enumerate(batch.scheduled) if index in one.slot.request.exits]
        if not users:
            return batch.hidden
        attention, rows = batch.attention, list(range(batch.attention.num_rows))
        if len(users) < len(batch.scheduled):
            attention = self.decoder.attention_metadata([batch.scheduled[i].segment for i in users])
            rows = [offsets[i] + row for i in users for row in range(batch.scheduled[i].num_rows)]
        for i in users:
            batch.scheduled[i].layer_passes += batch.scheduled[i].num_rows
            batch.scheduled[i].layer_runs += 1
        out = self.decoder.run_exit_block(index, take_rows(batch.hidden, rows), attention)
        if len(rows) == batch.attention.num_rows:
            return out
        return batch.hidden.index_copy(0, to_device(rows, out.device), out)

    # At the end.

    def _at_end(self, batch: _Batch) -> None:
        """Evaluate the final head where it is wanted; all rows of the batch have run all layers."""
        drawn, scored, rows, unseen = [], [], [], []
        for one, offset in zip(batch.scheduled, batch.offsets(), strict=True):
            one.complete()
            draws_from = one.stop if one.rows.sample_from is None or one.is_answered else one.rows.sample_from
            scores_from = one.scored_from if one.is_scored_by(FINAL_HEAD) else one.stop
            if min(draws_from, scores_from) >= one.stop:
                unseen.append(_Wanted(offset + one.num_rows - 1, one, one.stop - 1))
            for position in one.positions(min(draws_from, scores_from)):
                wanted = _Wanted(len(rows), one, position)
                rows.append(offset + position - one.first)
                if position >= draws_from:
                    drawn.append(wanted)
                if position >= scores_from:
                    scored.append(wanted)
        if unseen:
            self._check_hidden(take_rows(batch.hidden, [one.row for one in unseen]), unseen)
        if not rows:
            return
        tokens_only = not scored and all(one.needs_only_token for one in drawn)
        output = self.decoder.final_output(take_rows(batch.hidden, rows), tokens_only=tokens_only)
        if scored:
            self._score(FINAL_HEAD, output, scored)
        drawn = [one for one in drawn if self._check_finite(one, output)]
        for one, token, log_prob in self._draw(output, drawn):
            one.scheduled.tokens.append(self._drawn_token(one, output, FINAL_HEAD, token, log_prob))

    # What heads say.

    def _draw(self, output: AnyOutput, wanted: list[_Wanted]) -> list[tuple[_Wanted, int, float | None]]:
        """(wanted, token, its log-probability) of each. What fails for one slot's rows ends that request alone."""
        if all(one.is_plain_argmax for one in wanted):
            return [(one, output.token(one.row), output.max_log_prob(one.row)) for one in wanted]
        try:
            return [(one, *drawn) for one, drawn in zip(wanted, output.draw([one.draw for one in wanted]), strict=True)]
        except Exception as error:
            if self.decoder.weights.tp.size > 1:  # the other ranks may not have failed
                raise
            if len(wanted) == 1:
                self._fail(wanted[0].scheduled, error)
                return []
            return [drawn for one in wanted for drawn in self._draw(output, [one])]

    @staticmethod
    def _fail(one: ScheduledRows, error: Exception) -> None:
        log.info("a token of request %d could not be drawn", one.rows.request_id, exc_info=error)
        one.fail(f"its tokens could not be drawn ({type(error).__name__}: {error})")

    @staticmethod
    def _check_finite(one: _Wanted, output: AnyOutput) -> bool:
        if not output.is_finite(one.row):
            one.scheduled.fail(_NOT_FINITE)
        return one.scheduled.error is None

    @staticmethod
    def _check_hidden(hidden: Tensor, unseen: list[_Wanted]) -> None:
        """Rows that no head sees at the end must be finite as well: their keys and values stay for later requests. What
        is not finite in one row is not in all later ones. hidden: [unseen, h]"""
        for one, is_finite in zip(unseen, hidden.isfinite().all(-1).tolist(), strict=True):
            if not is_finite:
                one.scheduled.fail(_NOT_FINITE)

    @staticmethod
    def _drawn_token(
        one: _Wanted, output: AnyOutput, exit_index: int, token: int, log_prob: float | None
    ) -> DrawnToken:
        rows = one.scheduled
        # Nobody sees what else an exit says of its drafts, and a certified head does not know.
        is_draft = rows.gives_draft and exit_index != FINAL_HEAD
        count = 0 if is_draft else rows.slot.request.top_log_probs
        # Exits have seen the newest row alone.
        predictions = rows.predictions if one.position == rows.stop - 1 else []
        if exit_index == FINAL_HEAD:
            predictions = [*predictions, _prediction(FINAL_HEAD, output, one.row)]
        return DrawnToken(
            token=token,
            log_prob=log_prob,
            confidence=output.confidence(one.row),
            exit=exit_index,
            predictions=tuple(predictions),
            top_log_probs=tuple(output.top([one.row], count)[0]) if count else (),
            caught_up=rows.is_catching_up,
        )

    def _score(self, exit_index: int, output: HeadOutput, wanted: list[_Wanted], states: Tensor | None = None) -> None:
        """Add what a head says about scored positions; those of one request lie one after the other. states: [wanted,
        h], of an exit."""
        of_rows = {one.row: one.scheduled.rows.target_of(one.position) for one in wanted}
        targets = {row: target for row, target in of_rows.items() if target is not None}
        log_probs: dict[int, float] = {}
        if targets:
            log_probs = dict(zip(targets, output.log_probs_of(list(targets), list(targets.values())), strict=True))
        for _, members in itertools.groupby(wanted, key=lambda one: one.scheduled.rows.slot):
            group = list(members)
            one, rows = group[0].scheduled, [member.row for member in group]
            if not all(self._check_finite(member, output) for member in group):
                continue
            reports_states = one.rows.score_states and states is not None
            one.scores.append(HeadScores(
                exit=exit_index,
                tokens=[output.token(row) for row in rows],
                confidences=[output.confidence(row) for row in rows],
                log_probs=[log_probs[row] for row in rows if row in log_probs],
                top_log_probs=output.top(rows, one.rows.score_top) if one.rows.score_top else [],
                logits=_bytes_of([output.logits(row) for row in rows]) if one.rows.score_logits else None,
                states=_bytes_of([states[row] for row in rows]) if reports_states else None,
            ))  # fmt: skip


def _prediction(exit_index: int, output: AnyOutput, row: int, is_approximate: bool = False) -> Prediction:
    return Prediction(exit_index, output.token(row), output.confidence(row), is_approximate)


def _bytes_of(rows: list[Tensor]) -> bytes:
    return torch.stack(rows).float().cpu().numpy().tobytes()


def take_rows(hidden: Tensor, rows: list[int]) -> Tensor:
    """Those rows of `hidden`, a view where that can be."""
    if rows == list(range(hidden.size(0))):
        return hidden
    if len(rows) == 1:
        return hidden[rows[0] : rows[0] + 1]
    return hidden[to_device(rows, hidden.device)]
