"""Prompts that models are evaluated on, and what tells one from others.

The unit of every interval and of every guarantee is the prompt. Where they come from is in `prompt_sources.py`, how
they are drawn in `prompt_flags.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.early_exit.inference.protocol import WorkerDescription


@dataclass(frozen=True)
class EvalPrompt:
    """One prompt."""

    ids: tuple[int, ...]
    domain: str | None
    """What it is of; None: nothing is said."""
    name: str
    """Where it comes from: PREFIX:DOCUMENT, counted from 0, or FILE:LINE, counted from 1."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the random order in which they were drawn."""

    prompts: tuple[EvalPrompt, ...]
    digest: str
    """SHA-256 of all ids."""
    template_digest: str | None
    """SHA-256 of the chat template; None: the prompts are no chats."""
    data: dict[str, str]
    """Name of each file -> SHA-256 of its content."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that prompts name, in alphabetical order."""
        return tuple(sorted({prompt.domain for prompt in self.prompts if prompt.domain is not None}))


def longest_prompt(model: WorkerDescription, room: int) -> int:
    """Tokens of the longest prompt that can have an answer of `room` tokens; the last of them takes no place."""
    return model.num_positions - room + 1


def ids_digest(sequences: Iterable[Sequence[int]]) -> str:
    """SHA-256 of sequences of ids, each with its length before it, as little-endian int64."""
    import numpy as np

    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return digest.hexdigest()


def prompt_digest(ids: Sequence[int]) -> str:
    """What tells one prompt from others."""
    return ids_digest([ids])[:16]


def check_unseen(prompts: Iterable[EvalPrompt], seen: Collection[str]) -> None:
    """Raise ValueError if some of the prompts are among those with the digests `seen`, which probes were trained on."""
    known = frozenset(seen)
    found = [prompt.name for prompt in prompts if prompt_digest(prompt.ids) in known]
    if found:
        raise ValueError(
            f"{len(found)} of the prompts, {found[0]} for instance, are those that the probes were trained on, whose "
            "scores are better there than elsewhere; leave them out"
        )
