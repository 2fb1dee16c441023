"""Prompts and answers as training samples: whole rows of tokens with a loss mask on the answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.early_exit.data.conversations import MarkedTokens, prompt_and_answer
from megatron.early_exit.data.loss_masks import BEGINS, HAS_LOSS, mask_prefix
from megatron.early_exit.evaluation.own_answers import Answer
from megatron.early_exit.evaluation.prompts import EvalPrompt

_OPEN_ROWS = 64
"""Rows that are not full and may get another text: few, so that packing stays fast."""

_NO_ROOM = "no answer begins within {} tokens (--seq-length): give longer samples, or shorter prompts"


class Samples(NamedTuple):
    """What was written."""

    num_rows: int
    num_answer_tokens: int
    num_cut: int
    """Texts that were longer than a row, and lost what is behind it."""


def num_held_out(num_prompts: int, share: float) -> int:
    """Prompts whose answers are not trained on: at least one."""
    return min(max(round(share * num_prompts), 1), num_prompts - 1)


def check_room(prompts: Sequence[EvalPrompt], length: int) -> None:
    """Raise ValueError if no answer to these prompts could begin in a row of `length` tokens."""
    if all(len(prompt.ids) >= length for prompt in prompts):
        raise ValueError(_NO_ROOM.format(length))


def marked_answers(
    prompts: Sequence[EvalPrompt], answers: Iterable[Answer], answers_to_each: int
) -> list[tuple[int, MarkedTokens]]:
    """(number of the prompt, the prompt with its answer), of answers with a token."""
    numbered = [(answer.number // answers_to_each, answer) for answer in answers if answer.ids]
    return [(number, prompt_and_answer(prompts[number].ids, answer.ids)) for number, answer in numbered]


def pack(texts: Iterable[MarkedTokens], length: int, filler: int) -> tuple[list[MarkedTokens], int]:
    """(rows of exactly `length` tokens, texts that were cut): each text whole in one row, the rest of a row filled.

    So a training sample, which is `length` tokens of the documents in any order, is one row, and its last label is the
    first token of another one, which has no loss."""
    rows: list[MarkedTokens] = []
    open_rows: list[int] = []
    num_cut = 0
    for text in texts:
        num_cut += len(text.ids) > length
        ids, marks = text.ids[:length], text.marks[:length]
        place = next((row for row in open_rows if len(rows[row].ids) + len(ids) <= length), None)
        if place is None:
            place = len(rows)
            rows.append(MarkedTokens([], []))
            open_rows = [*open_rows, place][-_OPEN_ROWS:]
        rows[place].ids.extend(ids)
        rows[place].marks.extend(marks)
    return [_filled(row, length, filler) for row in rows], num_cut


def _filled(row: MarkedTokens, length: int, filler: int) -> MarkedTokens:
    missing = length - len(row.ids)
    marks = [BEGINS] + [0] * (missing - 1) if missing else []  # nothing attends to what fills
    return MarkedTokens(row.ids + [filler] * missing, row.marks + marks)


def write_samples(prefix: Path, texts: Iterable[MarkedTokens], length: int, filler: int, vocab_size: int) -> Samples:
    """Token files of rows, and their mask. Raises ValueError if no answer's token is left."""
    from megatron.core.datasets.indexed_dataset import DType

    rows, num_cut = pack(texts, length, filler)
    num_answer_tokens = sum(mark & HAS_LOSS for row in rows for mark in row.marks)
    if not num_answer_tokens:
        raise ValueError(_NO_ROOM.format(length))
    while len(rows) < 2:  # the last label of a sample is in the next row
        rows.append(_filled(MarkedTokens([], []), length, filler))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    _write(Path(mask_prefix(str(prefix))), [row.marks for row in rows], np.uint8)
    _write(prefix, [row.ids for row in rows], DType.optimal_dtype(vocab_size))
    return Samples(len(rows), num_answer_tokens, num_cut)


def _write(prefix: Path, documents: Sequence[Sequence[int]], dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
