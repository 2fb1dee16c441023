"""The model's own answers to prompts, as token ids, written in parts as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.recording import outputs_as_they_end
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.platform.files import replaced
from megatron.early_exit.platform.part_files import read_parts, write_part

_ANSWERS_PER_PART, _SECONDS_PER_PART = 256, 30.0
_SECONDS_BETWEEN_LINES = 30.0
"""Of progress, where it does not go to a terminal."""


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    number: int
    """Prompt number x answers to each + number of the answer."""
    ids: tuple[int, ...]
    """Exactly as the model wrote them, the one that ended it included."""
    finish_reason: str


class AnswersFolder:
    """Prompts and answers, in files that are there whole or not at all.

    FOLDER/prompts.npz                 all prompts
    FOLDER/part_000000_256.npz         answers, in the order in which they ended"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def prompts_path(self) -> Path:
        return self.folder / "prompts.npz"

    def write_prompts(self, prompts: Sequence[EvalPrompt]) -> None:
        """Once, before the first answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ids = [np.array(one.ids, np.int64) for one in prompts]
        with replaced(self.prompts_path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file, ids=np.concatenate(ids), lengths=np.array([len(one) for one in ids]),
                names=np.array([one.name for one in prompts]), domains=np.array([one.domain or "" for one in prompts]),
            )  # fmt: skip

    def prompts(self) -> list[EvalPrompt]:
        with np.load(self.prompts_path) as arrays:
            ids = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
            columns = zip(ids, arrays["names"].tolist(), arrays["domains"].tolist(), strict=True)
            return [EvalPrompt(tuple(one.tolist()), domain or None, name) for one, name, domain in columns]

    def add(self, answers: Sequence[Answer]) -> None:
        """Write a part."""
        of_items = {
            "numbers": [one.number for one in answers], "finish_reasons": [one.finish_reason for one in answers],
        }  # fmt: skip
        write_part(self.folder, "numbers", of_items, {"ids": [np.array(one.ids, np.int64) for one in answers]})

    def answers(self) -> list[Answer]:
        """All that are there, by number. Raises ValueError for a part that cannot be read."""
        parts = read_parts(self.folder, ("numbers", "finish_reasons"), ("ids",), "it is made again")
        found = {number: Answer(number, tuple(ids.tolist()), reason) for number, reason, ids in parts}
        return [found[number] for number in sorted(found)]


def write_answers(llm: LLM, folder: AnswersFolder, params: GenerationParams, answers_to_each: int) -> list[Answer]:
    """Answer all prompts of the folder `answers_to_each` times; what is there is not made again, and an interruption
    keeps what has come. Answer i is drawn with seed + i. Raises ValueError if a prompt cannot be answered."""
    prompts, done = folder.prompts(), {one.number: one for one in folder.answers()}
    total = len(prompts) * answers_to_each
    missing = [number for number in range(total) if number not in done]
    each = [replace(params, sampling=params.sampling.of_sample(number)) for number in missing]
    shown = _Shown(total, len(done))
    part: list[Answer] = []
    last = time.monotonic()
    try:
        ids = [prompts[number // answers_to_each].ids for number in missing]
        for output in outputs_as_they_end(llm, ids, each):
            answer = Answer(
                missing[output.prompt_index], tuple(output.result.token_ids), str(output.result.finish_reason)
            )
            part.append(answer)
            done[answer.number] = answer
            if len(part) >= _ANSWERS_PER_PART or time.monotonic() - last > _SECONDS_PER_PART:
                folder.add(part)
                part, last = [], time.monotonic()
            shown.add(len(answer.ids))
    finally:
        folder.add(part)
    return [done[number] for number in range(total)]


class _Shown:
    """Progress: a line that grows on a terminal; elsewhere a line now and then, and one at the end."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._begun, self._tokens = total, done, done, 0
        self._start = self._last = time.monotonic()

    def add(self, num_tokens: int) -> None:
        self._done, self._tokens = self._done + 1, self._tokens + num_tokens
        now, is_last, is_terminal = time.monotonic(), self._done == self._total, sys.stderr.isatty()
        if not (is_last or is_terminal or now - self._last >= _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        seconds = max(now - self._start, 1e-9)
        left = (self._total - self._done) * seconds / (self._done - self._begun)
        rest = "" if is_last else f", {left / 60:.0f} min left"
        print(
            f"answers: {self._done:,}/{self._total:,}, {self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"
            f"{rest}   ",
            end="\r" if is_terminal and not is_last else "\n", file=sys.stderr, flush=True,
        )  # fmt: skip
