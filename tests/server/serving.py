"""Servers as processes, as users start them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_START = 60.0


class RunningServer:
    """A server that `start_server` has started: its address, its process, and what it has said."""

    def __init__(self, words: list[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._has_line = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._has_line:
                self.lines.append(line.rstrip("\n"))
                self._has_line.notify_all()
        with self._has_line:
            self._has_line.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = SECONDS_TO_START) -> re.Match:
        """The first line that matches. Raises AssertionError if none comes, or the server ends."""
        deadline = time.monotonic() + seconds
        with self._has_line:
            while True:
                for line in list(self.lines):
                    if match := re.search(pattern, line):
                        return match
                remaining = deadline - time.monotonic()
                assert remaining > 0 and self.process.poll() is None, f"no line {pattern!r} in:\n{self.output}"
                self._has_line.wait(min(remaining, 0.2))

    @property
    def url(self) -> str:
        """Where it listens, known as soon as it has started to load."""
        return self.wait_for(r"(http://\S+?)(/health\b|$)")[1]

    def wait_until_ready(self) -> RunningServer:
        self.wait_for(r"^ready: ")
        return self

    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}/health").status_code == 200

    def children(self) -> list[int]:
        """Processes below it: the engine's, then its ranks'."""
        try:
            return [process.pid for process in psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self, seconds: float = 20.0) -> int:
        """SIGTERM; returns the status. A process that does not end by itself is killed, and that is an error."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def start_server(
    checkpoint: Path, *flags: object, launcher: list[str] | None = None, environment: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server over a checkpoint on a free port, which may still be loading; it is ended afterwards."""
    words = [*(launcher or [sys.executable]), "tools/run_text_generation_server.py", "--load", str(checkpoint)]
    server = RunningServer([*words, "--port", "0", *map(str, flags)], environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end()
