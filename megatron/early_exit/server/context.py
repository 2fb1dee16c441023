"""What the parts of the server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron.early_exit.server.async_engine import AsyncEngine, LoadedModel
from megatron.early_exit.server.config import ServerConfig
from megatron.early_exit.server.errors import NotReady


@dataclass
class ServerContext:
    """The settings, the engine, and whether requests are taken."""

    config: ServerConfig
    engine: AsyncEngine
    is_draining: bool = False
    """Told to end: what runs may finish, nothing new is taken."""
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def model_name(self) -> str:
        """In the OpenAI API."""
        return self.config.served_model_name or Path(self.config.engine.path).resolve().name

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready and not self.is_draining

    def ready_model(self) -> LoadedModel:
        """The model. Raises NotReady."""
        if self.is_draining:
            raise NotReady("the server is about to end; send the request to another one", retry_after=5)
        return self.engine.ready_model()
