"""What heads say about rows, as it is reported: tokens that they give, predictions, scores of given tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference.protocol import FINAL_HEAD, DrawnToken, HeadScores, Prediction, TokenLogProb
from megatron.early_exit.inference.worker.head_output import AnyOutput, ArgmaxOutput, HeadOutput
from megatron.early_exit.inference.worker.scheduled_rows import HeadRow, ScheduledRows

log = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits are not finite: its weights hold NaN or infinite values, or overflow"


def draw(output: AnyOutput, wanted: Sequence[HeadRow], is_alone: bool) -> list[tuple[HeadRow, int, float | None]]:
    """(row, token, its log-probability) of each. What fails for one slot's rows ends that request alone, unless other
    tensor-parallel ranks, which may not have failed, share the rows (not `is_alone`)."""
    if isinstance(output, ArgmaxOutput) or all(one.is_plain_argmax for one in wanted):
        return [(one, output.token(one.row), output.max_log_prob(one.row)) for one in wanted]
    try:
        return [(one, *drawn) for one, drawn in zip(wanted, output.draw([one.draw for one in wanted]), strict=True)]
    except Exception as error:
        if not is_alone:
            raise
        if len(wanted) == 1:
            _fail(wanted[0].scheduled, error)
            return []
        return [drawn for one in wanted for drawn in draw(output, [one], is_alone)]


def _fail(one: ScheduledRows, error: Exception) -> None:
    log.info("a token of request %d could not be drawn", one.rows.request_id, exc_info=error)
    one.fail(f"its tokens could not be drawn ({type(error).__name__}: {error})")


def check_finite(one: HeadRow, output: AnyOutput) -> bool:
    """Whether its request can go on; if the logits are not finite it ends."""
    if not output.is_finite(one.row):
        one.scheduled.fail(_NOT_FINITE)
    return one.scheduled.error is None


def check_hidden(hidden: Tensor, unseen: Sequence[ScheduledRows]) -> None:
    """Rows that no head sees at the end must be finite as well: their keys and values stay for later requests. What is
    not finite in one row is not in all later ones. hidden: [unseen, h], of the last row of each"""
    for one, is_finite in zip(unseen, hidden.isfinite().all(-1).tolist(), strict=True):
        if not is_finite:
            one.fail(_NOT_FINITE)


def prediction(exit_index: int, output: AnyOutput, row: int, is_approximate: bool = False) -> Prediction:
    """What a head predicts, an exit's or the final one, and how sure it is."""
    return Prediction(exit_index, output.token(row), output.confidence(row), is_approximate)


def drawn_token(one: HeadRow, output: AnyOutput, exit_index: int, token: int, log_prob: float | None) -> DrawnToken:
    """The token that a head gives behind a row, with what is reported of it."""
    rows = one.scheduled
    # Nobody sees what else an exit says of its drafts, and a certified head does not know.
    is_draft = rows.gives_draft and exit_index != FINAL_HEAD
    count = 0 if is_draft else rows.slot.request.top_log_probs
    top: Sequence[TokenLogProb] = ()
    if count:
        assert isinstance(output, HeadOutput), "where more than tokens is reported, all logits are computed"
        top = output.top([one.row], count)[0]
    # Exits have seen the newest row alone.
    predictions = rows.predictions if one.position == rows.stop - 1 else []
    if exit_index == FINAL_HEAD:
        predictions = [*predictions, prediction(FINAL_HEAD, output, one.row)]
    return DrawnToken(
        token=token,
        log_prob=log_prob,
        confidence=output.confidence(one.row),
        exit=exit_index,
        predictions=tuple(predictions),
        top_log_probs=tuple(top),
        caught_up=rows.is_catching_up,
    )


def score(exit_index: int, output: HeadOutput, wanted: Sequence[HeadRow], states: Tensor | None = None) -> None:
    """Add what a head says about scored positions; those of one request lie one after the other. states: [wanted, h],
    of an exit."""
    of_rows = {one.row: one.scheduled.rows.target_of(one.position) for one in wanted}
    targets = {row: target for row, target in of_rows.items() if target is not None}
    log_probs: dict[int, float] = {}
    if targets:
        log_probs = dict(zip(targets, output.log_probs_of(list(targets), list(targets.values())), strict=True))
    for _, members in itertools.groupby(wanted, key=lambda one: one.scheduled.rows.slot):
        group = list(members)
        one, rows = group[0].scheduled, [member.row for member in group]
        if not all(check_finite(member, output) for member in group):
            continue
        reported = None
        if one.rows.score_states and states is not None:
            reported = _bytes_of([states[row] for row in rows])
        one.scores.append(HeadScores(
            exit=exit_index,
            tokens=[output.token(row) for row in rows],
            confidences=[output.confidence(row) for row in rows],
            log_probs=[log_probs[row] for row in rows if row in log_probs],
            top_log_probs=output.top(rows, one.rows.score_top) if one.rows.score_top else [],
            logits=_bytes_of([output.logits(row) for row in rows]) if one.rows.score_logits else None,
            states=reported,
        ))  # fmt: skip


def _bytes_of(rows: list[Tensor]) -> bytes:
    return torch.stack(rows).float().cpu().numpy().tobytes()
