"""What is right: the answers of the engine with no server, and how a served answer compares with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.serving_client import Answer
from benchmarks.serving_statistics import shared_beginning
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.text_engine import RequestOutput

Verdict = Literal["equal", "rounding", "wrong", "lost"]
"""rounding: the first other token was as good, up to `_ROUNDING`: batches of other sizes add in another order."""

_ROUNDING = 2e-3
"""Of log-probabilities, and of confidences beside a threshold."""

PROMPTS = (
    "The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,", "Water boils at",
    "import os", "The three most important rules of writing are", "In 1969, two astronauts",
    "To make bread you need flour,", "Q: What is the tallest mountain on Earth?", "The theory of evolution",
    "A prime number is", "Dear Sir or Madam,", "SELECT name FROM", "The human heart", "She opened the door and",
    "The stock market", "Photosynthesis is the process by which", "1, 1, 2, 3, 5, 8,", "My favourite recipe",
    "The meaning of life",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A prompt, and how many tokens follow it."""

    prompt: str
    num_tokens: int

    def body(self, mode: dict[str, Any]) -> dict[str, Any]:
        """Of a request for a greedy completion. mode: fields of early exit."""
        fields = {"prompt": self.prompt, "max_tokens": self.num_tokens, "temperature": 0, "ignore_eos": True}
        return {**fields, "return_token_ids": True, **mode}

    def params(self, mode: dict[str, Any]) -> GenerationParams:
        return GenerationParams(max_tokens=self.num_tokens, ignore_eod=True, **mode)


def cases(shortest: int, longest: int, seed: int) -> list[Case]:
    """One for each prompt, with lengths drawn between these."""
    draw = random.Random(seed)
    return [Case(prompt, draw.randint(shortest, longest)) for prompt in PROMPTS]


class Offline:
    """A model with no server."""

    def __init__(self, path: str, num_slots: int) -> None:
        self.llm = LLM.load(path, max_requests=num_slots)

    def answer(self, all_cases: Sequence[Case], mode: dict[str, Any]) -> list[RequestOutput]:
        outputs = self.llm.generate([case.prompt for case in all_cases], [case.params(mode) for case in all_cases])
        for output in outputs:
            assert output.error is None, output.error
        return outputs

    def judge(self, answer: Answer, right: RequestOutput, mode: dict[str, Any]) -> Verdict:
        """How a served answer compares with the right one."""
        if not answer.is_whole:
            return "lost"
        right_ids = [token.token for token in right.tokens]
        if answer.token_ids == right_ids and answer.text == right.text:
            return "equal"
        return "rounding" if self._is_rounding(answer.token_ids, right_ids, right.prompt_ids, mode) else "wrong"

    def _is_rounding(self, ids: list[int], right_ids: list[int], prompt_ids: list[int], mode: dict[str, Any]) -> bool:
        common = shared_beginning(ids, right_ids)
        if len(ids) != len(right_ids) or common == len(ids):
            return False
        context = prompt_ids + right_ids[:common]
        exits = () if mode["mode"] != "early_exit" else None
        (result,) = self.llm.score(
            [context], ScoreParams(exit_layers=exits, top_log_probs=2, score_from=len(context) - 1)
        )
        heads = result.check().heads
        return any(self._has_two_ways(head, {ids[common], right_ids[common]}, mode) for head in heads)

    @staticmethod
    def _has_two_ways(head: Any, tokens: set[int], mode: dict[str, Any]) -> bool:
        (first, first_log_prob), (second, second_log_prob) = head.top_log_probs[0]
        if {first, second} == tokens and first_log_prob - second_log_prob < _ROUNDING:
            return True
        is_exit = head.exit_layer is not None
        return is_exit and abs(head.confidences[0] - mode["exit_thresholds"]) < _ROUNDING
