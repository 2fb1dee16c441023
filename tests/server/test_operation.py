"""What operates a server needs: health, how it starts, how it ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx

from tests.server.serving import RunningServer, start_server


def test_a_server_that_serves_is_ready(server: RunningServer) -> None:
    for path in ("/health", "/health/ready"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()["status"]) == (200, "ready")
        assert httpx.head(server.url + path).status_code == 200
    assert httpx.get(f"{server.url}/health/live").json()["status"] == "live"


def test_health_before_the_model_is_there_and_after_the_engine_has_died(checkpoint: Path) -> None:
    """Row 30: a dead engine never leaves health at 200."""
    with start_server(checkpoint) as running:
        loading = httpx.get(f"{running.url}/health")
        assert loading.status_code == 503 and "loaded" in loading.json()["reason"]
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        running.wait_until_ready()
        assert running.is_ready()
        (engine,) = running.children()
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        assert running.process.wait(10) == 1
        print("took", time.monotonic() - killed)
        assert "signal 9" in running.output
