"""Ways to decode against the full model, in the same run, at one or several batch sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron.early_exit.evaluation.answer_quality import answer_quality
from megatron.early_exit.evaluation.decoding import Measurement, Way, decode, measure
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.recording import ShowProgress
from megatron.early_exit.evaluation.rows import Row, Variant, per_prompt, row_of, speed_columns
from megatron.early_exit.inference.llm import LLM


@dataclass(frozen=True)
class ComparisonSettings:
    """How ways are compared."""

    batches: tuple[int, ...]
    """Prompts that are answered at once."""
    rounds: int
    num_prompts: int
    """In each round, or as many as the batch has if that is more; what is left over of whole batches is left out."""
    seed: int
    """Of intervals."""

    def prompts_at(self, batch: int) -> int:
        """Prompts of a round."""
        return max(self.num_prompts, batch) // batch * batch


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    rows: list[Row]
    """At each batch size the full model's first."""
    per_prompt: list[Row]
    beside: list[Row]
    """Of ways that are not ours."""


def compare(
    llm: LLM,
    prompts: Sequence[EvalPrompt],
    variants: Sequence[Variant],
    settings: ComparisonSettings,
    show_progress: ShowProgress,
    beside: Callable[[int], Mapping[str, Way]] = lambda batch: {},
) -> Comparison:
    """The first of `variants` is the baseline. beside: other ways at a batch size, whose speed alone is compared.

    Raises ValueError if a prompt cannot be answered, ExecutorError if workers end."""
    for variant in variants:
        llm.engine.checks.check(variant.params)
        llm.engine.prepare(variant.params)
    ours = {one.name: functools.partial(decode, llm.engine, one.params) for one in variants}
    found: dict[int, dict[str, Measurement]] = {}
    for batch in settings.batches:
        ids = [prompt.ids for prompt in prompts[: settings.prompts_at(batch)]]
        ways: dict[str, Way] = {**ours, **beside(batch)}
        found[batch] = measure(ways, ids, batch, settings.rounds, show_progress(f"batch {batch}"))
    answers = {
        (batch, name): [(prompt.ids, answer) for prompt, answer in zip(prompts, of_way[name].answers, strict=False)]
        for batch, of_way in found.items() for name in ours
    }  # fmt: skip
    quality = answer_quality(llm, [one for some in answers.values() for one in some], show_progress("answers"))
    rows, numbers, others = [], [], []
    for batch, of_way in found.items():
        baseline = of_way[variants[0].name]
        for variant in variants:
            measured, worth = of_way[variant.name], [quality[one] for one in answers[batch, variant.name]]
            rows.append(row_of(variant, batch, measured, baseline, worth, settings.seed))
            numbers.append(per_prompt(variant.name, batch, measured, baseline, worth))
        for name in (name for name in of_way if name not in ours):
            others.append({"name": name, "mode": "transformers", **speed_columns(batch, of_way[name], baseline)})
    return Comparison(rows, numbers, others)
