"""`/tokenize`, `/detokenize` and `/tokenizer_info`: what they say is what the server does with prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from megatron.early_exit.inference.llm import LLM
from tests.server.models import CHAT, MAX_POSITIONS
from tests.server.scripted import ScriptedServer, scripted_server
from tests.server.serving import RunningServer
from tests.unit.test_text_of_tokenizers import llama, plain

TEXT = "a small model, €"
MESSAGES = [{"role": "user", "content": "a small"}]


def post(url: str, path: str, **body: object) -> httpx.Response:
    return httpx.post(url + path, json=body)


def test_tokenize(server: RunningServer, offline: LLM) -> None:
    ids = offline.tokenizer.encode_prompt(TEXT)
    got = post(server.url, "/tokenize", prompt=TEXT, model="model", return_token_strs=True).json()
    assert (got["count"], got["max_model_len"], got["tokens"]) == (len(ids), MAX_POSITIONS, ids)
    assert got["token_strs"][:4] == ["<begin>", "a", " small", " model"]
    assert got["token_strs"][-3:] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    without = post(server.url, "/tokenize", prompt=TEXT, add_special_tokens=False).json()
    assert without["tokens"] == offline.tokenizer.tokenize(TEXT) == ids[1:]
    assert post(server.url, "/tokenize", prompt="").json()["tokens"] == [offline.tokenizer.bos]


def test_tokenize_a_conversation(server: RunningServer, offline: LLM) -> None:
    got = post(server.url, "/tokenize", messages=MESSAGES).json()
    assert got["tokens"] == offline.tokenizer.chat(MESSAGES)


def test_detokenize(server: RunningServer, offline: LLM) -> None:
    ids = offline.tokenizer.encode_prompt(TEXT)
    assert post(server.url, "/detokenize", tokens=ids).json() == {"prompt": TEXT}
    assert post(server.url, "/detokenize", tokens=[]).json() == {"prompt": ""}


def test_tokenizer_info(server: RunningServer, offline: LLM) -> None:
    tokenizer = offline.tokenizer
    got = httpx.get(f"{server.url}/tokenizer_info").json()
    assert (got["vocab_size"], got["model_max_length"]) == (tokenizer.vocab_size, MAX_POSITIONS)
    assert (got["bos_token"], got["bos_token_id"]) == ("<begin>", tokenizer.bos)
    assert (got["eos_token"], got["eos_token_id"], got["end_token_ids"]) == ("<end>", tokenizer.eod, [tokenizer.eod])
    assert got["chat_template"] == CHAT


@pytest.mark.parametrize(
    ("path", "body", "field", "words"),
    [
        ("/tokenize", {}, "prompt", "prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt", "one of them"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "a"}]}, "messages", "unknown role"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "a"}, "chat_template", "--chat-template FILE"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens", "no effect"),
        ("/tokenize", {"prompt": "a" * 100_000}, "prompt", "at most 256 tokens"),
        ("/tokenize", {"prompt": 7}, "prompt", "string"),
        ("/detokenize", {"tokens": [99999]}, "tokens", "outside of the vocabulary"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0", "integer"),
    ],
)  # fmt: skip
def test_what_is_refused(path: str, body: dict, field: str, words: str, server: RunningServer) -> None:
    response = post(server.url, path, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert words in error["message"]
    assert post(server.url, path, model="other", prompt="a", tokens=[]).status_code in (400, 404)


def test_another_model(server: RunningServer) -> None:
    assert post(server.url, "/tokenize", prompt="a", model="other").status_code == 404
    assert post(server.url, "/detokenize", tokens=[1], model="other").status_code == 404


@pytest.fixture(scope="module")
def without_template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with scripted_server(tmp_path_factory.mktemp("plain"), plain) as server:
        yield server


def test_no_chat_template(without_template: ScriptedServer) -> None:
    """Row 17: it is said how to give one."""
    for path in ("/v1/chat/completions", "/tokenize"):
        response = post(without_template.url, path, messages=MESSAGES)
        assert response.status_code == 400
        assert "--chat-template FILE" in response.json()["error"]["message"]
    assert httpx.get(f"{without_template.url}/tokenizer_info").json()["chat_template"] is None


@pytest.mark.parametrize("save", [plain, llama], ids=["bytes", "sentencepiece"])
def test_a_template_of_the_server(save, tmp_path: Path) -> None:
    """Row 17: it takes the place of the tokenizer's; its errors are the request's."""
    template = "{{ messages[0]['content'] }}:{{ messages[0]['colour'] or raise_exception('no colour') }}"
    with scripted_server(tmp_path, save, chat_template="{{ messages[0]['content'] }}:") as server:
        got = post(server.url, "/tokenize", messages=MESSAGES).json()
        assert got["tokens"] == server.tokenizer.encode_prompt("a small:", add_special_tokens=False)
        assert httpx.get(f"{server.url}/tokenizer_info").json()["chat_template"] == "{{ messages[0]['content'] }}:"
    with scripted_server(tmp_path, save, chat_template=template) as server:
        response = post(server.url, "/tokenize", messages=MESSAGES)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
        assert "no colour" in response.json()["error"]["message"]
