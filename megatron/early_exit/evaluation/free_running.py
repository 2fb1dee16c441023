"""What early exit itself generates, against the full model: behind the same tokens, and as whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.evaluation.answer_quality import answer_quality
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.recording import Progress, full_params, outputs_as_they_end
from megatron.early_exit.inference.certificates import AnswerSettings
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import ExitScore, GenerationParams
from megatron.early_exit.inference.results import RequestResult, Statistics


@dataclass(frozen=True)
class FreeAnswer:
    """The answer to one prompt with early exit."""

    tokens: tuple[int, ...]
    loss: float
    """Share of its decisions that the full model would have taken otherwise behind the same tokens."""
    statistics: Statistics


def early_exit_params(
    thresholds: dict[int, float], answers: AnswerSettings, score: ExitScore = "head"
) -> GenerationParams:
    """thresholds: by layer, of `score`. None: the full model answers."""
    if not thresholds:
        return full_params(answers)
    layers, values = zip(*sorted(thresholds.items()), strict=True)
    return replace(
        full_params(answers), mode="early_exit", exit_layers=layers, exit_thresholds=values, exit_score=score
    )


def free_running(
    llm: LLM,
    prompts: Sequence[EvalPrompt],
    thresholds: dict[int, float],
    answers: AnswerSettings,
    progress: Progress,
    score: ExitScore = "head",
) -> list[FreeAnswer]:
    """Answers in the order of prompts, each compared with the final head behind its own tokens."""
    params = early_exit_params(thresholds, answers, score)
    results: dict[int, RequestResult] = {}
    for output in outputs_as_they_end(llm, [prompt.ids for prompt in prompts], params):
        results[output.prompt_index] = output.check()
        progress(len(results), len(prompts))
    answered = [(prompt.ids, tuple(results[number].token_ids)) for number, prompt in enumerate(prompts)]
    quality = answer_quality(llm, answered)
    return [
        FreeAnswer(answer, quality[ids, answer].disagreement, results[number].statistics)
        for number, (ids, answer) in enumerate(answered)
    ]
