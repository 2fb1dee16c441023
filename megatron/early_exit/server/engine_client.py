"""The engine as the HTTP process sees it (an `AnswerEngine`), over messages to its process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from megatron.early_exit.inference.engine.engine import Event
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import RequestResult, Statistics
from megatron.early_exit.server.engine_messages import Add, Cancel, Ready, RequestEvent, Stop, ToEngine

_UNKNOWN = Statistics(0, 0, 0, 0, 0, 0.0, None, 0.0)


class EngineClient:
    """Sends requests and takes events. It never waits: what the engine makes of a message comes as an event."""

    def __init__(self, ready: Ready, send: Callable[[ToEngine], None]) -> None:
        self.description = ready.description
        self.checks = RequestChecks(
            ready.description, ready.exits, ready.ends, ready.calibrated, ready.certificates, ready.no_probes
        )
        self._send = send
        self._request_ids = itertools.count()
        self._open: set[int] = set()

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def add(self, prompt_ids: Sequence[int], params: GenerationParams, *, seed_offset: int = 0) -> int:
        """As `Engine.add`, for a request that has been checked (`checks.check_generation`): for long prompts that takes
        too long here. How many wait is the caller's business as well."""
        request_id = next(self._request_ids)
        self._open.add(request_id)
        self._send(Add(request_id, list(prompt_ids), params, seed_offset))
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request; no event tells of it any more."""
        if request_id in self._open:
            self._open.remove(request_id)
            self._send(Cancel(request_id))

    def stop(self, request_id: int, num_tokens: int) -> None:
        """As `Engine.stop`; the result comes with an event."""
        if request_id in self._open:
            self._send(Stop(request_id, num_tokens))

    def take(self, events: Sequence[RequestEvent]) -> list[Event]:
        """Events of requests that are open still."""
        taken = [Event(one.request_id, one.tokens, one.result) for one in events if one.request_id in self._open]
        self._open -= {event.request_id for event in taken if event.result is not None}
        return taken

    def fail_all(self, error: str) -> list[Event]:
        """The end of every request, with an error: the engine has ended."""
        num_layers = self.description.num_layers
        failed = [
            Event(one, [], RequestResult(one, (), "error", _UNKNOWN, (), num_layers, error=error))
            for one in sorted(self._open)
        ]
        self._open.clear()
        return failed
