"""Clients that leave, too many of them, processes that die or hang: by real HTTP, with real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import models
from tests.server.serving import RunningServer, start_server

NUM_POSITIONS = 8192
ENDLESS = {"prompt": "a small model", "max_tokens": 8000, "temperature": 0, "ignore_eos": True}
"""Takes far longer than any test waits."""
LONG_PROMPTS = {"prompt": [[5 + number] * 8000 for number in range(6)], "max_tokens": 1}
SHORT = {"prompt": "reads lines", "max_tokens": 2, "temperature": 0}
HANG = 15
"""Seconds: a rank that imports torch in its first pass on a busy machine is no hung one."""
SECONDS = 20.0
"""In which whatever is to happen at once happens, on a machine with other things to do."""


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.chat_model(tmp_path_factory.mktemp("long"), max_positions=NUM_POSITIONS)


@pytest.fixture(scope="module")
def busy(long_checkpoint: Path) -> Iterator[RunningServer]:
    """One slot, and room for seven answers that wait."""
    flags = ["--max-requests", 1, "--max-length", NUM_POSITIONS, "--max-waiting", 7, "--reader-seconds", 2]
    with start_server(long_checkpoint, *flags) as server:
        yield server.wait_until_ready()


class Request(contextlib.AbstractContextManager):
    """A request in a connection of its own, which is closed when it is left, whatever has come."""

    def __init__(self, server: RunningServer, body: dict[str, Any], receive_buffer: int | None = None) -> None:
        url, content = httpx.URL(server.url), json.dumps(body).encode()
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(60)
        self._socket.connect((url.host, url.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        self.received = b""

    def read_until(self, part: bytes) -> None:
        while part not in self.received:
            more = self._socket.recv(1 << 16)
            assert more, f"the connection was closed after {self.received[-500:]}"
            self.received += more

    def read_to_end(self) -> str:
        with contextlib.suppress(ConnectionResetError):
            while more := self._socket.recv(1 << 16):
                self.received += more
        return self.received.decode()

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def ask(server: RunningServer, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={**SHORT, **changes}, timeout=60)


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gauge(server: RunningServer, name: str) -> float:
    """A gauge whose name ends so."""
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.split("{")[0].split(" ")[0].endswith(name):
            return float(line.split()[-1])
    raise AssertionError(f"no {name}")


def load(server: RunningServer) -> tuple[float, float]:
    """(answers that run, that wait)"""
    return gauge(server, "num_requests_running"), gauge(server, "num_requests_waiting")


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("state", ["decoding", "prefill", "queued"])
def test_a_client_that_leaves_frees_its_place_at_once(busy: RunningServer, state: str, is_streamed: bool) -> None:
    """Rows 5 and 6."""
    body = {**(LONG_PROMPTS if state == "prefill" else ENDLESS), "stream": is_streamed}
    with contextlib.ExitStack() as others:
        if state == "queued":
            running = others.enter_context(Request(busy, {**ENDLESS, "stream": True}))
            running.read_until(b"data: ")
        with Request(busy, body):
            expected = {"decoding": (1, 0), "prefill": (1, 5), "queued": (1, 1)}[state]
            until(lambda: load(busy) == expected)
            if state == "decoding":
                time.sleep(0.3)
        until(lambda: load(busy) == ((1, 0) if state == "queued" else (0, 0)), 3)
    started = time.monotonic()
    answer = ask(busy)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 2)
    assert time.monotonic() - started < SECONDS


def test_overload_is_refused_and_service_goes_on(busy: RunningServer) -> None:
    """Row 24: n counts n; what is refused keeps no memory."""
    with Request(busy, {**ENDLESS, "stream": True}) as running:
        running.read_until(b"data: ")
        with Request(busy, {**ENDLESS, "n": 7, "temperature": 1}):
            until(lambda: load(busy) == (1, 7))
            before = resident_megabytes(busy)
            with httpx.Client(base_url=busy.url, timeout=60) as client, ThreadPoolExecutor(8) as pool:
                body = {**SHORT, "prompt": "a small model " * 2000}
                refused = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(200)))
            assert {one.status_code for one in refused} == {429}
            assert all(1 <= int(one.headers["Retry-After"]) <= 60 for one in refused)
            assert refused[0].json()["error"]["type"] == "rate_limit_error"
            assert resident_megabytes(busy) - before < 100
            assert busy.is_ready()
    until(lambda: load(busy) == (0, 0))
    assert ask(busy).status_code == 200


def resident_megabytes(server: RunningServer) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_a_long_prompt_gets_its_turn_under_steady_short_arrivals(busy: RunningServer) -> None:
    """Row 35: with one slot it waits for those that came before it alone."""
    is_over = threading.Event()

    def arrive() -> int:
        count = 0
        while not is_over.is_set():
            answer = ask(busy)
            assert answer.status_code in (200, 429)
            count += answer.status_code == 200
        return count

    with ThreadPoolExecutor(4) as pool:
        arrivals = [pool.submit(arrive) for _ in range(4)]
        try:
            until(lambda: load(busy)[1] > 0)
            started = time.monotonic()
            assert ask(busy, prompt=[7] * 2000).status_code == 200
            assert time.monotonic() - started < SECONDS
        finally:
            is_over.set()
        assert sum(one.result() for one in arrivals) > 4


def test_a_client_that_reads_nothing_loses_its_request_and_delays_nobody(busy: RunningServer) -> None:
    """Row 26."""
    details = {"return_exit_details": True, "logprobs": 20, "return_token_ids": True, "stream": True}
    with Request(busy, {**ENDLESS, **details}, receive_buffer=4096) as slow:
        slow.read_until(b"data: ")
        until(lambda: load(busy) == (0, 0))
        assert ask(busy).status_code == 200


def test_the_engine_ends_with_the_http_process(busy: RunningServer) -> None:
    """The last test of this server."""
    children = busy.children()
    with Request(busy, {**ENDLESS, "stream": True}) as running:
        running.read_until(b"data: ")
        busy.process.kill()
        until(lambda: all(has_ended(child) for child in children))
    busy.process.wait()


def has_ended(process: int) -> bool:
    """Also of one that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# Engines and ranks.


