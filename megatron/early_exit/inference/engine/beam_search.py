"""The most probable continuations of the full model, by beam search."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import SamplingSettings, check_prompt
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    Admit,
    Gather,
    Rows,
    SlotOperation,
    TokenLogProb,
    WorkerDescription,
)


@dataclass(frozen=True)
class Beam:
    """One continuation."""

    tokens: tuple[int, ...]
    """Generated ids, the one that ended it included."""
    log_prob: float
    """Sum over its tokens (nats)."""
    score: float
    """log_prob / len(tokens) ** length_penalty"""
    is_finished: bool
    """Whether it ended with the stop token."""


def beam_search(
    engine: Engine,
    prompt_ids: Sequence[int],
    *,
    beam_width: int,
    max_tokens: int = 64,
    length_penalty: float = 1.0,
    stop_token: int | None = None,
    num_return: int = 1,
) -> list[Beam]:
    """The `num_return` best continuations of `prompt_ids`, best first.

    It borrows slots 0 to beam_width - 1 of the engine, which must have nothing to do. stop_token: default any of the
    engine's ends. Raises ValueError for settings that do not fit, RuntimeError if the engine is busy."""
    model, prompt = engine.description, list(prompt_ids)
    check_prompt(prompt, model.num_positions, model.vocab_size)
    _check(model, beam_width, max_tokens, length_penalty, num_return)
    if engine.has_work:
        raise RuntimeError("beam search needs the engine's slots: wait until all requests have ended")
    ends = engine.ends if stop_token is None else {stop_token}
    # The last token is not fed back.
    max_tokens = min(max_tokens, model.num_positions - len(prompt) + 1)
    # Of one beam's candidates all ends may come first, and still `beam_width` others are needed.
    rows = _BeamRows(engine, beam_width, max(2, 1 + len(ends)) * beam_width)
    try:
        return _search(rows, prompt, ends, beam_width, max_tokens, length_penalty, num_return)
    finally:
        rows.give_back()


def _search(
    rows: _BeamRows,
    prompt: list[int],
    ends: Collection[int],
    beam_width: int,
    max_tokens: int,
    length_penalty: float,
    num_return: int,
) -> list[Beam]:
    score = lambda log_prob, length: log_prob / length**length_penalty
    top = rows.prefill(prompt)
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]  # tokens and log-probability, best first
    finished: list[Beam] = []
    length = 0
    while True:
        parents: list[int] = []
        survivors: list[tuple[tuple[int, ...], float]] = []
        for rank, (parent, token, log_prob) in enumerate(_extend(beams, top, rows.num_candidates)):
            tokens = (*beams[parent][0], token)
            if token in ends:
                # One that ends counts if it is among the first `beam_width`, as in transformers and Megatron.
                if rank < beam_width:
                    finished.append(Beam(tokens, log_prob, score(log_prob, len(tokens)), True))
            elif len(survivors) < beam_width:
                parents.append(parent)
                survivors.append((tokens, log_prob))
        finished = sorted(finished, key=lambda beam: -beam.score)[:beam_width]
        beams, length = survivors, length + 1
        if not beams or length >= max_tokens:
            break
        if len(finished) == beam_width and finished[-1].score >= score(beams[0][1], length):
            break  # a guess, as in transformers: longer ones have less probability, but are divided by more
        top = rows.extend(parents, [tokens[-1] for tokens, _ in beams], len(prompt) + length - 1)
    unfinished = [Beam(tokens, log_prob, score(log_prob, len(tokens)), False) for tokens, log_prob in beams]
    if len(finished) < num_return or length >= max_tokens:
        finished += unfinished
    return sorted(finished, key=lambda beam: -beam.score)[:num_return]


class _BeamRows:
    """The rows of the beams: slot i holds beam i."""

    def __init__(self, engine: Engine, beam_width: int, num_candidates: int) -> None:
        self.num_candidates = num_candidates
        self._engine = engine
        self._generations = engine.borrow(beam_width)

    def prefill(self, prompt: list[int]) -> list[list[TokenLogProb]]:
        """Run the prompt in slot 0. Returns, as `extend`, what may follow."""
        admissions = [
            Admit(-1, slot, generation, num_prompt_tokens=len(prompt), prefix=(), sampling=SamplingSettings())
            for slot, generation in enumerate(self._generations)
        ]
        chunk = self._engine.prefill_chunk
        for first in range(0, len(prompt) - 1, chunk):
            stop = min(first + chunk, len(prompt) - 1)
            self._run(admissions, [self._rows(0, first, prompt[first:stop], num_candidates=0)])
            admissions = []
        return self._run(admissions, [self._rows(0, len(prompt) - 1, prompt[-1:], self.num_candidates)])

    def extend(self, parents: Sequence[int], tokens: Sequence[int], position: int) -> list[list[TokenLogProb]]:
        """Let beam i continue beam `parents[i]` with `tokens[i]`, at `position`. Returns for each the most probable
        tokens that may follow, with their log-probabilities."""
        rows = [self._rows(slot, position, [token], self.num_candidates) for slot, token in enumerate(tokens)]
        return self._run([Gather(tuple(parents), position)], rows)

    def give_back(self) -> None:
        """End the use of the slots."""
        self._engine.give_back(len(self._generations))

    def _rows(self, slot: int, first: int, tokens: Sequence[int], num_candidates: int) -> Rows:
        return Rows(
            request_id=-1, slot=slot, generation=self._generations[slot], epoch=0, phase="prefill", first=first,
            tokens=tuple(tokens), score_heads=(FINAL_HEAD,) if num_candidates else (), score_top=num_candidates,
        )  # fmt: skip

    def _run(self, operations: Sequence[SlotOperation], rows: Sequence[Rows]) -> list[list[TokenLogProb]]:
        outputs = self._engine.run_step(operations, rows)
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"beam search failed: {output.error}")
        return [output.scores[0].top_log_probs[0] for output in outputs if output.scores]


def _check(model: WorkerDescription, beam_width: int, max_tokens: int, length_penalty: float, num_return: int) -> None:
    if not 1 <= beam_width <= model.num_slots:
        raise ValueError(f"beam_width is {beam_width}; the engine has slots for 1 to {model.num_slots}")
    if not 1 <= num_return <= beam_width:
        raise ValueError(f"num_return is {num_return}; a beam of width {beam_width} gives 1 to {beam_width}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty}; it must be a finite number")


def _extend(
    beams: list[tuple[tuple[int, ...], float]], top: list[list[TokenLogProb]], count: int
) -> list[tuple[int, int, float]]:
    """The `count` best (beam, next token, log-probability of all), best first."""
    candidates = [
        (index, token, log_prob + value) for index, (_, log_prob) in enumerate(beams) for token, value in top[index]
    ]
    return sorted(candidates, key=lambda one: -one[2])[:count]
