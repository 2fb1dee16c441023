"""Answers as the full model sees them: what it would have taken at each place, and how probable it finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import ScoreParams

Answer = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt, and of what was answered."""


@dataclass(frozen=True)
class AnswerQuality:
    """One answer."""

    num_tokens: int
    num_agreeing: int
    """Tokens that the full model would have taken behind the same ones."""
    log_prob: float
    """Nats, of all tokens, in the full model's distribution."""

    @property
    def disagreement(self) -> float:
        """Share of tokens that the full model would not have taken."""
        return (self.num_tokens - self.num_agreeing) / self.num_tokens


def answer_quality(
    llm: LLM, answers: Sequence[Answer], progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[Answer, AnswerQuality]:
    """Of each different answer, which is scored once. Raises ValueError for one that the model cannot have given."""
    different = list(dict.fromkeys(answers))
    wanted = [ScoreParams(exit_layers=(), score_from=len(prompt) - 1, score_last=False) for prompt, _ in different]
    found: dict[Answer, AnswerQuality] = {}
    for index, result in llm.stream_scores([[*prompt, *answer] for prompt, answer in different], wanted):
        (final,), (_, answer) = result.check().heads, different[index]
        num_agreeing = sum(best == token for best, token in zip(final.tokens, answer, strict=True))
        found[different[index]] = AnswerQuality(len(answer), num_agreeing, sum(final.log_probs))
        progress(len(found), len(different))
    return found
