"""What the engine's process does before it is ready."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.server import engine_process
from megatron.early_exit.server.engine_messages import Pong, Ready
from tests.reference_checkpoint import decoding_config, reference_description, reference_tensors


def test_costs_are_measured_without_exits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts from text depend on them as well."""
    cfg = decoding_config(exit_layer_nums=(), exit_layer_weight=())
    tokenizer = TokenizerConfig("NullTokenizer", None, 93)
    write_checkpoint(
        tmp_path, replace(reference_description(cfg), dtype="fp32", tokenizer=tokenizer), reference_tensors(cfg)
    )
    sent, engines = [], []

    class Channel:
        def __init__(self, endpoint: str) -> None: ...

        def send(self, message: Any) -> None:
            sent.append(type(message))

        def close(self) -> None: ...

    class Loop:
        def __init__(self, engine: Engine, channel: Channel) -> None:
            engines.append(engine)

        def run(self) -> None: ...

    monkeypatch.setattr(engine_process, "_Channel", Channel)
    monkeypatch.setattr(engine_process, "_EngineLoop", Loop)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = engine_process.ProcessSettings(
        endpoint="", parent=0, is_verbose=False, path=str(tmp_path), settings={"max_requests": 1}
    )
    assert engine_process._run(settings) == 0
    assert sent == [Pong, Ready]
    assert engines[0]._planner.measured_costs is not None
