"""Servers for loads, and what their processes take of the machine."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from benchmarks.serving_client import Address
from tests.server.serving import RunningServer, start_server

_SECONDS_TO_START = 180.0

# Beside the server, for counting: on SIGUSR1 it says how many tasks its event loop has.
_COUNTING_LAUNCHER = """
import asyncio, runpy, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("tasks:", len(asyncio.all_tasks()), file=sys.stderr, flush=True))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server:
    """A running server of this package."""

    def __init__(self, running: RunningServer) -> None:
        self.running = running
        self.address = Address.of(running.url)
        self.http_process = psutil.Process(running.process.pid)
        (engine_id, *_) = self.children
        self.engine_process = psutil.Process(engine_id)

    @property
    def children(self) -> list[int]:
        """Ids of the engine's process, and of the ranks below it."""
        return self.running.children()

    def cpu_seconds(self) -> tuple[float, float]:
        """(HTTP process, engine's process), of their whole lives."""
        return cpu_seconds(self.http_process), cpu_seconds(self.engine_process)

    def num_tasks(self) -> int:
        """Of the event loop; for servers that count. Raises AssertionError if it does not answer."""
        number = len(self._counts())
        self.http_process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while len(self._counts()) == number:
            assert time.monotonic() < deadline, "the server's event loop does not say how many tasks it has"
            time.sleep(0.01)
        return int(self._counts()[-1])

    def _counts(self) -> list[str]:
        return re.findall(r"^tasks: (\d+)$", self.running.output, re.MULTILINE)


@contextmanager
def serve(checkpoint: str | Path, *flags: object, counts_tasks: bool = False) -> Iterator[Server]:
    """A server of this package that is ready. counts_tasks: it can say how many tasks it has."""
    launcher = [sys.executable, "-c", _COUNTING_LAUNCHER] if counts_tasks else None
    with start_server(Path(checkpoint), *flags, launcher=launcher) as running:
        running.wait_for("^ready: ", _SECONDS_TO_START)
        yield Server(running)


@contextmanager
def serve_transformers(folder: Path, *flags: str) -> Iterator[Address]:
    """`transformers serve` over a folder of Hugging Face, ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = Address("127.0.0.1", free.getsockname()[1])
    program = str(Path(sys.executable).parent / "transformers")
    words = [program, "serve", str(folder), *"--device cpu --dtype float32 --port".split(), str(address.port), *flags]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _wait_until_healthy(process, address)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_healthy(process: subprocess.Popen, address: Address) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://{address.host}:{address.port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"`transformers serve` did not become ready (its status is {process.poll()})")


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time that a process has taken."""
    times = process.cpu_times()
    return times.user + times.system