def error_of_stream(text: str) -> str:
    """The message of a stream that ends with an error, and with nothing behind it."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] != "[DONE]", "the stream has not failed"
    assert all("error" not in json.loads(event) for event in events[:-1])
    return json.loads(events[-1])["error"]["message"]


def interrupted(server: RunningServer, process: int, what: signal.Signals) -> tuple[str, httpx.Response, float]:
    """(how a stream ends, the response to a whole request, seconds until both have come) when a process gets a signal
    in mid-request."""
    with ThreadPoolExecutor(1) as pool, Request(server, {**ENDLESS, "stream": True}) as running:
        whole = pool.submit(ask, server, **ENDLESS)
        running.read_until(b"data: ")
        until(lambda: sum(load(server)) == 2)
        os.kill(process, what)
        started = time.monotonic()
        text = running.read_to_end()
        return error_of_stream(text), whole.result(), time.monotonic() - started


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


def ranks_of(server: RunningServer) -> list[int]:
    return sorted(child for child in server.children() if "worker_process" in command_of(child))


@pytest.mark.slow
def test_an_engine_whose_processes_die_or_hang_is_started_again(long_checkpoint: Path) -> None:
    """Row 23: streams end with an error; whole answers are errors."""
    flags = ["--tensor-model-parallel-size", 2, "--max-requests", 2, "--max-length", NUM_POSITIONS]
    with start_server(long_checkpoint, *flags, "--worker-timeout", HANG, "--restart-workers") as server:
        for choose, what, words in (
            (lambda: ranks_of(server)[1], signal.SIGKILL, "SIGKILL"),
            (lambda: ranks_of(server)[0], signal.SIGSTOP, f"made no progress for {HANG} seconds"),
        ):
            until(server.is_ready, 90)
            answer = ask(server)
            assert answer.status_code == 200, answer.text + server.output
            processes = server.children()
            assert len(processes) == 3
            message, whole, seconds = interrupted(server, choose(), what)
            assert words in message
            assert whole.status_code in (500, 503) and words in whole.json()["error"]["message"]
            assert seconds < SECONDS + (HANG if what is signal.SIGSTOP else 0)
            until(lambda gone=processes: all(map(has_ended, gone)))
            assert server.process.poll() is None
        loading = server.children()
        assert (server.is_ready(), ask(server).status_code) == (False, 503)
        assert server.end(SECONDS) == 0
        until(lambda: all(map(has_ended, loading)))


@pytest.mark.slow
def test_a_stage_that_dies_while_nobody_asks_anything_ends_the_server(long_checkpoint: Path) -> None:
    """Row 30."""
    with start_server(long_checkpoint, "--pipeline-model-parallel-size", 2, "--max-requests", 2) as server:
        server.wait_until_ready()
        processes = server.children()
        assert len(processes) == 3
        os.kill(ranks_of(server)[0], signal.SIGKILL)
        assert server.process.wait(SECONDS) == 1
        until(lambda: all(map(has_ended, processes)))
        assert "SIGKILL" in server.output


@pytest.mark.slow
def test_a_dead_stage_of_torchrun_ends_all(long_checkpoint: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--pipeline-model-parallel-size", 2, "--max-requests", 2, "--max-length", NUM_POSITIONS]
    with start_server(long_checkpoint, *flags, launcher=launcher) as server:
        server.wait_until_ready()
        assert ask(server).status_code == 200
        processes = server.children()
        programs = [one for one in processes if "run_text_generation_server" in command_of(one)]
        (rank,) = (one for one in programs if b"RANK=1" in Path(f"/proc/{one}/environ").read_bytes().split(b"\0"))
        with Request(server, {**ENDLESS, "stream": True}) as running:
            running.read_until(b"data: ")
            os.kill(rank, signal.SIGKILL)
            assert error_of_stream(running.read_to_end())
        assert server.process.wait(30) != 0
        until(lambda: all(map(has_ended, processes)))


def test_ctrl_c_while_the_model_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    with start_server(checkpoint, "--tensor-model-parallel-size", 2, environment={"TMPDIR": str(tmp_path)}) as server:
        server.wait_for("loading")
        until(lambda: len(server.children()) == 3, 60)
        processes = server.children()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(SECONDS) == 0
        until(lambda: all(map(has_ended, processes)))
        assert "Traceback" not in server.output
    assert not list(tmp_path.glob("early_exit_*"))
