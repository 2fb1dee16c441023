"""How good the exits of a model are on a text: their losses, and how often they agree with the final head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, ScoreParams


@dataclass(frozen=True)
class HeadQuality:
    """One exit, or the final head."""

    layer: int
    is_final: bool
    loss: float
    """Nats per token of the text."""
    accuracy: float
    """Share of tokens whose most probable successor is the text's."""
    agreement: float
    """Share of tokens whose most probable successor is the final head's."""
    confidence: float
    """Mean of the largest probability."""


def exit_quality(
    llm: LLM, sequences: Sequence[list[int]], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[HeadQuality]:
    """Every exit in order, and then the final head, over `sequences` of at least two ids each."""
    sums: np.ndarray | float = 0.0
    num_tokens, layers = 0, []
    for number, tokens in enumerate(sequences):
        (result,) = llm.score([tokens])
        layers = [head.exit_layer for head in result.check().heads]
        labels, best = np.array(tokens[1:]), np.array(result.heads[-1].tokens[:-1])
        predicted = [np.array(head.tokens[:-1]) for head in result.heads]
        sums = sums + np.array([
            [-sum(head.log_probs), (own == labels).sum(), (own == best).sum(), sum(head.confidences[:-1])]
            for head, own in zip(result.heads, predicted, strict=True)
        ])  # fmt: skip
        num_tokens += len(labels)
        progress(number + 1, len(sequences))
    means = np.asarray(sums) / max(num_tokens, 1)
    num_layers = llm.engine.description.num_layers
    return [
        HeadQuality(num_layers if layer is None else layer, layer is None, *values)
        for layer, values in zip(layers, means.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class DecodingQuality:
    """One way to decode, greedily."""

    name: str
    tokens_per_second: float
    """Speed of one request, after its first token."""
    runs_saved: float
    """Share of the full model's layer runs that did not take place."""
    agreement: float
    """Share of tokens that the full model would have taken at their place."""
    perplexity: float
    """Perplexity of the answers under the full model."""


def decoding_quality(
    llm: LLM,
    prompts: Sequence[list[int]],
    settings: dict[str, GenerationParams],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[DecodingQuality]:
    """Answer every prompt by itself in each way, one way after the other for each prompt, so that a slow moment of the
    machine meets all of them alike."""
    sums = {name: np.zeros(6) for name in settings}
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one warms up
        for name, params in settings.items():
            (answer,) = llm.generate(prompt, params)
            result = answer.result
            if number == 0 or not result.tokens:
                continue
            scores = ScoreParams(exit_layers=(), score_from=len(prompt) - 1)
            (scored,) = llm.score([prompt + result.token_ids], scores)
            (final,) = scored.check().heads
            agreed = sum(own == token for own, token in zip(final.tokens, result.token_ids))
            loss = -sum(final.log_probs)
            statistics = result.statistics
            sums[name] += np.array([
                len(result.tokens) - 1, statistics.decode_seconds, statistics.layer_runs, statistics.full_layer_passes,
                agreed, loss,
            ])  # fmt: skip
        progress(number, len(prompts))
    return [
        DecodingQuality(
            name,
            tokens_per_second=tokens / max(seconds, 1e-9),
            runs_saved=1 - runs / max(all_runs, 1),
            agreement=agreed / max(tokens + len(prompts), 1),
            perplexity=math.exp(loss / max(tokens + len(prompts), 1)),
        )
        for name, (tokens, seconds, runs, all_runs, agreed, loss) in (
            (name, values.tolist()) for name, values in sums.items()
        )
    ]
