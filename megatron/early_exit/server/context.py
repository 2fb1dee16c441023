"""What the parts of the server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron.early_exit.server.async_engine import AsyncEngine
from megatron.early_exit.server.config import ServerConfig
from megatron.early_exit.server.loaded_model import LoadedModel
from megatron.early_exit.server.metrics import ServerMetrics


@dataclass
class ServerContext:
    """The settings, the engine, and what is counted."""

    config: ServerConfig
    engine: AsyncEngine
    metrics: ServerMetrics
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def model_name(self) -> str:
        """In the OpenAI API."""
        return self.config.served_model_name or Path(self.config.engine.path).resolve().name

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready

    def ready_model(self) -> LoadedModel:
        """The model. Raises NotReady."""
        return self.engine.ready_model()
