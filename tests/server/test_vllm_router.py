"""Two servers behind `vllm-router`: what clients send and get is as without it, and one that dies is done without."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from tests.ports import free_port
from tests.server.serving import RunningServer, start_server

PROMPT = "a small model reads"
EARLY = {"mode": "early_exit", "exit_thresholds": 0.95}

ROUTER = shutil.which("vllm-router", path=sysconfig.get_path("scripts")) or shutil.which("vllm-router")
pytestmark = pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed")


@pytest.fixture(scope="module")
def workers(checkpoint: Path) -> Iterator[list[RunningServer]]:
    """Two, with one slot and one place to wait each."""
    with contextlib.ExitStack() as stack:
        flags = ("--max-requests", 1, "--max-waiting", 1)
        started = [stack.enter_context(start_server(checkpoint, *flags)) for _ in range(2)]
        yield [worker.wait_until_ready() for worker in started]


@pytest.fixture(scope="module")
def router(workers: list[RunningServer]) -> Iterator[str]:
    """The address of one that tries each request again, at most three times."""
    port, metrics_port = free_port(), free_port()
    words = [ROUTER, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *(one.url for one in workers)]
    words += ["--policy", "round_robin", "--retry-max-retries", "3", "--retry-initial-backoff-ms", "50"]
    words += [
        "--health-check-interval-secs",
        "1",
        "--worker-startup-check-interval",
        "1",
        "--prometheus-port",
        str(metrics_port),
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_serves(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGKILL)  # it waits for connections that clients keep
        process.wait()


def wait_until_it_serves(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        assert time.monotonic() < deadline and process.poll() is None, "the router does not serve"
        time.sleep(0.2)


def complete(url: str, **fields: object) -> httpx.Response:
    body = {"model": "model", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_fields_of_early_exit_pass(router: str, offline: LLM) -> None:
    output = offline.generate(PROMPT, GenerationParams(max_tokens=12, mode="early_exit", exit_thresholds=(0.95,)))[0]
    for _ in range(2):  # by each worker
        choice = complete(router, **EARLY, return_exit_details=True).json()["choices"][0]
        assert choice["text"] == output.text
        assert choice["exit_layers"] == [token.exit_layer for token in output.tokens]
        assert [one["text"] for one in choice["exit_details"]] == output.pieces


def test_chats_and_the_api_of_ee_llm_pass(router: str, offline: LLM) -> None:
    """The router adds fields of its own to chats."""
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": "model", "messages": messages, "max_tokens": 12, "temperature": 0, **EARLY}
    chat = httpx.post(f"{router}/v1/chat/completions", json=body, timeout=60).json()
    params = GenerationParams(max_tokens=12, mode="early_exit", exit_thresholds=(0.95,))
    output = offline.generate([offline.tokenizer.chat(messages)], params)[0]
    assert chat["choices"][0]["message"]["content"] == output.text
    assert chat["choices"][0]["exit_layers"] == [token.exit_layer for token in output.tokens]
    answer = httpx.put(f"{router}/api", json={"prompts": [PROMPT], "tokens_to_generate": 3}, timeout=60).json()
    assert len(answer["segments"][0]) == 3


def test_streams_pass(router: str, offline: LLM) -> None:
    output = offline.generate(PROMPT, GenerationParams(max_tokens=12))[0]
    response = complete(router, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == output.text
    assert [exit for chunk in chunks for choice in chunk["choices"] for exit in choice["exit_layers"]] == [6] * 12


def test_refusals_pass(router: str, workers: list[RunningServer]) -> None:
    """400 with its words; 429 with the time to wait, when both workers have all they take."""
    refused = complete(router, exit_thresholds=2)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "exit_thresholds"
    with ThreadPoolExecutor(10) as pool:
        responses = list(pool.map(lambda _: complete(router, max_tokens=240), range(10)))
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    busy = next(response for response in responses if response.status_code == 429)
    assert busy.json()["error"]["type"] == "rate_limit_error" and int(busy.headers["retry-after"]) >= 1
    assert len({response.json()["choices"][0]["text"] for response in responses if response.status_code == 200}) == 1


def test_a_dead_worker_is_done_without(router: str, workers: list[RunningServer], offline: LLM) -> None:
    """The last test here: one worker is killed."""
    workers[0].process.send_signal(signal.SIGKILL)
    workers[0].process.wait()
    output = offline.generate(PROMPT, GenerationParams(max_tokens=12))[0]
    for _ in range(6):
        response = complete(router)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == output.text
