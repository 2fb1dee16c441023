"""Answers of the OpenAI API as plain data, whole ones and streamed ones alike, and what they must be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron.early_exit.inference.text_engine import RequestOutput

REASONS = {"eod": "stop", "stop": "stop", "max_tokens": "length", "max_positions": "length"}

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "early_exit": {"mode": "early_exit", "exit_thresholds": [0.3, 0.9]},
    "self_speculative": {"mode": "self_speculative", "draft_exit": 4, "draft_length": 3},
}
"""Fields of requests, which are those of `GenerationParams`."""


@dataclass
class Answer:
    """One choice, its chunks put together."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    exit_details: list[dict] = field(default_factory=list)
    logprobs: dict[str, list] = field(default_factory=dict)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, choice: dict) -> None:
        """What a chunk brings."""
        assert self.finish_reason is None, "something comes after the end"
        message = choice.get("delta", choice.get("message", choice))
        self.text += message.get("content" if message is not choice else "text") or ""
        self.token_ids += choice.get("token_ids") or []
        self.exit_layers += choice["exit_layers"]
        self.exit_details += choice.get("exit_details") or []
        for name, values in (choice["logprobs"] or {}).items():
            if values is not None:
                self.logprobs.setdefault(name, []).extend(values)
        self.finish_reason, self.stop_reason = choice["finish_reason"], choice["stop_reason"]


def answers_of(response: Any) -> list[Answer]:
    """The choices of what the `openai` client returns, by index; chunks must come in order and end each answer once."""
    found: dict[int, Answer] = {}
    for part in response if isinstance(response, Iterable) and not hasattr(response, "choices") else [response]:
        for choice in part.model_dump()["choices"]:
            found.setdefault(choice["index"], Answer()).add(choice)
    assert sorted(found) == list(range(len(found)))
    assert all(answer.finish_reason is not None for answer in found.values())
    return [found[index] for index in range(len(found))]


def check_answers(answers: Sequence[Answer], outputs: Sequence[RequestOutput]) -> None:
    """They are the outputs of the model with no server, in text, ids, exits, details and ends."""
    assert len(answers) == len(outputs)
    for answer, output in zip(answers, outputs, strict=True):
        assert output.error is None
        assert answer.text == output.text
        assert answer.token_ids == output.result.token_ids
        assert answer.exit_layers == [token.exit_layer for token in output.tokens]
        assert answer.finish_reason == REASONS[output.finish_reason]
        if answer.exit_details:
            check_details(answer, output)


def check_details(answer: Answer, output: RequestOutput) -> None:
    """One entry a token; their texts are the answer's."""
    assert "".join(one["text"] for one in answer.exit_details) == answer.text
    for one, token, piece in zip(answer.exit_details, output.tokens, output.pieces, strict=True):
        assert (one["token_id"], one["exit_layer"], one["text"]) == (token.token, token.exit_layer, piece)
        assert (one["is_final"], one["is_draft"]) == (token.is_final, token.is_draft)
        assert one["confidence"] == pytest.approx(token.confidence, rel=1e-3)


def close(numbers: Sequence[float]) -> Any:
    """Log-probabilities that were computed beside other rows differ in the last digits of logits, which are in the
    hundreds for weights drawn with a deviation of 0.3."""
    return pytest.approx(numbers, abs=1e-3)
