"""Fields of completions and chats over real HTTP, with `httpx` and `requests`: what they do is what the model without a
server does, what is wrong is refused by name. Rows are those of the list of edge cases that other servers got wrong."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
import requests

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.server.early_exit_fields import EarlyExitFields
from megatron.early_exit.server.openai_api.chat import ChatRequest
from megatron.early_exit.server.openai_api.completions import CompletionRequest
from tests.server.models import MAX_POSITIONS, NUM_LAYERS
from tests.server.openai_answers import Answer, answers_of, check_answers, close
from tests.server.serving import RunningServer

PROMPT = "a small model"
REPEATED = "so so so so so"
MESSAGES = [{"role": "user", "content": PROMPT}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NEEDED: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": PROMPT}, CHAT: {"messages": MESSAGES}}


def post(server: RunningServer, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={**NEEDED.get(path, {}), **body}, timeout=60)


def answered(server: RunningServer, path: str = COMPLETIONS, **body: Any) -> dict:
    """The body of a success."""
    response = post(server, path, **body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(server: RunningServer, path: str, field: str | None, words: str, **body: Any) -> dict:
    """The error of a request that is refused; it names the field and says `words`."""
    response = post(server, path, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None if field is None else (error["param"] or "").split(".")[0] == field, error
    assert words in error["message"], error
    return error


def greedy(offline: LLM, prompt: Any = PROMPT, **settings: Any) -> Any:
    (output,) = offline.generate([prompt], GenerationParams(**settings))
    return output


def choice_of(document: dict) -> Answer:
    """The only choice."""
    answer = Answer()
    (choice,) = document["choices"]
    answer.add(choice)
    return answer


# What fields do.


def test_every_kind_of_prompt(server: RunningServer, offline: LLM) -> None:
    """A text, texts, ids, lists of ids; usage sums over them (row 32)."""
    ids = offline.tokenizer.encode_prompt(PROMPT)
    settings = {"max_tokens": 5, "temperature": 0, "return_token_ids": True}
    expected = greedy(offline, max_tokens=5)
    for prompt, num_prompts in ((PROMPT, 1), ([PROMPT], 1), (ids, 1), ([ids], 1), ([PROMPT] * 2, 2), ([ids] * 2, 2)):
        got = answered(server, prompt=prompt, **settings)
        assert [choice["text"] for choice in got["choices"]] == [expected.text] * num_prompts
        assert all(choice["prompt_token_ids"] == ids for choice in got["choices"])
        numbers = got["usage"]["prompt_tokens"], got["usage"]["completion_tokens"], got["usage"]["total_tokens"]
        assert numbers == (len(ids) * num_prompts, 5 * num_prompts, (len(ids) + 5) * num_prompts)


def test_prompts_count_once_however_many_answers(server: RunningServer, offline: LLM) -> None:
    """Row 32: lists without echo have as many entries as tokens."""
    got = answered(server, prompt=[PROMPT, "reads"], n=3, max_tokens=4, seed=5, logprobs=1, ignore_eos=True)
    num_prompt = sum(len(offline.tokenizer.encode_prompt(prompt)) for prompt in (PROMPT, "reads"))
    assert (got["usage"]["prompt_tokens"], got["usage"]["completion_tokens"]) == (num_prompt, 24)
    for choice in got["choices"]:
        assert all(len(values) == 4 for values in choice["logprobs"].values())


def test_defaults_are_those_of_openai(server: RunningServer, offline: LLM) -> None:
    """Row 33: temperature 1, 16 tokens, in chats what fits, another seed each time."""
    got = answered(server, seed=11)
    expected = greedy(offline, max_tokens=16, sampling=SamplingSettings(temperature=1.0, seed=11))
    assert (got["choices"][0]["text"], got["model"]) == (expected.text, "model")
    texts = {choice["text"] for _ in range(2) for choice in answered(server, prompt=[PROMPT] * 2)["choices"]}
    assert len(texts) == 4
    prompt = offline.tokenizer.chat(MESSAGES)
    expected = greedy(offline, prompt, max_tokens=9999, ignore_eod=True)
    got = answered(server, CHAT, temperature=0, ignore_eos=True)
    assert got["choices"][0]["message"]["content"] == expected.text
    assert got["choices"][0]["finish_reason"] == "length"
    assert got["usage"]["total_tokens"] == MAX_POSITIONS + 1


@pytest.mark.parametrize("also", [{"top_p": 0.5}, {"top_k": 7}, {"top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 3}])
def test_temperature_0_is_greedy(also: dict, server: RunningServer, offline: LLM) -> None:
    """Row 33: whatever else clients send beside it."""
    got = answered(server, temperature=0, max_tokens=8, **also)
    assert got["choices"][0]["text"] == greedy(offline, max_tokens=8).text


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"top_p": 0.6}, {"top_p": 0.6}),
        ({"top_p": 0.0}, {"top_k": 1}),
        ({"top_k": 4}, {"top_k": 4}),
        ({"top_k": -1, "top_p": 1}, {}),
        ({"min_p": 0.2}, {"min_p": 0.2}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"43": 100, "50": -100, "044": 3.5}}, {"logit_bias": {43: 100, 50: -100, 44: 3.5}}),
        ({"logit_bias": {"43": 4.5}, "mode": "early_exit"}, {"logit_bias": {43: 4.5}}),
        ({"frequency_penalty": 1.5, "presence_penalty": -0.5}, {"frequency_penalty": 1.5, "presence_penalty": -0.5}),
    ],
)
def test_sampling(fields: dict, settings: dict, server: RunningServer, offline: LLM) -> None:
    got = answered(server, max_tokens=12, seed=-3, temperature=0.8, **fields)
    sampling = SamplingSettings(**{"temperature": 0.8, "seed": -3, **settings})
    expected = greedy(offline, max_tokens=12, sampling=sampling, mode=fields.get("mode", "full"))
    assert got["choices"][0]["text"] == expected.text


@pytest.mark.parametrize("mode", ["full", "self_speculative"])
def test_stop_tokens_have_no_text(mode: str, server: RunningServer, offline: LLM) -> None:
    """Row 4: also where a step brings several tokens."""
    settings = {"mode": mode, "draft_exit": 4, "draft_length": 4}
    whole = greedy(offline, max_tokens=12, **settings)
    stop = whole.result.token_ids[6]
    expected = greedy(offline, max_tokens=12, stop_tokens=(stop,), **settings)
    for stream in (False, True):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        extra = {**settings, "stop_token_ids": [stop], "return_token_ids": True}
        got = client.completions.create(
            model="", prompt=PROMPT, max_tokens=12, temperature=0, stream=stream, extra_body=extra
        )
        (answer,) = answers_of(got)
        check_answers([answer], [expected])
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert answer.token_ids[-1] == stop
        assert whole.text.startswith(answer.text)


def test_stop_strings(server: RunningServer, offline: LLM) -> None:
    text = greedy(offline, max_tokens=12).text
    stop = text[4:6]
    got = answered(server, temperature=0, max_tokens=12, stop=[stop, "no such text"])["choices"][0]
    assert (got["text"], got["finish_reason"], got["stop_reason"]) == (text[: text.index(stop)], "stop", stop)
    with_one = answered(server, temperature=0, max_tokens=12, stop=stop)["choices"][0]
    assert with_one == got


@pytest.mark.parametrize("path", NEEDED)
def test_min_tokens(path: str, server: RunningServer, offline: LLM) -> None:
    """Neither the model's end nor a stop string ends the answer before."""
    end = {"logit_bias": {str(offline.tokenizer.eod): 100}, "temperature": 0, "max_tokens": 6}
    assert answered(server, path, **end)["usage"]["completion_tokens"] == 1
    got = answered(server, path, **end, min_tokens=4, return_token_ids=True)
    assert (got["usage"]["completion_tokens"], got["choices"][0]["finish_reason"]) == (5, "stop")
    assert offline.tokenizer.eod not in got["choices"][0]["token_ids"][:4]


