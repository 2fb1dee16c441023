"""Lossless ways to decode against the full model, token by token, and early exit against its own heads.

Where two answers part, the full model says how far apart the two tokens are for it: a hair's breadth is rounding, as
batches of other shapes add in another order; anything else is an error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from megatron.early_exit.evaluation.correctness_cases import Case, early_exit_cases, lossless_cases
from megatron.early_exit.evaluation.decoding import decode
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.rows import Row
from megatron.early_exit.evaluation.statistics.intervals import clopper_pearson
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.sampling import noise_of

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """Where an answer first parts from what is expected."""

    prompt: str
    position: int
    """Of the token in the answer, from 0."""
    expected: int | None
    """None: the answer should have ended before it."""
    got: int | None
    """None: the answer ended before it."""
    margin: float | None = None
    """Nats between the two most probable tokens of the full model there."""
    gap: float | None = None
    """Nats between `expected` and `got`, with the noise of sampling; None: one of them is missing, which no rounding
    does."""
    is_explained: bool = False
    """Whether an exit had been taken before, as the way of decoding may."""

    def is_rounding(self, tolerance: float) -> bool:
        return self.is_explained or (self.gap is not None and self.gap <= tolerance)


@dataclass
class Outcome:
    """One case, over all prompts."""

    name: str
    mode: str
    settings: Row
    num_prompts: int
    num_tokens: int
    differences: list[Difference] = field(default_factory=list)

    def row(self, tolerance: float) -> Row:
        """Of the result document."""
        identical = self.num_prompts - len(self.differences)
        return {
            "name": self.name,
            "mode": self.mode,
            "settings": self.settings,
            "prompts": self.num_prompts,
            "identical": identical,
            "identical_interval": clopper_pearson(identical, self.num_prompts),
            "tokens": self.num_tokens,
            "errors": sum(not one.is_rounding(tolerance) for one in self.differences),
            "first_differences": [vars(one) for one in self.differences],
        }


class CorrectnessCheck:
    """Runs cases over prompts. `reference` is the full model's answer to each, greedy or sampled."""

    def __init__(self, llm: LLM, prompts: Sequence[EvalPrompt], answers: GenerationParams, batch: int) -> None:
        self.llm, self.prompts, self.answers, self.batch = llm, prompts, answers, batch
        self._references: dict[SamplingSettings, list[Answer]] = {}

    def reference(self, sampling: SamplingSettings) -> list[Answer]:
        """Made once for each way of sampling, in groups of `batch`."""
        if sampling not in self._references:
            case = Case("full", replace(self.answers, sampling=sampling), self.batch)
            self._references[sampling] = [tuple(one.token_ids) for one in self._results(case)]
        return self._references[sampling]

    def run(self, case: Case) -> Outcome:
        """Compare a case with the reference. Raises ValueError if a prompt cannot be answered, ExecutorError."""
        expected, results = self.reference(case.params.sampling), self._results(case)
        found = self._outcome(case, results)
        for prompt, one, result in zip(self.prompts, expected, results, strict=True):
            position = first_difference(one, result.token_ids)
            if position is not None:
                early = any(not token.is_final for token in result.tokens[: position + 1])
                parted = self._difference(prompt, position, one, result.token_ids, case.params.sampling)
                found.differences.append(
                    replace(parted, is_explained=case.params.mode == "early_exit" and early)
                )  # fmt: skip
        return found

    def run_early_exit(self, case: Case) -> Outcome:
        """Compare every token of early exit with the head that gave it, evaluated behind the same tokens with nothing
        left out: keys and values are exact if all are alike."""
        results = self._results(case)
        found = self._outcome(case, results)
        wanted = [ScoreParams(score_from=len(prompt.ids) - 1, top_log_probs=2) for prompt in self.prompts]
        ids = [[*prompt.ids, *one.token_ids[:-1]] for prompt, one in zip(self.prompts, results, strict=True)]
        for prompt, result, scored in zip(self.prompts, results, self.llm.score(ids, wanted), strict=True):
            heads = {head.exit_layer: head for head in scored.check().heads}
            for position, token in enumerate(result.tokens):
                head = heads[None if token.is_final else token.exit_layer]
                if head.tokens[position] != token.token:
                    (best, first), (_, second) = head.top_log_probs[position]
                    gap = first - self._log_prob(prompt, result.token_ids[:position], token.token, head.exit_layer)
                    found.differences.append(Difference(prompt.name, position, best, token.token, first - second, gap))
                    break
        return found

    def median_score(self) -> float:
        """Half of the exits' scores along the full model's answers lie below it."""
        leaving = self.llm.exits.leaving_layers
        wanted = [
            ScoreParams(exit_layers=leaving, final=False, score_from=len(prompt.ids) - 1, score_last=False)
            for prompt in self.prompts
        ]
        answers = self.reference(self.answers.sampling)
        ids = [[*prompt.ids, *answer] for prompt, answer in zip(self.prompts, answers, strict=True)]
        return median(
            score for one in self.llm.score(ids, wanted) for head in one.check().heads for score in head.confidences
        )

    def compare(self, name: str, mode: str, answers: Sequence[Answer]) -> Outcome:
        """Compare somebody else's greedy answers with the reference."""
        found = Outcome(name, mode, {}, len(answers), sum(map(len, answers)))
        for prompt, one, other in zip(self.prompts, self.reference(self.answers.sampling), answers, strict=True):
            position = first_difference(one, other)
            if position is not None:
                found.differences.append(self._difference(prompt, position, one, other, self.answers.sampling))
        return found

    def _outcome(self, case: Case, results: Sequence[RequestResult]) -> Outcome:
        num_tokens = sum(len(one.tokens) for one in results)
        return Outcome(case.name, case.params.mode, case.settings, len(results), num_tokens)

    def _results(self, case: Case) -> list[RequestResult]:
        engine = self.llm.engine
        engine.prepare(case.params)
        usual = engine.prefill_chunk
        results: list[RequestResult] = []
        engine.prefill_chunk = case.prefill_chunk or usual
        try:
            answer = functools.partial(decode, engine, case.params, keep_prefixes=case.keep_prefixes)
            for first in range(0, len(self.prompts), case.batch):
                run = answer([prompt.ids for prompt in self.prompts[first : first + case.batch]])
                results += run.results
        finally:
            engine.prefill_chunk = usual
        return results

    def _difference(
        self, prompt: EvalPrompt, position: int, expected: Answer, got: Sequence[int], sampling: SamplingSettings
    ) -> Difference:
        if position >= min(len(expected), len(got)):
            at = lambda answer: answer[position] if position < len(answer) else None
            return Difference(prompt.name, position, at(expected), at(got))
        wanted = ScoreParams(exit_layers=(), score_from=len(prompt.ids) + position - 1, top_log_probs=2)
        (scored,) = self.llm.score([[*prompt.ids, *expected[:position]]], wanted)
        (_, first), (_, second) = scored.check().heads[-1].top_log_probs[0]
        tokens = (expected[position], got[position])
        log_probs = [self._log_prob(prompt, expected[:position], token, None) for token in tokens]
        gap = log_probs[0] - log_probs[1]
        if not sampling.is_greedy:
            noise = noise_of(sampling, position, torch.tensor(tokens)).tolist()
            gap += sampling.temperature * (noise[0] - noise[1])
        return Difference(prompt.name, position, *tokens, margin=first - second, gap=abs(gap))

    def _log_prob(self, prompt: EvalPrompt, answer: Sequence[int], token: int, exit_layer: int | None) -> float:
        """Of `token` behind the beginning of an answer, at an exit or the final head."""
        layers = () if exit_layer is None else (exit_layer,)
        first = len(prompt.ids) + len(answer) - 1
        wanted = ScoreParams(layers, final=exit_layer is None, score_from=first, score_last=False)
        (scored,) = self.llm.score([[*prompt.ids, *answer, token]], wanted)
        return scored.check().heads[-1].log_probs[0]


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Position of the first token that differs, or that only one of both has."""
    differing = (index for index, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1])
    return next(differing, None if len(expected) == len(got) else min(len(expected), len(got)))


def check_all(
    llm: LLM,
    prompts: Sequence[EvalPrompt],
    answers: GenerationParams,
    batch: int,
    temperature: float,
    progress: Callable[[int, int], None],
) -> tuple[CorrectnessCheck, list[Outcome]]:
    """Every case of the model and its layout, and the check, for what else is to be compared."""
    check = CorrectnessCheck(llm, prompts, answers, batch)
    cases = lossless_cases(llm.engine.checks, answers, batch, temperature)
    early = early_exit_cases(answers, batch, check.median_score()) if llm.exits.leaving_layers else []
    outcomes = []
    for number, case in enumerate([*cases, *early], start=1):
        outcomes.append(check.run(case) if number <= len(cases) else check.run_early_exit(case))
        progress(number, len(cases) + len(early))
    return check, outcomes
