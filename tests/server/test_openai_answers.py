"""Completions and chats by the `openai` client over real HTTP: each answer is that of the model without a server."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from tests.server.openai_answers import MODES, answers_of, check_answers, close
from tests.server.serving import RunningServer

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
PROMPTS = ["a small model", "reads lines of text,"]
MESSAGES = [{"role": "system", "content": "a small model"}, {"role": "user", "content": "reads lines"}]

both_ways = pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def sampled(**settings: Any) -> GenerationParams:
    return GenerationParams(sampling=SamplingSettings(**SAMPLED), **settings)


@both_ways
@pytest.mark.parametrize("mode", MODES)
def test_completions_in_every_mode(mode: str, is_streamed: bool, client: openai.OpenAI, offline: LLM) -> None:
    """Rows 3 and 8: several prompts and answers at once; a chunk has the ids and exits of its text."""
    extra = {**MODES[mode], "return_token_ids": True, "return_exit_details": True}
    response = client.completions.create(
        model="", prompt=PROMPTS, max_tokens=12, n=2, stream=is_streamed, extra_body=extra, **SAMPLED
    )
    expected = offline.generate(PROMPTS, sampled(max_tokens=12, n=2, **MODES[mode]))
    check_answers(answers_of(response), expected)
    if mode != "full":
        assert any(not token.is_final or token.is_draft for output in expected for token in output.tokens)


@both_ways
@pytest.mark.parametrize("mode", MODES)
def test_chats_in_every_mode(mode: str, is_streamed: bool, client: openai.OpenAI, offline: LLM) -> None:
    extra = {**MODES[mode], "return_token_ids": True, "return_exit_details": True}
    response = client.chat.completions.create(
        model="model", messages=MESSAGES, max_completion_tokens=12, n=2, stream=is_streamed, logprobs=True,
        top_logprobs=2, extra_body=extra, **SAMPLED,
    )  # fmt: skip
    prompt = offline.tokenizer.chat(MESSAGES)
    expected = offline.generate(prompt, sampled(max_tokens=12, n=2, top_log_probs=2, **MODES[mode]))
    answers = answers_of(response)
    check_answers(answers, expected)
    for answer, output in zip(answers, expected, strict=True):
        content = answer.logprobs["content"]
        assert [one["logprob"] for one in content] == close([token.log_prob for token in output.tokens])
        for one, token in zip(content, output.tokens, strict=True):
            assert [top["logprob"] for top in one["top_logprobs"]] == close([value for _, value in token.top_log_probs])
