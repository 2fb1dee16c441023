"""What answers say alike in every API: why they ended, and numbers that JSON can write."""

from __future__ import annotations

from typing import Literal

from megatron.early_exit.inference.results import FinishReason

OpenAIFinishReason = Literal["stop", "length"]

OPENAI_FINISH_REASONS: dict[FinishReason, OpenAIFinishReason] = {
    "eod": "stop", "stop": "stop", "max_tokens": "length", "max_positions": "length",
}  # fmt: skip
"""OpenAI's words. There are none for answers that were cancelled or have failed: nobody reads the former, and an error
takes the place of the latter."""

_LOWEST = -9999.0
"""In place of minus infinity, which JSON cannot write; as others do."""


def finite(log_prob: float) -> float:
    """A number that JSON can write."""
    return log_prob if log_prob > _LOWEST else _LOWEST


def computed(value: float | None) -> float:
    """A probability or log-probability of a generated token, of an answer for which they were asked for
    (`GenerationParams.log_probs`)."""
    assert value is not None, "the request's settings asked for no log-probabilities"
    return value
