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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.protocol import FINAL_HEAD, Prediction, RowsOutput
from megatron.early_exit.inference.worker.attention import AttentionMetadata
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.graphs import MOST_ROWS_PER_SLOT
from megatron.early_exit.inference.worker.head_output import AnyOutput, HeadOutput
from megatron.early_exit.inference.worker.head_reports import (
    check_finite,
    check_hidden,
    draw,
    drawn_token,
    prediction,
    score,
)
from megatron.early_exit.inference.worker.scheduled_rows import ExitRow, HeadRow, ScheduledRows
from megatron.early_exit.inference.worker.slot_state import SlotState
from megatron.early_exit.platform.device import to_device

log = logging.getLogger(__name__)

Answer = Callable[[list[RowsOutput]], None]
"""Takes outputs as soon as they are there."""


@dataclass
class _Batch:
    """Rows on their way up, in the order of slots, one after the other."""

    scheduled: list[ScheduledRows]
    hidden: Tensor
    attention: AttentionMetadata

    def offsets(self) -> list[int]:
        """Where each one's rows begin."""
        return [0, *itertools.accumulate(one.num_rows for one in self.scheduled)][:-1]


class StageRunner:
    """Runs rows through the layers of one decoder, which has all layers of the model, or those of a stage."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        # By depth; of two exits at one depth the one with the smaller index comes first.
        self._exits = [one.index for one in sorted(decoder.exits, key=lambda one: (one.depth, one.index))]
        self._is_last = decoder.last_layer == decoder.num_layers
        self._is_alone = decoder.weights.tp.size == 1
        # With more rows the pass that completes a slot's deferred ones would run kernel by kernel. No token changes.
        self._most_deferred = None if decoder.graphs is None else MOST_ROWS_PER_SLOT - 1
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
            if not self._is_alone:
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
        evaluated: list[ExitRow] = []
        probed: list[ExitRow] = []
        scored: list[HeadRow] = []
        last_rows: list[int] = []
        probed_rows: list[int] = []
        scored_rows: list[int] = []
        for one, offset in zip(batch.scheduled, offsets, strict=True):
            threshold = one.thresholds.pop(index, None)
            if threshold is not None:
                by_probe = threshold.score == "probe"
                wanted, rows = (probed, probed_rows) if by_probe else (evaluated, last_rows)
                wanted.append(ExitRow(len(wanted), one, one.stop - 1, threshold))
                rows.append(offset + one.num_rows - 1)
            if one.is_scored_by(index):
                for position in one.positions(one.scored_from):
                    scored.append(HeadRow(len(scored), one, position))
                    scored_rows.append(offset + position - one.first)
        answered = self._evaluate(index, evaluated, take_rows(states, last_rows)) if evaluated else []
        if probed:
            answered += self._evaluate_behind_probe(index, probed, take_rows(states, probed_rows))
        if scored:
            read = take_rows(states, scored_rows)
            score(index, self.decoder.exit_output(index, read), scored, read)
        following = self._leave_and_join(index, batch, offsets, {one.rows.slot for one in answered})
        if self._answer is not None:
            self._answer_now(self._answer, index, batch, answered, scored)
        return following

    @staticmethod
    def _answer_now(
        answer: Answer, index: int, batch: _Batch, answered: list[ScheduledRows], scored: list[HeadRow]
    ) -> None:
        """Report what an exit has given."""
        drafts = [one for one in answered if one.rows.phase == "speculate"]
        ended = [one for one in batch.scheduled if one.ends_at(index)]
        partly = {one.rows.slot: one for one in (wanted.scheduled for wanted in scored) if one not in ended}
        failed = [one for one in batch.scheduled if one.error is not None and one.answers]
        outputs = [one.output(0) for one in (*drafts, *partly.values()) if one.error is None]
        done = {one.rows.slot: one for one in (*answered, *ended, *failed) if one not in drafts}
        outputs += [one.output(one.answers) for one in done.values()]
        if outputs:
            answer(outputs)

    def _leave_and_join(self, index: int, batch: _Batch, offsets: list[int], answered: set[int]) -> _Batch:
        """answered: slots whose rows got their token from this exit."""
        is_end = self.decoder.exit(index).depth == self.decoder.num_layers
        staying: list[ScheduledRows] = []
        parts: list[Tensor] = []
        has_changed = False
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

    def _evaluate(self, index: int, wanted: list[ExitRow], states: Tensor) -> list[ScheduledRows]:
        """Evaluate the exit on each one's last row. Returns those that it gives a token.

        Drafts come from the approximate head, since they are verified anyway. states: [wanted, h]"""
        drafting = [one for one in wanted if one.scheduled.gives_draft]
        if len(drafting) == len(wanted):
            tokens_only = all(one.is_plain_argmax for one in wanted)
            return self._take(index, self.decoder.approximate_output(index, states, tokens_only=tokens_only), wanted)
        output = self.decoder.approximate_output(index, states)
        answered = self._take(index, output, drafting)
        return answered + self._decide(index, [one for one in wanted if not one.scheduled.gives_draft], output, states)

    def _decide(self, index: int, wanted: list[ExitRow], output: HeadOutput, states: Tensor) -> list[ScheduledRows]:
        """Let rows leave whose threshold is reached. Returns those to which the exit gives a token.

        An approximate head only says which rows may leave: the exit's own head then decides, and gives the token; so
        the confidence that counts is the smaller of both, and an exit that is observed reports that one. output: of the
        approximate head, or of the exit's own if there is none. states: what it has seen"""
        if not self.decoder.has_approximate_heads:
            for one in wanted:
                one.scheduled.predictions.append(prediction(index, output, one.row))
            confident = [one for one in wanted if one.threshold.is_reached(output.confidence(one.row))]
            return self._take(index, output, confident)
        candidates = []
        for one in wanted:
            if one.threshold.is_observed or one.threshold.is_reached(output.confidence(one.row)):
                candidates.append(one)
            else:
                one.scheduled.predictions.append(prediction(index, output, one.row, is_approximate=True))
        if not candidates:
            return []
        own = self.decoder.exit_output(index, take_rows(states, [one.row for one in candidates]))
        confident = []
        for row, one in enumerate(candidates):
            confidence = own.confidence(row)
            reported = min(confidence, output.confidence(one.row)) if one.threshold.is_observed else confidence
            one.scheduled.predictions.append(Prediction(index, own.token(row), reported))
            if one.threshold.is_reached(confidence):
                confident.append(one.at(row))
        return self._take(index, own, confident)

    def _evaluate_behind_probe(self, index: int, wanted: list[ExitRow], states: Tensor) -> list[ScheduledRows]:
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
                reached.append(one.at(row))
        return self._take(index, output, reached)

    def _take(self, index: int, output: AnyOutput, wanted: Sequence[HeadRow]) -> list[ScheduledRows]:
        """The exit gives these rows their tokens. Returns those to which it could."""
        is_end = self.decoder.exit(index).depth == self.decoder.num_layers
        answered = []
        finite = [one for one in wanted if check_finite(one, output)]
        for one, token, log_prob in draw(output, finite, self._is_alone):
            rows, slot = one.scheduled, one.scheduled.slot
            if rows.rows.phase != "speculate":
                rows.is_answered = True
                if not is_end and not rows.is_draft:
                    rows.goes_on = self._may_fill(index, rows)
                    may_defer = slot.num_deferred + rows.num_rows <= self._max_deferred(slot)
                    rows.is_catching_up = not rows.goes_on and not may_defer
                    rows.goes_on |= rows.is_catching_up
            rows.tokens.append(drawn_token(one, output, index, token, log_prob))
            answered.append(rows)
        return answered

    def _max_deferred(self, slot: SlotState) -> int:
        wanted = slot.request.max_deferred
        return wanted if self._most_deferred is None else min(wanted, self._most_deferred)

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
        drawn: list[HeadRow] = []
        scored: list[HeadRow] = []
        rows: list[int] = []
        unseen: list[ScheduledRows] = []
        unseen_rows: list[int] = []
        for one, offset in zip(batch.scheduled, batch.offsets(), strict=True):
            one.complete()
            draws_from = one.stop if one.rows.sample_from is None or one.is_answered else one.rows.sample_from
            scores_from = one.scored_from if one.is_scored_by(FINAL_HEAD) else one.stop
            if min(draws_from, scores_from) >= one.stop:
                unseen.append(one)
                unseen_rows.append(offset + one.num_rows - 1)
            for position in one.positions(min(draws_from, scores_from)):
                wanted = HeadRow(len(rows), one, position)
                rows.append(offset + position - one.first)
                if position >= draws_from:
                    drawn.append(wanted)
                if position >= scores_from:
                    scored.append(wanted)
        if unseen:
            check_hidden(take_rows(batch.hidden, unseen_rows), unseen)
        if not rows:
            return
        states = take_rows(batch.hidden, rows)
        output: AnyOutput
        if scored:
            output = self.decoder.final_output(states)
            score(FINAL_HEAD, output, scored)
        else:
            tokens_only = all(one.needs_only_token for one in drawn)
            output = self.decoder.final_output(states, tokens_only=tokens_only)
        drawn = [one for one in drawn if check_finite(one, output)]
        for one_drawn, token, log_prob in draw(output, drawn, self._is_alone):
            one_drawn.scheduled.tokens.append(drawn_token(one_drawn, output, FINAL_HEAD, token, log_prob))


def take_rows(hidden: Tensor, rows: list[int]) -> Tensor:
    """Those rows of `hidden`, a view where that can be."""
    if rows == list(range(hidden.size(0))):
        return hidden
    if len(rows) == 1:
        return hidden[rows[0] : rows[0] + 1]
    return hidden[to_device(rows, hidden.device)]
