"""The server from start to end: bind the port, load the model, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.server.app import build_app
from megatron.early_exit.server.async_engine import AsyncEngine, LoadedModel
from megatron.early_exit.server.config import ServerConfig
from megatron.early_exit.server.context import ServerContext

log = logging.getLogger(__name__)

STATUS_ENGINE_FAILED = 1


class _HttpServer(uvicorn.Server):
    """uvicorn, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: ServerConfig) -> int:
    """Serve until a signal says that it is over. Returns the exit status: 1 if the engine has ended by itself.

    Raises OSError if the port is taken, and what `AsyncEngine.start` raises."""
    listener = _bind(config.host, config.port)
    engine = AsyncEngine(config.engine, config.limits.max_waiting)
    context = ServerContext(config, engine)
    http = _HttpServer(uvicorn.Config(
        build_app(context), log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_keep_alive=config.limits.keep_alive_seconds,
    ))  # fmt: skip
    told_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told_to_end.set)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    ending = asyncio.create_task(told_to_end.wait())
    running = asyncio.create_task(_load_and_run(context, _url(listener, config.host)))
    try:
        await asyncio.wait({serving, ending, running}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        await _drain(context)
        return 0
    except ExecutorError as error:
        print(f"the server ends: {error}", file=sys.stderr, flush=True)
        return STATUS_ENGINE_FAILED
    finally:
        await engine.close()
        running.cancel()
        http.should_exit = True
        await asyncio.wait({serving}, timeout=5)


async def _load_and_run(context: ServerContext, url: str) -> None:
    print(f"loading {context.config.engine.path}; {url}/health says when it is ready", file=sys.stderr, flush=True)
    model = await context.engine.start()
    print(_in_words(model, context.model_name), f"ready: {url}", sep="\n", file=sys.stderr, flush=True)
    await context.engine.run()


async def _drain(context: ServerContext) -> None:
    """Give what runs the time to finish."""
    context.is_draining = True
    deadline = asyncio.get_running_loop().time() + context.config.drain_seconds
    while context.engine.num_admitted and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)


def _in_words(model: LoadedModel, name: str) -> str:
    ready = model.ready
    exits = ", ".join(str(one.layer_number) for one in ready.description.exits) or "none"
    lines = [
        f"model {name}: {ready.checkpoint}, {ready.description.num_layers} layers, exits {exits}",
        f"keys and values: {ready.memory}",
    ]
    if ready.description.num_stages > 1:
        lines.append(f"pipeline stages: {ready.stages}")
    return "\n".join(lines)


def _bind(host: str, port: int) -> socket.socket:
    """Raises OSError that says what to do if the port cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            f"--host {host} --port {port} cannot be bound ({error.strerror or error}); choose another port, or 0 for "
            "any free one"
        ) from error


def _url(listener: socket.socket, host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
