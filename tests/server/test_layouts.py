"""Any layout behind the server gives the answers of the model in one process: every question by HTTP, whole and
streamed, all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.text_engine import RequestOutput
from tests.server import models
from tests.server.openai_answers import answers_of, check_answers, close
from tests.server.serving import RunningServer, start_server

pytestmark = pytest.mark.slow

SHORT = ["a small model", "reads lines of text,"]
LONG = ["reads lines of text, a small model " * 8, "the lines of a small model " * 9]
"""Together more than a step takes of prompts."""
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
EARLY_EXIT = {"mode": "early_exit", "exit_thresholds": [0.3, 0.6]}
DRAFTS = {"mode": "self_speculative", "draft_exit": 4, "draft_length": 3}

QUESTIONS: dict[str, dict[str, Any]] = {
    "full": {"prompt": SHORT},
    "full, sampled": {"prompt": SHORT, **SAMPLED},
    "early_exit": {"prompt": SHORT, **EARLY_EXIT},
    "early_exit, sampled": {"prompt": SHORT, **EARLY_EXIT, **SAMPLED},
    "early_exit, few deferred": {"prompt": SHORT, **EARLY_EXIT, "max_deferred": 2},
    "draft_then_verify": {"prompt": SHORT, **DRAFTS, "speculation": "draft_then_verify"},
    "draft_then_verify, sampled": {"prompt": SHORT, **DRAFTS, **SAMPLED, "speculation": "draft_then_verify"},
    "speculation": {"prompt": SHORT, **DRAFTS, "draft_exit": 2},
    "speculation, sampled": {"prompt": SHORT, **DRAFTS, **SAMPLED, "draft_exit": 2},
    "log-probs": {"prompt": SHORT, "logprobs": 3, **EARLY_EXIT},
    "echo": {"prompt": SHORT[0], "logprobs": 2, "echo": True},
    "echo alone": {"prompt": LONG[0], "logprobs": 0, "echo": True, "max_tokens": 0},
    "several": {"prompt": SHORT, "n": 2, **SAMPLED},
    "stop": {"prompt": SHORT, "stop": ["e", "zz"], "max_tokens": 40},
    "long and short": {"prompt": [LONG[0], SHORT[0], LONG[1], SHORT[1]]},
    "long and short, early_exit": {"prompt": [LONG[1], SHORT[1], LONG[0]], **EARLY_EXIT},
}


@dataclass(frozen=True)
class Served:
    """A layout behind a server, and the same model with neither."""

    server: RunningServer
    offline: LLM


LAYOUTS = {
    "tensor parallel": (models.plain_model, ["--tensor-model-parallel-size", 2]),
    "pipeline parallel": (models.sentencepiece_chat_model, ["--pipeline-model-parallel-size", 2]),
}
"""Each with a tokenizer of its own."""


@pytest.fixture(scope="module", params=["one process", *LAYOUTS])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if request.param not in LAYOUTS:
        yield Served(request.getfixturevalue("server"), request.getfixturevalue("offline"))
        return
    make, flags = LAYOUTS[request.param]
    checkpoint = make(tmp_path_factory.mktemp("layout"))
    with start_server(checkpoint, "--max-requests", 4, *flags) as server:
        offline = LLM.load(str(checkpoint), max_requests=4)  # while the server loads
        yield Served(server.wait_until_ready(), offline)


def test_answers_are_those_of_one_process(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.server.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(name: str, is_streamed: bool) -> list:
        question = {"max_tokens": 16, "temperature": 0, **QUESTIONS[name]}
        known = {key: value for key, value in question.items() if key not in (*EARLY_EXIT, *DRAFTS, *OTHERS)}
        extra = {key: value for key, value in question.items() if key not in known} | {"return_token_ids": True}
        if "logprobs" in question:
            extra["return_tokens_as_token_ids"] = True  # different tokens may have the same text
        response = client.completions.create(model="", **known, stream=is_streamed, extra_body=extra)
        return answers_of(response)

    with ThreadPoolExecutor(8) as pool:
        asked = {
            (name, is_streamed): pool.submit(ask, name, is_streamed)
            for name in QUESTIONS
            for is_streamed in (False, True)
        }
        for name in QUESTIONS:
            outputs = expected(served.offline, name)
            for is_streamed in (False, True):
                check(asked[name, is_streamed].result(), outputs, QUESTIONS[name])


OTHERS = ("speculation", "max_deferred")


def expected(offline: LLM, name: str) -> list[RequestOutput]:
    question = {"max_tokens": 16, **QUESTIONS[name]}
    prompts, names = question["prompt"], (*EARLY_EXIT, *DRAFTS, *OTHERS, "max_tokens", "n", "stop")
    params = GenerationParams(
        **{key: value for key, value in question.items() if key in names},
        sampling=SamplingSettings(**{key: question[key] for key in SAMPLED if key in question}),
        top_log_probs=question.get("logprobs", 0),
        echo=question.get("echo", False),
    )
    return offline.generate(prompts, params)


def check(answers: list, outputs: list[RequestOutput], question: dict[str, Any]) -> None:
    if "echo" not in question:
        check_answers(answers, outputs)
    if "logprobs" in question:
        for answer, output in zip(answers, outputs, strict=True):
            tokens = [*output.result.prompt, *output.result.tokens]
            assert len(tokens) > 10
            got, right = answer.logprobs["token_logprobs"], [token.log_prob for token in tokens]
            assert [one is None for one in got] == [one is None for one in right]
            assert [one for one in got if one is not None] == close([one for one in right if one is not None])
            for top, token in zip(answer.logprobs["top_logprobs"], tokens, strict=True):
                best = {f"token_id:{one}": log_prob for one, log_prob in token.top_log_probs}
                assert {name: top[name] for name in best} == close(best)
            assert answer.text.endswith(output.text)
