"""A server whose engine says what a test has written down, token by token: all but the model is real, HTTP included."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.inference.protocol import ExitDescription, WorkerDescription
from megatron.early_exit.inference.results import (
    FinishReason,
    GeneratedToken,
    PromptToken,
    RequestResult,
    Statistics,
)
from megatron.early_exit.inference.text_engine import TextEngine
from megatron.early_exit.server.app import build_app
from megatron.early_exit.server.async_engine import AsyncEngine
from megatron.early_exit.server.config import EngineConfig, ServerConfig
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.engine_client import EngineClient
from megatron.early_exit.server.engine_messages import Add, Cancel, Ready, RequestEvent, Stop, ToEngine
from megatron.early_exit.server.loaded_model import LoadedModel
from megatron.early_exit.server.metrics import ServerMetrics

NUM_LAYERS, EXIT, NUM_POSITIONS = 6, 2, 8192
_STATISTICS = Statistics(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)


def token(number: int, **changes: object) -> GeneratedToken:
    """A token of the final head."""
    return GeneratedToken(**{
        "token": number, "exit_layer": NUM_LAYERS, "is_final": True, "confidence": 0.5, "log_prob": -0.5, **changes,
    })  # fmt: skip


@dataclass
class Script:
    """What the engine does for every request that is added."""

    steps: Sequence[Sequence[GeneratedToken]] = ()
    ending: FinishReason = "max_tokens"
    error: str | None = None
    prompt: Callable[[Sequence[int]], Sequence[PromptToken]] = lambda ids: ()
    """With echo: log-probabilities of the prompt."""
    cancelled: list[int] = field(default_factory=list)
    """Requests that the server has cancelled."""


class _ScriptedEngine(AsyncEngine):
    """Takes messages as the engine's process would, and sends what the script says."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer, script: Script) -> None:
        super().__init__(config, max_waiting=64)
        self._script, self._running = script, {}
        exits = (ExitDescription(EXIT, EXIT, False),)
        model = WorkerDescription(NUM_LAYERS, 48, tokenizer.vocab_size, exits, 4, NUM_POSITIONS)
        ready = Ready(
            description=model, exits=ExitConfig((EXIT,)), ends=(tokenizer.eod,), tokenizer=DataConfig(),
            calibrated=(), checkpoint="scripted", iteration=0, memory="", stages="",
        )  # fmt: skip
        client = EngineClient(ready, self._take)
        self.model = LoadedModel(ready, tokenizer, client, TextEngine(client, tokenizer))

    def _take(self, message: ToEngine) -> None:
        match message:
            case Add():
                task = asyncio.get_running_loop().create_task(self._play(message))
                self._running[message.request_id] = task, []
            case Cancel():
                self._running.pop(message.request_id)[0].cancel()
                self._script.cancelled.append(message.request_id)
            case Stop():
                task, said = self._running.pop(message.request_id)
                task.cancel()
                result = self._result(message.request_id, said, "stop").stopped_after(message.num_tokens)
                asyncio.get_running_loop().call_soon(self._send, RequestEvent(message.request_id, [], result))

    async def _play(self, message: Add) -> None:
        script, number = self._script, message.request_id
        said = self._running[number][1]
        for index, step in enumerate(script.steps, start=1):
            await asyncio.sleep(0)
            said += step
            if index < len(script.steps):
                self._send(RequestEvent(number, list(step)))
        last = list(script.steps[-1]) if script.steps else []
        prompt = script.prompt(message.prompt_ids) if message.params.echo else ()
        result = self._result(number, said, script.ending, prompt)
        self._send(RequestEvent(number, last, result))

    def _result(
        self, number: int, said: Sequence[GeneratedToken], ending: FinishReason, prompt: Sequence[PromptToken] = ()
    ) -> RequestResult:
        error = self._script.error if ending == "error" else None
        return RequestResult(number, tuple(said), ending, _STATISTICS, (EXIT,), NUM_LAYERS, tuple(prompt), error)

    def _send(self, event: RequestEvent) -> None:
        self._deliver(self.model.text_engine.take(self.model.client.take([event])))


class ScriptedServer:
    """A server in a thread."""

    def __init__(self, tokenizer: Tokenizer, **config: object) -> None:
        self.tokenizer, self.script = tokenizer, Script()
        self._config = ServerConfig(EngineConfig("scripted"), **config)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.engine: AsyncEngine | None = None
        self.http: uvicorn.Server | None = None

    def play(self, script: Script) -> None:
        """What it says from now on."""
        self.engine._script = self.script = script

    async def serve(self) -> None:
        """In an event loop."""
        self.engine = _ScriptedEngine(self._config.engine, self.tokenizer, self.script)
        app = build_app(ServerContext(self._config, self.engine, ServerMetrics()))
        self.http = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        await self.http.serve(sockets=[self._listener])


@contextmanager
def scripted_server(folder: Path, save_tokenizer: Callable[[Path], None], **config: object) -> Iterator[ScriptedServer]:
    """A server in a thread, with the tokenizer that is saved. config: fields of `ServerConfig`."""
    save_tokenizer(folder)
    server = ScriptedServer(build_tokenizer(DataConfig(tokenizer_model=str(folder))), **config)
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(asyncio.run, server.serve())
        while server.http is None or not server.http.started:
            if serving.done():
                serving.result()
            time.sleep(0.01)
        try:
            yield server
        finally:
            server.http.should_exit = True
            serving.result(10)
