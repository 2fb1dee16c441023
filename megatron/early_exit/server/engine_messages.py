"""What the HTTP process and the engine's process tell each other (MessagePack; one message for each step)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.certificates import NO_CERTIFICATES, Certificates
from megatron.early_exit.inference.engine.audit import AuditReport
from megatron.early_exit.inference.params import ExitScore, GenerationParams
from megatron.early_exit.inference.protocol import StageLoad, WorkerDescription
from megatron.early_exit.inference.results import GeneratedToken, RequestResult


class ProcessSettings(msgspec.Struct, frozen=True):
    """What the engine's process is told on its standard input."""

    endpoint: str
    """Of the HTTP process's socket."""
    parent: int
    """Process id of the HTTP process."""
    is_verbose: bool
    path: str
    settings: dict[str, Any]
    """As of `EngineConfig`."""


# To the engine.


class Add(msgspec.Struct, frozen=True, tag=True):
    """Queue a request for an answer. It has been checked."""

    request_id: int
    prompt_ids: list[int]
    params: GenerationParams
    sample_index: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request; nothing more is said of it."""

    request_id: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """A stop string was found in the first `num_tokens` tokens; the result is that of `Engine.stop`."""

    request_id: int
    num_tokens: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answer with `Pong`, between two steps: the answer proves progress."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End now."""


ToEngine = Add | Cancel | Stop | Ping | Shutdown


# From the engine.


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    description: WorkerDescription
    exits: ExitConfig
    ends: tuple[int, ...]
    """Ids that end an answer."""
    tokenizer: TokenizerConfig
    calibrated: tuple[ExitScore, ...]
    """Scores with which exits can be planned."""
    checkpoint: str
    """Folder that was loaded."""
    iteration: int
    memory: str
    """For keys and values, in words."""
    stages: str
    """Which layers and exits each pipeline stage has, in words."""
    certificates: Certificates = NO_CERTIFICATES
    """Those of the checkpoint."""
    no_probes: str = ""
    """Why the model has no probes, if it has none."""


class RequestEvent(msgspec.Struct, frozen=True):
    """What a step did for one request: `Event`."""

    request_id: int
    tokens: list[GeneratedToken]
    result: RequestResult | None = None


class EngineLoad(msgspec.Struct, frozen=True):
    """How busy the engine is."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of all positions of all slots that running requests have filled."""


class StepEvents(msgspec.Struct, frozen=True, tag=True):
    """All that a step brought."""

    events: list[RequestEvent]
    load: EngineLoad


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Ping`; also the first word of the process, before it loads anything."""

    stages: tuple[StageLoad, ...] = ()
    audits: tuple[AuditReport, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last message of an engine that cannot go on."""

    error: str
    kind: Literal["ValueError", "OSError", "other"] = "other"
    """ValueError, OSError: the user can mend it, and the text is one sentence."""


FromEngine = Ready | StepEvents | Pong | Failed
