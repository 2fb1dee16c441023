"""One checkpoint, one server and one model without a server for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.early_exit.inference.llm import LLM
from tests.server import models
from tests.server.serving import RunningServer, start_server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `models.chat_model`."""
    return models.chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """One that is ready, with four slots; tests must leave it as it was. What it answers without log-probabilities
    comes from certified heads, which `offline` does not use."""
    with start_server(checkpoint, "--max-requests", 4, "--certified-head", "on") as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="session")
def offline(checkpoint: Path) -> LLM:
    """The same model with no server: what it answers is right."""
    return LLM.load(str(checkpoint), max_requests=4)
