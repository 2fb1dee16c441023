"""How good the exits of a model are on a text: their losses, and how often they say what the final head says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron.early_exit.inference.calibration import outputs_over
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.worker.decoder import Decoder


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


@torch.inference_mode()
def exit_quality(
    decoder: Decoder, sequences: Sequence[list[int]], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[HeadQuality]:
    """Every exit in order, and then the final head, over `sequences` of at least two ids each. Uses slot 0."""
    num_heads = len(decoder.exits) + 1
    sums = torch.zeros(num_heads, 4, dtype=torch.float64)
    num_tokens = 0
    for number, tokens in enumerate(sequences):
        outputs = outputs_over(decoder, tokens[:-1])
        for row, label in enumerate(tokens[1:]):
            best = outputs[-1].token(row)
            for head, output in enumerate(outputs):
                said = output.token(row)
                sums[head] += torch.tensor(
                    [-output.log_probs(row)[label].item(), said == label, said == best, output.confidence(row)]
                )
        num_tokens += len(tokens) - 1
        progress(number + 1, len(sequences))
    layers = [one.layer_number for one in decoder.exits] + [decoder.num_layers]
    means = (sums / max(num_tokens, 1)).tolist()
    return [
        HeadQuality(layer, head == num_heads - 1, *values)
        for head, (layer, values) in enumerate(zip(layers, means, strict=True))
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


@torch.inference_mode()
def decoding_quality(
    llm: LLM,
    prompts: Sequence[list[int]],
    settings: dict[str, GenerationParams],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[DecodingQuality]:
    """Answer every prompt by itself in each way, one way after the other for each prompt, so that a slow moment of the
    machine meets all of them alike."""
    decoder = llm.engine.decoder
    sums = {name: torch.zeros(6, dtype=torch.float64) for name in settings}
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one warms up
        for name, params in settings.items():
            (answer,) = llm.generate(prompt, params)
            result = answer.result
            if number == 0 or not result.tokens:
                continue
            final = outputs_over(decoder, prompt + result.token_ids[:-1])[-1]
            rows = range(len(prompt) - 1, len(prompt) - 1 + len(result.tokens))
            agreed = sum(final.token(row) == token for row, token in zip(rows, result.token_ids, strict=True))
            loss = -sum(final.log_probs(row)[token].item() for row, token in zip(rows, result.token_ids, strict=True))
            statistics = result.statistics
            sums[name] += torch.tensor([
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
