"""One run of a way to decode: its seconds, its tokens, and how good they are."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from benchmarks.decode.models import TwinModel, score
from benchmarks.timing import now
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.platform.device import device


def run_requests(
    engine: Engine, prompts: list[list[int]], params: GenerationParams
) -> tuple[float, list[RequestResult]]:
    """(seconds from the first token to the last, results in order): decoding alone, without the prompts' prefill."""
    engine.prepare(params)
    ids = [engine.add(prompt, params) for prompt in prompts]
    results: dict[int, RequestResult] = {}
    started, waiting_for_first = None, set(ids)
    while engine.has_work:
        for event in engine.step():
            waiting_for_first.discard(event.request_id)
            if event.result is not None:
                results[event.request_id] = event.result
        if started is None and not waiting_for_first:
            started = now()
    return now() - started, [results[one] for one in ids]


@torch.inference_mode()
def their_seconds(
    model: TwinModel, prompts: list[list[int]], tokens: int, **settings: Any
) -> tuple[float, list[list[int]]]:
    """`generate` of equally long prompts; the time of one token is taken off, as ours is from the first token on."""
    ids = torch.tensor(prompts, device=device())
    arguments = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **settings}
    started = now()
    model.theirs.generate(ids, max_new_tokens=1, **arguments)
    middle = now()
    out = model.theirs.generate(ids, max_new_tokens=tokens, **arguments)
    return now() - middle - (middle - started), out[:, len(prompts[0]) :].tolist()


def quality(engine: Engine, prompts: list[list[int]], results: list[RequestResult]) -> dict[str, float]:
    """Of generated tokens, as the full model sees them after the same beginning: share that it would have taken, and
    perplexity."""
    answers = [result.token_ids for result in results]
    wanted = [ScoreParams(exit_layers=(), score_from=len(prompt) - 1) for prompt in prompts]
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    heads = [scores.heads[-1] for scores in score(engine, sequences, wanted)]
    total = sum(map(len, answers))
    agree = sum(sum(map(operator.eq, head.tokens, answer)) for head, answer in zip(heads, answers, strict=True))
    log_prob = sum(sum(head.log_probs) for head in heads)
    return {"agreement": agree / total, "perplexity": math.exp(-log_prob / total)}
