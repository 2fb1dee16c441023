"""Ways to decode that must give the full model's answers, and ways of early exit whose tokens are compared with the
heads that gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.evaluation.rows import Row
from megatron.early_exit.evaluation.variants import drafting
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import DraftSourceChoice, GenerationParams, SamplingSettings

SMALL_PREFILL_CHUNK = 7
"""Rows of prompts in a step, for the prompts that are computed piece by piece: no divisor of usual lengths."""


@dataclass(frozen=True)
class Case:
    """One way to decode that must give the full model's answers."""

    name: str
    params: GenerationParams
    batch: int
    prefill_chunk: int | None = None
    """Rows of prompts in one step; None: as the engine has it."""
    keep_prefixes: bool = False
    """Whether what was computed for earlier answers to the same prompts is used."""

    @property
    def settings(self) -> Row:
        """What distinguishes it."""
        params = self.params
        changed: Row = {"batch": self.batch}
        if params.mode == "self_speculative":
            changed |= {
                "draft_source": params.draft_source,
                "draft_exit": params.draft_exit,
                "draft_length": params.draft_length or "adaptive",
                "speculation": params.speculation,
            }
        if params.mode == "early_exit":
            given = params.exit_thresholds
            thresholds = list(given) if isinstance(given, tuple) else str(given)
            changed |= {"thresholds": thresholds, "max_deferred": params.max_deferred}
        if not params.sampling.is_greedy:
            changed |= {"temperature": params.sampling.temperature, "seed": params.sampling.seed}
        if params.observe_exits:
            changed["observe_exits"] = True
        if self.prefill_chunk is not None:
            changed["prefill_chunk"] = self.prefill_chunk
        if self.keep_prefixes:
            changed["keep_prefixes"] = True
        return changed


def lossless_cases(checks: RequestChecks, answers: GenerationParams, batch: int, temperature: float) -> list[Case]:
    """All that must not change an answer, for what the model and its layout can do. batch: of the reference."""
    sampled = replace(answers, sampling=SamplingSettings(temperature=temperature, seed=answers.sampling.seed))
    cases = [
        Case("full, one by one", answers, 1),
        Case(f"full, prompts in pieces of {SMALL_PREFILL_CHUNK}", answers, batch, SMALL_PREFILL_CHUNK),
        Case("full, prompts computed before", answers, batch, keep_prefixes=True),
    ]
    if checks.exits.leaving_layers:
        cases.append(Case("full, every exit evaluated", replace(answers, observe_exits=True), batch))
        cases.append(
            Case("early exit, threshold 1", replace(answers, mode="early_exit", exit_thresholds=(1.0,)), batch)
        )
    cases += [Case(_words(params), params, batch) for params in _speculative(checks, answers, (1, 4, None))]
    cases += [
        Case("full, sampled again", sampled, batch),
        Case("full, sampled one by one", sampled, 1),
        *(Case(f"{_words(params)}, sampled", params, batch) for params in _speculative(checks, sampled, (None,))),
    ]
    return cases


def _speculative(
    checks: RequestChecks, answers: GenerationParams, lengths: Sequence[int | None]
) -> list[GenerationParams]:
    found = []
    for layer in checks.exits.drafting_layers:
        is_last_stage = checks.model.stage_of(checks.model.index_of(layer)) == checks.model.num_stages - 1
        for kind in ("draft_then_verify", *(() if is_last_stage else ("across_stages",))):
            found += [
                replace(answers, mode="self_speculative", draft_exit=layer, draft_length=length, speculation=kind)
                for length in lengths
            ]
    sources: tuple[DraftSourceChoice, ...] = ("ngram", "both") if checks.exits.drafting_layers else ("ngram",)
    return found + [
        replace(answers, mode="self_speculative", draft_source=source, draft_length=length)
        for source in sources for length in lengths
    ]  # fmt: skip


def _words(params: GenerationParams) -> str:
    across = ", across stages" if params.speculation == "across_stages" else ""
    return f"draft with {drafting(params)}, length {params.draft_length or 'adaptive'}{across}"


def early_exit_cases(answers: GenerationParams, batch: int, score: float) -> list[Case]:
    """Early exit whose tokens are compared with the heads that gave them. score: about half of the exits reach it."""
    early = replace(answers, mode="early_exit")
    return [
        Case("early exit, threshold 0", replace(early, exit_thresholds=(0.0,)), batch),
        Case(f"early exit, threshold {score:.2g}", replace(early, exit_thresholds=(score,)), batch),
        Case(
            f"early exit, threshold {score:.2g}, at most 2 deferred",
            replace(early, exit_thresholds=(score,), max_deferred=2), batch,
        ),
    ]  # fmt: skip
