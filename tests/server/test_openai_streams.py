"""What streams and log-probabilities must get right, over real HTTP in front of an engine that says what a test has
written down. Rows are those of the list of edge cases that other servers got wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from megatron.early_exit.inference.results import PromptToken
from tests.server.models import CHAT, ROLES
from tests.server.scripted import Script, ScriptedServer, scripted_server, token
from tests.unit.test_text_of_tokenizers import begin, byte_pairs, llama, save, special


def _chat_tokenizer(folder: Path) -> None:
    backend = byte_pairs()
    begin(backend)
    backend.add_special_tokens([special(name) for name in ROLES])
    save(backend, folder, chat_template=CHAT)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with scripted_server(tmp_path_factory.mktemp("bytes"), _chat_tokenizer) as server:
        yield server


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with scripted_server(tmp_path_factory.mktemp("pieces"), llama) as server:
        yield server


def ids_of(server: ScriptedServer, text: str) -> list[int]:
    return server.tokenizer.tokenize(text)


def named(server: ScriptedServer, name: str) -> int:
    """The id that the vocabulary writes so."""
    return server.tokenizer.library.tokenizer.convert_tokens_to_ids(name)


def complete(server: ScriptedServer, **body: object) -> dict:
    """A whole completion; its first choice."""
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 99, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chat(server: ScriptedServer, **body: object) -> dict:
    """A whole chat; its first choice."""
    messages = [{"role": "user", "content": "a"}]
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def events_of(server: ScriptedServer, path: str = "completions", **body: object) -> list[dict | str]:
    """The data of all events of a stream."""
    prompt = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    response = httpx.post(f"{server.url}/v1/{path}", json={**prompt, "max_tokens": 99, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def chunks_of(server: ScriptedServer, **body: object) -> list[dict]:
    """The choices of a stream that ends as it should."""
    *events, last = events_of(server, **body)
    assert last == "[DONE]"
    return [event["choices"][0] for event in events]


def each(numbers: list[int], at_once: int = 1) -> list[list]:
    """Steps of so many tokens."""
    return [[token(number) for number in numbers[i : i + at_once]] for i in range(0, len(numbers), at_once)]


@pytest.mark.parametrize("at_once", [1, 3])
def test_characters_are_never_split(at_once: int, scripted: ScriptedServer) -> None:
    """Row 1: a character of several tokens is one piece of text."""
    text = "é€\N{GRINNING FACE}" * 20 + " a small"
    numbers = ids_of(scripted, text)
    assert len(numbers) > len(text)
    scripted.play(Script(each(numbers, at_once)))
    chunks = chunks_of(scripted)
    assert "".join(chunk["text"] for chunk in chunks) == text
    assert not any("\ufffd" in chunk["text"] for chunk in chunks)


def test_bytes_that_are_no_text_do_not_stop_the_stream(scripted: ScriptedServer) -> None:
    """Row 1: at most three ids are held."""
    byte = named(scripted, "\u00ff")
    scripted.play(Script(each([byte] * 4000)))
    chunks = chunks_of(scripted, max_tokens=4000)
    assert "".join(chunk["text"] for chunk in chunks) == "\ufffd" * 4000
    assert len(chunks[-1]["text"]) < 100


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_stop_strings_over_chunk_borders(at_once: int, scripted: ScriptedServer) -> None:
    """Row 2: nothing of a stop string leaks; what looked like one comes at the end."""
    numbers = ids_of(scripted, "reads lines xyz text")
    scripted.play(Script(each(numbers, at_once)))
    for stop, text, reason in (
        ("xyz", "reads lines ", "stop"), ("s lin", "read", "stop"), (["no", " xyz t"], "reads lines", "stop"),
        ("text!", "reads lines xyz text", "length"),
    ):  # fmt: skip
        chunks = chunks_of(scripted, stop=stop)
        assert "".join(chunk["text"] for chunk in chunks) == text
        assert chunks[-1]["finish_reason"] == reason
        assert chunks[-1]["stop_reason"] == ((stop if isinstance(stop, str) else stop[1]) if reason == "stop" else None)
        whole = complete(scripted, stop=stop)
        assert (whole["text"], whole["finish_reason"]) == (text, reason)
        assert whole["stop_reason"] == chunks[-1]["stop_reason"]


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_chunk_covers_the_same_tokens_in_all_fields(at_once: int, scripted: ScriptedServer) -> None:
    """Row 3: while text is held for a stop string, so are its ids, exits and log-probabilities."""
    text = "a small model, €€ reads lines"
    numbers = ids_of(scripted, text)
    scripted.play(Script(each(numbers, at_once)))
    chunks = chunks_of(scripted, stop=["small model!", "€€€"], logprobs=0, return_token_ids=True)
    offset, so_far = 0, []
    for chunk in chunks:
        log_probs = chunk["logprobs"]
        num_tokens = len(chunk["token_ids"])
        assert {num_tokens} == {len(values) for values in (*log_probs.values(), chunk["exit_layers"])}
        so_far += chunk["token_ids"]  # the last may be a part of a character, which is the text of its last token
        assert scripted.tokenizer.detokenize(so_far).rstrip("\ufffd") == text[: offset + len(chunk["text"])]
        assert log_probs["text_offset"][:1] == [offset][:num_tokens]
        offset += len(chunk["text"])
    assert [number for chunk in chunks for number in chunk["token_ids"]] == numbers
    assert offset == len(text)


def test_numbers_that_json_cannot_write(scripted: ScriptedServer) -> None:
    """Row 11: minus infinity is -9999, and so is what is no number."""
    first, second = ids_of(scripted, "ab")
    steps = [
        [token(first, log_prob=-math.inf, top_log_probs=((second, -math.inf),))], [token(second, log_prob=math.nan)],
    ]  # fmt: skip
    scripted.play(Script(steps))
    log_probs = complete(scripted, logprobs=1)["logprobs"]
    assert log_probs["token_logprobs"] == [-9999.0, -9999.0]
    assert log_probs["top_logprobs"] == [{"a": -9999.0, "b": -9999.0}, {"b": -9999.0}]
    content = chat(scripted, logprobs=True, top_logprobs=1)["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [-9999.0, -9999.0]
    assert content[0]["top_logprobs"][0]["logprob"] == -9999.0


def test_tokens_with_equal_texts(sentencepiece: ScriptedServer) -> None:
    """Row 21: of tokens that look alike the more probable one is listed; as ids all are."""
    piece, byte, other = named(sentencepiece, "a"), named(sentencepiece, "<0x61>"), named(sentencepiece, "l")
    best = ((byte, -0.5), (other, -1.0), (piece, -2.0))
    sentencepiece.play(Script([[token(piece, log_prob=-2.0, top_log_probs=best)]]))
    log_probs = complete(sentencepiece, logprobs=3)["logprobs"]
    assert log_probs["tokens"] == ["a"]
    assert log_probs["token_logprobs"] == [-2.0]
    assert log_probs["top_logprobs"] == [{"a": -0.5, "l": -1.0}]
    as_ids = complete(sentencepiece, logprobs=3, return_tokens_as_token_ids=True)["logprobs"]
    assert as_ids["tokens"] == [f"token_id:{piece}"]
    assert as_ids["top_logprobs"] == [{f"token_id:{number}": value for number, value in best}]


def test_chat_log_probs_have_bytes_and_names(scripted: ScriptedServer) -> None:
    """Row 22: bytes of tokens are those of the text, also of parts of characters; special tokens have names."""
    text = "a small € é"
    numbers = [*ids_of(scripted, text), named(scripted, "<user>"), named(scripted, "<end>")]
    scripted.play(Script(each(numbers), ending="eod"))
    choice = chat(scripted, logprobs=True, top_logprobs=0)
    assert choice["message"]["content"] == text
    assert choice["finish_reason"] == "stop"
    content = choice["logprobs"]["content"]
    assert bytes(byte for one in content for byte in one["bytes"] or []) == text.encode()
    assert [(one["token"], one["bytes"]) for one in content[-2:]] == [("<user>", None), ("<end>", None)]
    assert [one["token"] for one in content[:2]] == ["a", " small"]
    assert "bytes:\\xe2" in [one["token"] for one in content]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_echo_with_an_end_of_text(is_streamed: bool, scripted: ScriptedServer) -> None:
    """Row 10: all four lists have an entry for each token of prompt and answer, and the text of an end is nobody's."""
    end = scripted.tokenizer.eod
    prompt_ids = scripted.tokenizer.encode_prompt("a small")
    small = ids_of(scripted, " small")[0]
    values = [None, -0.25, -0.75]
    tokens = [
        PromptToken(number, value, () if value is None else ((small, -0.125), (number, value)))
        for number, value in zip(prompt_ids, values, strict=True)
    ]
    steps = [[token(small, top_log_probs=((end, -0.375), (small, -0.5)))], [token(end, log_prob=-1.5)]]
    scripted.play(Script(steps, ending="eod", prompt=lambda ids: tokens))
    body = {"prompt": "a small", "echo": True, "logprobs": 2, "return_token_ids": True}
    choice = chunks_of(scripted, **body)[-1] if is_streamed else complete(scripted, **body)
    assert choice["text"] == "a small small"
    assert choice["finish_reason"] == "stop"
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt_ids, [small, end])
    assert choice["logprobs"] == {
        "tokens": ["<begin>", "a", " small", " small", "<end>"],
        "token_logprobs": [None, -0.25, -0.75, -0.5, -1.5],
        "top_logprobs": [
            None, {" small": -0.125, "a": -0.25}, {" small": -0.75}, {"<end>": -0.375, " small": -0.5}, {"<end>": -1.5},
        ],
        "text_offset": [0, 0, 1, 7, 13],
    }  # fmt: skip


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_error_in_mid_stream(path: str, scripted: ScriptedServer) -> None:
    """Row 23: the last event is the error; the client raises it."""
    scripted.play(Script(each(ids_of(scripted, "a small model")), ending="error", error="the worker is gone"))
    *_, before, last = events_of(scripted, path)
    assert before["choices"][0]["finish_reason"] is None
    assert last == {"error": {"message": "the worker is gone", "type": "server_error", "param": None, "code": None}}
    client = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="the worker is gone"):
        list(client.completions.create(model="", prompt="a", stream=True))
    with pytest.raises(openai.InternalServerError, match="the worker is gone"):
        client.completions.create(model="", prompt="a")


