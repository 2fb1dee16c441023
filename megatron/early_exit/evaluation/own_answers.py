"""A model's own answers to prompts, as token ids, written in parts as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.recording import outputs_as_they_end
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.platform.files import replaced
from megatron.early_exit.platform.part_files import Parts, read_parts, write_part

_ANSWERS_PER_PART, _SECONDS_PER_PART = 256, 30.0


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    number: int
    """Among all that are wanted."""
    ids: tuple[int, ...]
    """Exactly as the model wrote them, the one that ended it included."""
    finish_reason: str


class AnswersFolder:
    """Answers, and perhaps their prompts, in files that are there whole or not at all.

    FOLDER/prompts.npz                 all prompts, where they are kept
    FOLDER/part_000000_256.npz         answers, in the order in which they ended
    """

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
        of_items: dict[str, Sequence[Any]] = {
            "numbers": [one.number for one in answers], "finish_reasons": [one.finish_reason for one in answers],
        }  # fmt: skip
        write_part(self.folder, "numbers", of_items, {"ids": [np.array(one.ids, np.int64) for one in answers]})

    def answers(self) -> list[Answer]:
        """All that are there, by number. Raises ValueError for a part that cannot be read."""
        parts = read_parts(self.folder, ("numbers", "finish_reasons"), ("ids",), "it is made again")
        found = {number: Answer(number, tuple(ids.tolist()), reason) for number, reason, ids in parts}
        return [found[number] for number in sorted(found)]


def take_answers(
    llm: LLM,
    folder: AnswersFolder,
    prompts: Sequence[Sequence[int]],
    params: Sequence[GenerationParams],
    show: Callable[[int, int, int], None],
) -> list[Answer]:
    """Answers to all prompts, each with its own settings. What the folder has is not made again, and an interruption
    keeps what has come.

    show: called with the number of answers that are there, that of all, and the tokens of the newest. Raises ValueError
    if a prompt cannot be answered."""
    folder.folder.mkdir(parents=True, exist_ok=True)
    done = {one.number: one for one in folder.answers() if one.number < len(prompts)}
    missing = [number for number in range(len(prompts)) if number not in done]
    show(len(done), len(prompts), 0)
    with Parts(folder.add, _ANSWERS_PER_PART, _SECONDS_PER_PART) as parts:
        each = [params[number] for number in missing]
        for output in outputs_as_they_end(llm, [prompts[number] for number in missing], each):
            number, result = missing[output.prompt_index], output.check()
            done[number] = Answer(number, tuple(result.token_ids), str(result.finish_reason))
            parts.add(done[number])
            show(len(done), len(prompts), len(result.token_ids))
    return [done[number] for number in range(len(prompts))]
