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


def answer_quality(
    llm: LLM, answers: Sequence[Answer], progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[Answer, AnswerQuality]:
    """Of each different answer; they are scored once, as many at a time as the model takes. A prompt and its answer
    must fit together. Raises ValueError if they do not."""
    different = list(dict.fromkeys(answers))
    step = llm.engine.description.num_slots
    found: dict[Answer, AnswerQuality] = {}
    for first in range(0, len(different), step):
        some = different[first : first + step]
        wanted = [ScoreParams(exit_layers=(), score_from=len(prompt) - 1) for prompt, _ in some]
        scored = llm.score([[*prompt, *answer] for prompt, answer in some], wanted)
        for one, result in zip(some, scored, strict=True):
            (final,) = result.check().heads
            # One more position was scored than the answer has tokens.
            num_agreeing = sum(best == token for best, token in zip(final.tokens, one[1], strict=False))
            found[one] = AnswerQuality(len(one[1]), num_agreeing, sum(final.log_probs))
        progress(len(found), len(different))
    return found
