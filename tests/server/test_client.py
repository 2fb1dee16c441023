"""`tools/request_client.py` against the server, and against one that is busy, loads, wants a key or breaks off."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron.early_exit.inference import report
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.server.client_command import main
from tests.server.serving import ROOT, RunningServer

PROMPT = "a small model reads"
EARLY = GenerationParams(mode="early_exit", exit_thresholds=(0.95,), max_tokens=12)
EARLY_FLAGS = ["--early-exit-thres", "0.95", "--tokens-to-generate", "12"]


def run(server: RunningServer, *words: str) -> int:
    return main(["--url", server.url, *words])


def test_the_program(server: RunningServer, offline: LLM) -> None:
    """Text and exits of prompts from a pipe, without torch."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "tools/request_client.py", "--url", server.url, *EARLY_FLAGS],
        input=f"{PROMPT}\n\nand\n", capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and "| torch" not in done.stderr
    for prompt in (PROMPT, "and"):
        output = offline.generate(prompt, EARLY)[0]
        assert prompt + output.text in done.stdout
        assert report.marked(output.pieces, output.tokens) in done.stdout
    assert "early_exit: " in done.stdout


def test_colours_by_exit(server: RunningServer, offline: LLM, capsys: pytest.CaptureFixture) -> None:
    assert run(server, PROMPT, *EARLY_FLAGS, "--color", "always") == 0
    output = offline.generate(PROMPT, EARLY)[0]
    text = capsys.readouterr().out
    assert text.startswith(PROMPT + report.coloured_text(output.pieces, output.tokens, 6)) and "\033[" in text


@pytest.mark.parametrize(("words", "params"), [
    (EARLY_FLAGS, EARLY),
    ([*EARLY_FLAGS, "--exit-score", "head"], EARLY),
    (["--mode", "full"], GenerationParams(max_tokens=64)),
    (["--draft-exit", "2", "--draft-length", "3", "--tokens-to-generate", "12"],
     GenerationParams(mode="self_speculative", draft_exit=2, draft_length=3, max_tokens=12)),
], ids=["early exit", "exit score", "full", "speculation"])  # fmt: skip
def test_json(
    server: RunningServer, offline: LLM, capsys: pytest.CaptureFixture, words: list[str], params: GenerationParams
) -> None:
    assert run(server, PROMPT, "--json", *words) == 0
    document = json.loads(capsys.readouterr().out)
    output = offline.generate(PROMPT, params)[0]
    assert document["prompt"] == PROMPT and document["text"] == output.text
    assert document["exit_layers"] == [token.exit_layer for token in output.tokens]
    assert document["usage"]["early_exit"]["mode"] == params.mode