def test_an_error_of_one_answer_ends_the_others(scripted: ScriptedServer) -> None:
    scripted.play(Script([], ending="error", error="no memory"))
    assert events_of(scripted, prompt=["a", "b"], n=2)[-1]["error"]["message"] == "no memory"
    assert scripted.engine.num_admitted == 0


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_usage_is_the_last_chunk(path: str, scripted: ScriptedServer) -> None:
    """Row 20: one chunk without choices, before the end; all others say that they have no usage."""
    scripted.play(Script(each(ids_of(scripted, "a small"))))
    *chunks, usage, done = events_of(scripted, path, n=2, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert usage["usage"]["early_exit"]["tokens_by_exit"] == {"2": 0, "final": 4}
    assert all("usage" not in chunk for chunk in events_of(scripted, path)[:-1])


def test_indices_of_prompts_and_samples(scripted: ScriptedServer) -> None:
    """Row 8: prompt times n plus sample, on the last chunk as well."""
    scripted.play(Script(each(ids_of(scripted, "a small"))))
    *events, _ = events_of(scripted, prompt=["a", "b", "a"], n=2)
    ends = [choice["index"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert sorted(ends) == list(range(6))
    assert {choice["index"] for event in events for choice in event["choices"]} == set(range(6))


def test_a_stream_that_nobody_reads_is_cancelled(scripted: ScriptedServer) -> None:
    """Row 5: the engine is told when the client leaves."""
    scripted.play(Script(each([5] * 8000)))
    body = {"prompt": "a", "max_tokens": 8000, "stream": True}
    with httpx.stream("POST", f"{scripted.url}/v1/completions", json=body) as response:
        next(response.iter_bytes())
    for _ in range(500):
        if scripted.script.cancelled:
            break
        httpx.get(f"{scripted.url}/health/live")
    assert len(scripted.script.cancelled) == 1
    assert scripted.engine.num_admitted == 0
