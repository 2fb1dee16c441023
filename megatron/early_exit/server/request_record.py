"""What is noted of the HTTP request that a task serves, for the access log."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from megatron.early_exit.server.mailbox import Answers


@dataclass
class RequestRecord:
    """One HTTP request."""

    request_id: str
    """The client's, or a new one."""
    answers: list[Answers] = field(default_factory=list)
    """To its prompts."""


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)
"""Of the request that this task serves, or was started for; None outside of requests."""