def test_the_prompts_of_ee_llm_through_its_api(
    server: RunningServer, offline: LLM, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Lines of JSON, and what the heads predict."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"text": "{PROMPT}"}}\n{{"text": "and"}}\n')
    assert run(server, "--prompt-file", str(file), "--api", "megatron", "--print-max-prob", *EARLY_FLAGS) == 0
    text = capsys.readouterr().out
    for prompt in (PROMPT, "and"):
        output = offline.generate(prompt, EARLY)[0]
        assert offline.tokenizer.detokenize(output.result.token_ids) in text
        assert all(f"{token.log_prob:.3f}" in text for token in output.tokens)
    assert "2: " in text and "final: " in text


def test_chat_keeps_the_conversation(
    server: RunningServer, offline: LLM, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a small model\nreads\n")))
    assert run(server, "--chat", "--json", "--mode", "full", "--tokens-to-generate", "6") == 0
    answers = [json.loads(line)["message"]["content"] for line in capsys.readouterr().out.splitlines()]
    messages = []
    for said, answer in zip(["a small model", "reads"], answers, strict=True):
        messages.append({"role": "user", "content": said})
        prompt = offline.tokenizer.chat(messages)
        assert answer == offline.generate([prompt], GenerationParams(max_tokens=6))[0].text
        messages.append({"role": "assistant", "content": answer})


def test_a_refused_prompt_does_not_end_the_others(server: RunningServer, capsys: pytest.CaptureFixture) -> None:
    assert run(server, "a " * 300, PROMPT, "--json", "--tokens-to-generate", "3") == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 and "601 tokens" in shown.err and "Traceback" not in shown.err


def test_a_score_that_the_model_has_not(server: RunningServer, capsys: pytest.CaptureFixture) -> None:
    assert run(server, PROMPT, "--exit-score", "probe") == 1
    assert "exit_score 'probe' needs probes of this model's exits" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--url", "localhost:5000"], "it looks like http://"),
    (["--url", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
    (["--api", "megatron", "--chat"], "--chat: /api has no such thing"),
    (["--api", "megatron", "--exit-score", "probe"], "--exit-score: /api has no such thing"),
    (["--print-max-prob"], "needs --api megatron"),
    (["--prompt-file", "/nowhere/prompts"], "/nowhere/prompts cannot be read: No such file"),
])  # fmt: skip
def test_what_cannot_work_is_said(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert main(["a", *words]) == 2
    assert message in capsys.readouterr().err


ANSWER = {"text": ["well"], "segments": [["well"]], "logprobs": [[-1.0]], "exit_layers": [[2]], "predictions": None,
          "finish_reasons": ["eod"], "request_time": 0.1}  # fmt: skip


@contextmanager
def answering(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, list[float]]]:
    """A server that gives these answers one after the other, the last one again and again: (status, headers, body).
    Yields its address and the times of requests."""
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            status, headers, body = answers[min(len(times), len(answers) - 1)]
            times.append(time.monotonic())
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET = do_PUT

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", times
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refusal(status: int, message: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, json.dumps({"message": message}).encode()


GOOD = (200, {}, json.dumps(ANSWER).encode())
BUSY = {"Retry-After": "1"}


def test_a_busy_server_is_asked_again_when_it_says(capsys: pytest.CaptureFixture) -> None:
    with answering(refusal(429, "many", **BUSY), GOOD) as (url, times):
        assert main(["a", "--url", url, "--api", "megatron"]) == 0
    assert len(times) == 2 and 0.9 < times[1] - times[0] < 5
    assert capsys.readouterr().out.startswith("well")


def test_patience_ends(capsys: pytest.CaptureFixture) -> None:
    with answering(refusal(429, "many wait", **{"Retry-After": "30"})) as (url, times):
        assert main(["a", "--url", url, "--api", "megatron", "--busy", "5"]) == 2
    assert len(times) == 1 and "too many requests: many wait" in capsys.readouterr().err


@pytest.mark.parametrize("wait", [True, False])
def test_a_server_that_loads(capsys: pytest.CaptureFixture, wait: bool) -> None:
    with answering(refusal(503, "the model is being loaded", **BUSY), GOOD) as (url, times):
        status = main(["a", "--url", url, "--api", "megatron", *(["--wait", "20"] if wait else [])])
    assert (status, len(times)) == ((0, 2) if wait else (2, 1))
    assert wait or "not ready: the model is being loaded; --wait SECONDS" in capsys.readouterr().err


def test_a_missing_key(capsys: pytest.CaptureFixture) -> None:
    with answering((401, {}, b'{"error": {"message": "the key is wrong"}}')) as (url, _):
        assert main(["a", "--url", url]) == 2
    assert "the key is wrong; give the key with --api-key" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "message"), [
    (b"", "the answer broke off"),
    (b'data: {"error": {"message": "the engine has ended"}}\n\n', "the engine has ended"),
])  # fmt: skip
def test_a_stream_that_breaks_off(capsys: pytest.CaptureFixture, end: bytes, message: str) -> None:
    models = (200, {}, b'{"data": [{"num_layers": 6}]}')
    chunk = {"choices": [{"text": "we", "finish_reason": None, "exit_details": []}]}
    with answering(models, (200, {}, b"data: " + json.dumps(chunk).encode() + b"\n\n" + end)) as (url, _):
        assert main(["a", "--url", url]) == 1
    assert message in capsys.readouterr().err


def test_other_servers_are_recognised(capsys: pytest.CaptureFixture) -> None:
    with answering((404, {}, b"<html>")) as (url, _):
        assert main(["a", "--url", url]) == 1
    assert "status 404 (Not Found); is this a server for text generation?" in capsys.readouterr().err
