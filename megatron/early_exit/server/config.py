"""Settings of the server: parsed once by the command line, then passed to what needs them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.early_exit.inference.params import GenerationParams


@dataclass(frozen=True)
class RequestLimits:
    """What one request, and all of them together, may take."""

    max_waiting: int = 256
    """Answers that may wait for a slot; a request that would have more wait is told to try again (429)."""
    max_connections: int = 1024
    """Open at once; more are told to try again (503)."""
    max_body_bytes: int = 8 << 20
    """Of one request."""
    max_total_body_bytes: int = 128 << 20
    """Of all requests that have not been answered; more are told to try again (429)."""
    max_prompts: int = 128
    """In one request."""
    max_answers: int = 256
    """Prompts times n of one request."""
    header_seconds: float = 20.0
    """Until the headers of a request are complete."""
    body_seconds: float = 60.0
    """Until its body is."""
    reader_seconds: float = 60.0
    """That a client may leave what was sent to it unread before its request is cancelled."""
    keep_alive_seconds: int = 120
    """That a connection may be idle between two requests: longer than gateways keep theirs."""

    def __post_init__(self) -> None:
        counts = ("max_connections", "max_body_bytes", "max_total_body_bytes", "max_prompts", "max_answers")
        for name in (*counts, "keep_alive_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting is {self.max_waiting}; it must be 0 or more")
        for name in ("header_seconds", "body_seconds", "reader_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a positive number of seconds")


@dataclass(frozen=True)
class EngineConfig:
    """What the engine's process loads, and how long it may be silent."""

    path: str
    """Folder of checkpoints (--save of the training)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `load_engine` by name: plain values, checked there."""
    worker_timeout: float = 60.0
    """Seconds without progress after which the engine's process, or a worker, counts as dead."""
    restart: bool = False
    """Load the model again when that happens, instead of ending the server."""


@dataclass(frozen=True)
class ServerConfig:
    """Everything that the server is told when it starts."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 5000
    """0: any free one."""
    served_model_name: str | None = None
    """Name of the model in the OpenAI API; default: that of the checkpoint's folder."""
    defaults: GenerationParams = field(default_factory=GenerationParams)
    """Of the fields of early exit (mode, exit_thresholds, exit_layers, max_deferred, plan_exits, exit_score,
    draft_exit, draft_length, speculation), for requests that do not set them."""
    chat_template: str | None = None
    """Template for chats, in place of the tokenizer's."""
    limits: RequestLimits = RequestLimits()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """One of them must come with every request but those for health; none: no key is asked for."""
    allowed_origins: tuple[str, ...] = ()
    """Web sites whose pages may call the server from a browser (CORS); none by default."""
    drain_seconds: float = 30.0
    """Given to running requests when the server is told to end."""
    access_log: bool = True

    def __post_init__(self) -> None:
        if self.served_model_name == "":
            raise ValueError("served_model_name is empty; give a name, or leave it out")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; it must lie between 0 (any free one) and 65535")
        if not 0 <= self.drain_seconds < math.inf:
            raise ValueError(f"drain_seconds is {self.drain_seconds}; it must be a number of seconds, 0 or more")
        if self.chat_template is not None:  # certificates may depend on it
            settings = self.engine.settings | {"chat_template": self.chat_template}
            object.__setattr__(self, "engine", replace(self.engine, settings=settings))
