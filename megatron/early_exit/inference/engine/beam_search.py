"""The most probable continuations of the full model, by beam search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import check_prompt
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import HeadOutput


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


@torch.inference_mode()
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
    decoder, prompt = engine.decoder, list(prompt_ids)
    check_prompt(prompt, decoder.num_positions, decoder.vocab_size)
    _check(decoder, beam_width, max_tokens, length_penalty, num_return)
    if engine.has_work:
        raise RuntimeError("beam search needs the engine's slots: wait until all requests have ended")
    ends = engine.ends if stop_token is None else {stop_token}
    # The last token is not fed back.
    max_tokens = min(max_tokens, decoder.num_positions - len(prompt) + 1)
    score = lambda log_prob, length: log_prob / length**length_penalty

    output = _prefill(decoder, prompt, engine.prefill_chunk)
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]  # tokens and log-probability, best first
    finished: list[Beam] = []
    length = 0
    while True:
        # Of one beam's candidates all ends may come first, and still `beam_width` others are needed.
        candidates = _extend(beams, output, max(2, 1 + len(ends)) * beam_width)
        parents, survivors = [], []
        for rank, (parent, token, log_prob) in enumerate(candidates):
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
        start = len(prompt) + length - 1
        decoder.cache.gather_slots(0, torch.tensor(parents, device=decoder.weights.device), start)
        layout = decoder.attention_metadata([Segment(slot, start, 1) for slot in range(len(beams))])
        hidden = decoder.embed([tokens[-1] for tokens, _ in beams], layout)
        output = decoder.final_output(decoder.run_layers(hidden, layout, 0, decoder.num_layers)[0])
    unfinished = [Beam(tokens, log_prob, score(log_prob, len(tokens)), False) for tokens, log_prob in beams]
    if len(finished) < num_return or length >= max_tokens:
        finished += unfinished
    return sorted(finished, key=lambda beam: -beam.score)[:num_return]


def _check(decoder: Decoder, beam_width: int, max_tokens: int, length_penalty: float, num_return: int) -> None:
    if not 1 <= beam_width <= decoder.cache.num_slots:
        raise ValueError(f"beam_width is {beam_width}; the engine has slots for 1 to {decoder.cache.num_slots}")
    if not 1 <= num_return <= beam_width:
        raise ValueError(f"num_return is {num_return}; a beam of width {beam_width} gives 1 to {beam_width}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty}; it must be a finite number")


def _prefill(decoder: Decoder, prompt: list[int], chunk: int) -> HeadOutput:
    """Feed the prompt to slot 0; returns what the final head says about its last row."""
    for first in range(0, len(prompt), chunk):
        tokens = prompt[first : first + chunk]
        layout = decoder.attention_metadata([Segment(0, first, len(tokens))])
        hidden = decoder.run_layers(decoder.embed(tokens, layout), layout, 0, decoder.num_layers)[0]
    return decoder.final_output(hidden[-1:])


def _extend(beams: list[tuple[tuple[int, ...], float]], output: HeadOutput, count: int) -> list[tuple[int, int, float]]:
    """The `count` best (beam, next token, log-probability of all), best first."""
    candidates = []
    for index, (_, log_prob) in enumerate(beams):
        values, ids = output.log_probs(index).topk(min(count, output.log_probs(index).numel()))
        candidates += [(index, i, log_prob + v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    candidates = [one for one in candidates if one[2] > -math.inf]
    return sorted(candidates, key=lambda one: -one[2])[:count]