def test_prompt_log_probs_alone(server: RunningServer, offline: LLM) -> None:
    """Row 9: no token is made; the prompt's log-probabilities are those of the model."""
    expected = greedy(offline, max_tokens=0, echo=True, top_log_probs=2)
    for stream in (False, True):
        got = post(server, max_tokens=0, echo=True, logprobs=2, stream=stream)
        document = got.json() if not stream else json.loads(got.text.split("\n\n")[0][6:])
        choice = choice_of(document)
        assert (choice.text, choice.finish_reason, choice.exit_layers) == (PROMPT, "length", [])
        values = choice.logprobs["token_logprobs"]
        assert values[0] is None
        assert values[1:] == close([token.log_prob for token in expected.result.prompt[1:]])
    assert answered(server, max_tokens=0, echo=True)["choices"][0]["text"] == PROMPT
    refused(server, COMPLETIONS, "max_tokens", "without echo", max_tokens=0)
    refused(server, CHAT, "max_tokens", "greater than or equal to 1", max_tokens=0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [0, 3])
def test_log_probs_with_echo(num_top: int, stream: bool, server: RunningServer, offline: LLM) -> None:
    """Row 10: four lists over prompt and answer; the token itself is in every dictionary, with the same number."""
    expected = greedy(offline, max_tokens=6, echo=True, top_log_probs=num_top)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    got = client.completions.create(
        model="model", prompt=PROMPT, max_tokens=6, temperature=0, echo=True, logprobs=num_top, stream=stream
    )
    (answer,) = answers_of(got)
    assert answer.text == PROMPT + expected.text
    lists = answer.logprobs
    tokens = [*expected.result.prompt, *expected.tokens]
    assert {len(values) for values in lists.values()} == {len(tokens)}
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    assert lists["token_logprobs"][1:] == close([token.log_prob for token in tokens[1:]])
    for name, value, top in list(zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"]))[1:]:
        assert top[name] == value
        assert num_top <= len(top) <= num_top + 1 if num_top else len(top) == 1
        assert max(top.values()) == top[name] or name == min(top, key=top.get)
    assert lists["text_offset"][:4] == [0, 0, 1, 7]


def test_echo_of_ids(server: RunningServer, offline: LLM) -> None:
    ids = offline.tokenizer.encode_prompt(PROMPT)
    got = answered(server, prompt=ids, echo=True, temperature=0, max_tokens=3)
    assert got["choices"][0]["text"] == PROMPT + greedy(offline, max_tokens=3).text


def test_one_begin_of_text(server: RunningServer, offline: LLM) -> None:
    """Row 18: raw prompts as the tokenizer begins them, or as they are; chats as the template writes them."""
    tokenizer = offline.tokenizer
    for add, expected in ((None, tokenizer.encode_prompt(PROMPT)), (False, tokenizer.tokenize(PROMPT))):
        got = answered(server, add_special_tokens=add, return_token_ids=True, max_tokens=1, temperature=0)
        assert got["choices"][0]["prompt_token_ids"] == expected
        assert got["choices"][0]["text"] == greedy(offline, expected, max_tokens=1).text
    got = answered(server, CHAT, messages=MESSAGES * 2, return_token_ids=True, max_tokens=1)
    assert got["prompt_token_ids"] == tokenizer.chat(MESSAGES * 2)
    assert got["prompt_token_ids"].count(tokenizer.bos) == 2  # as this template writes them


def test_content_in_parts(server: RunningServer, offline: LLM) -> None:
    parts = [{"type": "text", "text": "a small"}, {"type": "text", "text": "model"}]
    got = answered(server, CHAT, messages=[{"role": "user", "content": parts}], max_tokens=1, return_token_ids=True)
    assert got["prompt_token_ids"] == offline.tokenizer.chat([{"role": "user", "content": "a small\nmodel"}])
    refused(
        server, CHAT, "messages", "a text, or a list of parts",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    )  # fmt: skip


def test_max_completion_tokens(server: RunningServer, offline: LLM) -> None:
    got = answered(server, CHAT, max_completion_tokens=3, temperature=0)
    assert got["usage"]["completion_tokens"] == 3
    assert answered(server, CHAT, max_completion_tokens=3, max_tokens=3, temperature=0)["choices"] == got["choices"]
    refused(server, CHAT, "max_tokens", "mean the same", max_completion_tokens=3, max_tokens=4)


def test_models(server: RunningServer) -> None:
    """The model by its name, in all places; another name is not found, none means it."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len, model.exit_layers, model.num_layers) == ("model", 256, [2, 4], NUM_LAYERS)
    assert model.exit_uses == ["both", "both"]
    assert client.models.retrieve("model") == model
    for ask in (
        lambda: client.models.retrieve("other/model"),
        lambda: client.completions.create(model="other", prompt=PROMPT),
        lambda: client.chat.completions.create(model="other", messages=MESSAGES, stream=True),
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    for name in (None, "", "model"):
        assert answered(server, model=name, max_tokens=1)["model"] == "model"


def test_log_probs_are_computed_for_those_who_ask(offline: LLM) -> None:
    checks = offline.engine.checks
    completion = lambda **fields: CompletionRequest(prompt="a", **fields).generation_params(GenerationParams(), checks)
    messages = [{"role": "user", "content": "a"}]
    chat = lambda **fields: ChatRequest(messages=messages, **fields).generation_params(GenerationParams(), checks)
    assert not completion()[0].log_probs and not chat().log_probs and not chat(logprobs=False).log_probs
    assert completion(logprobs=0)[0].log_probs and chat(logprobs=True).log_probs
    assert completion(return_exit_details=True)[0].log_probs and chat(return_exit_details=True).log_probs


def test_usage_says_what_early_exit_did(server: RunningServer, offline: LLM) -> None:
    settings = {"mode": "self_speculative", "draft_exit": 2, "draft_length": 2}
    expected = greedy(offline, max_tokens=8, **settings).result
    got = answered(server, max_tokens=8, temperature=0, **settings)["usage"]["early_exit"]
    statistics = expected.statistics
    assert (got["mode"], got["drafted"], got["accepted"]) == (
        "self_speculative", statistics.drafted, statistics.accepted,
    )  # fmt: skip
    settings = {"mode": "self_speculative", "draft_source": "ngram", "draft_length": 2}
    statistics = greedy(offline, REPEATED, max_tokens=16, **settings).result.statistics
    got = answered(server, prompt=REPEATED, max_tokens=16, temperature=0, **settings)["usage"]["early_exit"]
    assert (got["ngram_drafted"], got["ngram_accepted"]) == (statistics.ngram_drafted, statistics.ngram_accepted)
    assert got["drafted"] == got["ngram_drafted"] > 0
    settings = {"mode": "early_exit", "exit_thresholds": 0.99, "exit_layers": [4]}
    expected = greedy(offline, max_tokens=8, **settings).result
    got = answered(server, max_tokens=8, temperature=0, **settings)["usage"]["early_exit"]
    assert got["layers_saved"] == pytest.approx(expected.statistics.layers_saved)
    assert got["runs_saved"] == pytest.approx(expected.statistics.runs_saved)
    exits = {"final" if one.is_final else str(one.exit_layer): one.tokens for one in expected.usage}
    assert got["tokens_by_exit"] == exits


# Clients.


@pytest.mark.parametrize("fields, mode", [
    ({"exit_thresholds": 0.0}, "early_exit"),
    ({"exit_layers": [2]}, "early_exit"),
    ({"max_deferred": 0}, "early_exit"),
    ({"draft_exit": 2}, "self_speculative"),
    ({"speculation": "auto"}, "self_speculative"),
    ({"draft_source": "ngram"}, "self_speculative"),
    ({"exit_layers": [], "plan_exits": False}, "full"),
    ({"exit_thresholds": 0.0, "mode": "full"}, "full"),
    ({"exit_thresholds": 0.0, "draft_exit": 2, "mode": "self_speculative"}, "self_speculative"),
])  # fmt: skip
def test_fields_of_a_mode_imply_it(fields: dict, mode: str, server: RunningServer) -> None:
    """Where the request does not say another one."""
    assert answered(server, max_tokens=4, **fields)["usage"]["early_exit"]["mode"] == mode


def test_what_drafts_is_what_the_request_says() -> None:
    """Whatever the server's default is."""
    drafts = GenerationParams(mode="self_speculative")
    of_text = EarlyExitFields(draft_source="ngram").with_exits(replace(drafts, draft_exit=2))
    assert (of_text.draft_source, of_text.draft_exit) == ("ngram", None)
    of_exit = EarlyExitFields(draft_exit=2).with_exits(replace(drafts, draft_source="ngram"))
    assert (of_exit.draft_source, of_exit.draft_exit) == ("exit", 2)
    of_both = EarlyExitFields(draft_exit=2).with_exits(replace(drafts, draft_source="both"))
    assert (of_both.draft_source, of_both.draft_exit) == ("both", 2)
    with pytest.raises(ValueError, match="draft_exit is 2, but with draft_source 'ngram' no exit drafts"):
        EarlyExitFields(draft_source="ngram", draft_exit=2).with_exits(drafts)


def test_the_asynchronous_client(server: RunningServer, offline: LLM) -> None:
    """Many requests at once, streamed and not."""
    prompts = [PROMPT, "reads lines", "of text", "another line"] * 2

    async def ask(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
        settings = {"model": "model", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        if not stream:
            return (await client.completions.create(**settings)).choices[0].text
        chunks = await client.completions.create(**settings, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, one, index % 2 == 0) for index, one in enumerate(prompts)))

    expected = [output.text for output in offline.generate(prompts, GenerationParams(max_tokens=6))]
    assert asyncio.run(ask_all()) == expected


def test_requests_and_httpx(server: RunningServer, offline: LLM) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    expected = greedy(offline, max_tokens=6).text
    assert requests.post(server.url + COMPLETIONS, json=body, timeout=60).json()["choices"][0]["text"] == expected
    lines = requests.post(server.url + COMPLETIONS, json={**body, "stream": True}, stream=True, timeout=60).iter_lines()
    *chunks, end = [line.removeprefix(b"data: ") for line in lines if line]
    assert end == b"[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == expected
    with httpx.stream("POST", server.url + COMPLETIONS, json={**body, "stream": True}, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


# What is refused.


@pytest.mark.parametrize(
    ("path", "field", "words", "body"),
    [
        # Row 14: nothing to answer.
        (COMPLETIONS, "prompt", "prompt", {"prompt": ""}),
        (COMPLETIONS, "prompt", "not empty", {"prompt": []}),
        (COMPLETIONS, "prompt", "prompt is empty", {"prompt": [""]}),
        (COMPLETIONS, "prompt", "not empty", {"prompt": None}),
        (COMPLETIONS, "prompt", "prompt is empty", {"prompt": [[1], []]}),
        (CHAT, "messages", "at least 1", {"messages": []}),
        (CHAT, "messages", "list", {"messages": "hello"}),
        (COMPLETIONS, "prompt", "a list of texts", {"prompt": ["a", 1]}),
        (COMPLETIONS, "prompt", "a list of texts", {"prompt": {"text": "a"}}),
        # Row 15: ids that the vocabulary does not have.
        (COMPLETIONS, "prompt", "outside of the vocabulary", {"prompt": [1, 99999]}),
        (COMPLETIONS, "prompt", "prompt", {"prompt": [1, -1]}),
        (COMPLETIONS, "stop_token_ids", "stop_token_ids has ids outside", {"stop_token_ids": [99999]}),
        (CHAT, "stop_token_ids", "outside of the vocabulary", {"stop_token_ids": [99999]}),
        (CHAT, "logit_bias", "outside of the vocabulary", {"logit_bias": {"99999": 1}}),
        (COMPLETIONS, "logit_bias", "-100 to 100", {"logit_bias": {"1": 101}}),
        (COMPLETIONS, "logit_bias", "token ids", {"logit_bias": {"-1": 1}}),
        (COMPLETIONS, "logit_bias", "twice", {"logit_bias": {"1": 1, "01": 2}}),
        (COMPLETIONS, "min_tokens", "max_tokens", {"min_tokens": 17}),
        # Row 16: as much as anyone likes.
        (COMPLETIONS, "prompt", "one request may hold 128", {"prompt": ["a"] * 129}),
        (COMPLETIONS, "prompt", "prompt", {"prompt": ["a"] * 5000}),
        (COMPLETIONS, "n", "it may for 256", {"prompt": ["a"] * 100, "n": 3}),
        (COMPLETIONS, "n", "128", {"n": 129}),
        (CHAT, "n", "1", {"n": 0}),
        (COMPLETIONS, "stop", "16 at most", {"stop": ["a"] * 17}),
        (COMPLETIONS, "stop", "256 characters", {"stop": "a" * 257}),
        (CHAT, "stop", "1 to 256", {"stop": [""]}),
        (COMPLETIONS, "logprobs", "20", {"logprobs": 21}),
        (CHAT, "top_logprobs", "20", {"logprobs": True, "top_logprobs": 21}),
        (CHAT, "top_logprobs", "logprobs is not true", {"top_logprobs": 2}),
        # Rows 13 and 12: numbers.
        (COMPLETIONS, "seed", "9223372036854775807", {"seed": 2**63}),
        (CHAT, "seed", "-9223372036854775808", {"seed": -(2**63) - 1}),
        (COMPLETIONS, "temperature", "greater than or equal to 0", {"temperature": -0.1}),
        (COMPLETIONS, "temperature", "number", {"temperature": "1"}),
        (COMPLETIONS, "temperature", "number", {"temperature": 10**400}),
        (COMPLETIONS, "top_p", "1", {"top_p": 1.5}),
        (COMPLETIONS, "max_tokens", "integer", {"max_tokens": 2.5}),
        (COMPLETIONS, "max_tokens", "integer", {"max_tokens": True}),
        (COMPLETIONS, "frequency_penalty", "2", {"frequency_penalty": 2.1}),
        (COMPLETIONS, "repetition_penalty", "0", {"repetition_penalty": 0}),
        (COMPLETIONS, "n", "greedy answers are all equal", {"n": 2, "temperature": 0}),
        # Row 20.
        (COMPLETIONS, "stream_options", "stream is not true", {"stream_options": {"include_usage": True}}),
        (CHAT, "stream_options", "stream is not true", {"stream_options": {}}),
        # Row 17.
        (CHAT, "messages", "unknown role", {"messages": [{"role": "tool", "content": "a"}]}),
        (CHAT, "chat_template", "--chat-template", {"chat_template": "{{ messages }}"}),
        # What is not supported.
        (COMPLETIONS, "suffix", "not supported", {"suffix": "end"}),
        (COMPLETIONS, "best_of", "best_of must be n", {"best_of": 3}),
        (COMPLETIONS, "guided_json", "not supported", {"guided_json": "{}"}),
        (CHAT, "tools", "not supported", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (CHAT, "tool_choice", "not supported", {"tool_choice": "required"}),
        (CHAT, "response_format", "not supported", {"response_format": {"type": "json_object"}}),
        (CHAT, "echo", "not supported", {"echo": True}),
        (CHAT, "no_such_field", "there is no such field", {"no_such_field": 1}),
        # Early exit.
        (COMPLETIONS, "mode", "mode", {"mode": "fast"}),
        (COMPLETIONS, "mode", "draft_exit, exit_thresholds belong", {"exit_thresholds": 0.5, "draft_exit": 2}),
        (COMPLETIONS, "exit_thresholds", "from 0 to 1", {"exit_thresholds": 1.5}),
        (COMPLETIONS, "exit_thresholds", "2 exits", {"mode": "early_exit", "exit_thresholds": [0.1, 0.2, 0.3]}),
        (CHAT, "exit_layers", "no exit named 3", {"mode": "early_exit", "exit_layers": [3]}),
        (CHAT, "draft_exit", "the model's exits are 2, 4", {"mode": "self_speculative", "draft_exit": 5}),
        (COMPLETIONS, "plan_exits", "evaluate.py calibrate", {"mode": "early_exit", "plan_exits": True}),
        (COMPLETIONS, "speculation", "stages", {"mode": "self_speculative", "speculation": "across_stages"}),
    ],
)  # fmt: skip
def test_what_is_refused(path: str, field: str, words: str, body: dict, server: RunningServer) -> None:
    refused(server, path, field, words, **body)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_do_not_fit(stream: bool, server: RunningServer, offline: LLM) -> None:
    """Row 19: with the code of OpenAI, and both numbers of tokens."""
    ids = [20] * 250
    for path, body, words in (
        (COMPLETIONS, {"prompt": [20] * 300}, ("300", "256")),
        (COMPLETIONS, {"prompt": ids, "max_tokens": 8}, ("250", "8 (max_tokens)", "256", "at most 7")),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 300}]}, ("at most 256 fit",)),
        (CHAT, {"max_tokens": 256}, ("256 (max_tokens)",)),
        (COMPLETIONS, {"prompt": "a" * 100_000}, ("100000 characters", "256")),
    ):
        field = "prompt" if path == COMPLETIONS else "messages"
        error = refused(server, path, field, words[0], stream=stream, **body)
        assert error["code"] == "context_length_exceeded"
        assert all(word in error["message"] for word in words)
    got = answered(server, prompt=ids, temperature=0, ignore_eos=True)["choices"][0]  # the default is what fits
    expected = greedy(offline, ids, max_tokens=16, ignore_eod=True)
    assert (got["text"], len(got["exit_layers"]), got["finish_reason"]) == (expected.text, 7, "length")
    assert answered(server, prompt=ids, max_tokens=7)["choices"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("text", ['"temperature": NaN', '"temperature": 1e999', '"top_p": -Infinity'])
def test_numbers_that_are_none(text: str, path: str, server: RunningServer) -> None:
    """Row 12."""
    body = json.dumps(NEEDED[path])[:-1] + f", {text}}}"
    response = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("body", [
    {"prompt": "cut \ud83d"}, {"prompt": ["a", "\udc00"]}, {"stop": ["\ud83d"]}, {"model": "\ud83d"},
    {"mode": "\ud83d"}, {"user": "\ud83d"}, {"\ud83d": 1},
])  # fmt: skip
def test_half_characters(body: dict, server: RunningServer) -> None:
    """Row 12: echoing them must not fail either."""
    content = json.dumps({**NEEDED[COMPLETIONS], "max_tokens": 1, **body})
    response = httpx.post(server.url + COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in ((400, 404) if "user" not in body else (200, 400)), response.text
    assert response.json()


NEUTRAL: dict[str, dict[str, Any]] = {
    COMPLETIONS: {
        "suffix": "", "best_of": 1, "logit_bias": {}, "user": "someone", "echo": False, "stop": [], "logprobs": None,
        "response_format": None, "guided_json": None, "min_p": 0, "top_k": -1, "repetition_penalty": 1, "n": 1,
        "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True, "length_penalty": 1.0,
        "include_stop_str_in_output": False, "use_beam_search": False, "truncate_prompt_tokens": None, "priority": 0,
        "stream_options": None, "presence_penalty": 0.0, "seed": None, "stop_token_ids": [], "exit_layers": [],
        "no_stop_trim": False, "return_hidden_states": False,
    },
    CHAT: {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": None, "store": False,
        "metadata": {"a": "b"}, "response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto",
        "logprobs": False, "top_logprobs": None, "logit_bias": None, "chat_template": None, "documents": None,
        "chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False, "echo": False,
        "reasoning_effort": None, "min_tokens": 0, "stream": False, "separate_reasoning": True,
        "stream_reasoning": True, "include_reasoning": True, "no_stop_trim": False, "return_hidden_states": False,
        "messages": [
            {"role": "user", "content": PROMPT, "type": "text"},
            {"role": "assistant", "content": "reads", "tool_calls": None, "refusal": None, "annotations": [],
             "audio": None, "function_call": None},
            {"role": "user", "content": "lines", "name": "someone"},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("path", NEUTRAL)
def test_values_that_ask_for_nothing(path: str, server: RunningServer) -> None:
    """They are accepted, and change nothing."""
    settings = {"max_tokens": 4, "temperature": 0}
    if path == CHAT:
        settings["messages"] = NEUTRAL[CHAT]["messages"]
    got = answered(server, path, **{**NEUTRAL[path], **settings})
    assert got["choices"] == answered(server, path, **settings)["choices"]


@pytest.mark.parametrize("path", NEUTRAL)
def test_null_is_as_good_as_nothing(path: str, server: RunningServer) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    fields = schema["CompletionRequest" if path == COMPLETIONS else "ChatRequest"]["properties"]
    nothing = dict.fromkeys(set(fields) - {"prompt", "messages", "max_tokens", "temperature"})
    settings = {"max_tokens": 4, "temperature": 0}
    assert answered(server, path, **nothing, **settings)["choices"] == answered(server, path, **settings)["choices"]
