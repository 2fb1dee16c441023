"""The server from start to end: bind the port, load the model, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.protocol import ExitDescription
from megatron.early_exit.server.app import build_app
from megatron.early_exit.server.async_engine import AsyncEngine
from megatron.early_exit.server.config import RequestLimits, ServerConfig
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.loaded_model import LoadedModel
from megatron.early_exit.server.metrics import ServerMetrics
from megatron.early_exit.server.middleware import is_loopback, protect
from megatron.early_exit.server.protocol import deadline_protocol

log = logging.getLogger(__name__)

STATUS_ENGINE_FAILED = 1

_NUM_OTHER_FILES = 256
"""That this process may have open beside connections."""
_SECONDS_FOR_LAST_RESPONSES = 5.0
"""To be written when nothing is computed any more."""


class _HttpServer(uvicorn.Server):
    """uvicorn, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Ending:
    """Signals that the server is to end: the first one lets requests finish, the second one does not."""

    def __init__(self) -> None:
        self.begins, self.is_urgent = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._take_signal)

    def _take_signal(self) -> None:
        (self.is_urgent if self.begins.is_set() else self.begins).set()


async def serve(config: ServerConfig) -> int:
    """Serve until a signal says that it is over. Returns the exit status: 1 if the engine has ended by itself.

    Raises OSError if the port is taken, ValueError if the settings do not suit this machine or the model, and what
    `AsyncEngine.start` raises."""
    _allow_connections(config.limits)
    listener = _bind(config.host, config.port)
    warn_if_open(config)
    metrics = ServerMetrics()
    engine = AsyncEngine(config.engine, config.limits.max_waiting, metrics)
    metrics.watch(engine)
    context = ServerContext(config, engine, metrics)
    http = _HttpServer(uvicorn.Config(
        protect(build_app(context), context), http=deadline_protocol(config.limits), ws="none",
        log_config=None, access_log=False, server_header=False, lifespan="off", proxy_headers=False,
        timeout_keep_alive=config.limits.keep_alive_seconds,
    ))  # fmt: skip
    end = _Ending()
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    beginning_to_end = asyncio.create_task(end.begins.wait())
    running = asyncio.create_task(_load_and_run(context, _url(listener, config.host)))
    try:
        await asyncio.wait({serving, beginning_to_end, running}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        await _drain(context, running, end.is_urgent)
        if running.done():
            running.result()
        return 0
    except ExecutorError as error:
        print(f"the server ends: {error}", file=sys.stderr, flush=True)
        return STATUS_ENGINE_FAILED
    finally:
        await engine.close()
        running.cancel()
        http.should_exit = True
        await asyncio.wait({serving}, timeout=0 if end.is_urgent.is_set() else _SECONDS_FOR_LAST_RESPONSES)


async def _load_and_run(context: ServerContext, url: str) -> None:
    print(f"loading {context.config.engine.path}; {url}/health says when it is ready", file=sys.stderr, flush=True)
    model = await context.engine.start()
    try:
        checks = model.client.checks
        checks.check(checks.as_certified(context.config.defaults))
    except ValueError as error:
        raise ValueError(f"requests could not be answered with the defaults of the flags: {error}") from error
    # A full collection would look at all that has been imported, and nobody is served meanwhile.
    gc.collect()
    gc.freeze()
    print(_in_words(model, context.model_name), f"ready: {url}", sep="\n", file=sys.stderr, flush=True)
    await context.engine.run()


async def _drain(context: ServerContext, running: asyncio.Task[None], is_urgent: asyncio.Event) -> None:
    """Take nothing new, and give what runs the time to finish."""
    engine, seconds = context.engine, context.config.drain_seconds
    engine.is_draining = True
    if engine.num_admitted:
        print(f"ending; {engine.num_admitted} answers may take {seconds:g} seconds", file=sys.stderr, flush=True)
    waiting = [asyncio.create_task(is_urgent.wait()), asyncio.create_task(_until_idle(engine)), running]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting[:2]:
            task.cancel()


async def _until_idle(engine: AsyncEngine) -> None:
    while engine.num_admitted:
        await asyncio.sleep(0.05)


def _exit_in_words(one: ExitDescription) -> str:
    return str(one.layer_number) if one.use == "both" else f"{one.layer_number} ({one.use})"


def _in_words(model: LoadedModel, name: str) -> str:
    ready = model.ready
    exits = ", ".join(_exit_in_words(one) for one in ready.description.exits) or "none"
    lines = [
        f"model {name}: {ready.checkpoint}, {ready.description.num_layers} layers, exits {exits}",
        f"keys and values: {ready.memory}",
    ]
    if levels := [f"{one.level:g}" for one in ready.certificates.certified]:
        lines.append(f"certified levels of early exit: {', '.join(levels)}")
    if ready.certificates.mismatches:
        lines.append(f"certificates that do not hold: {'; '.join(ready.certificates.mismatches)}")
    if ready.description.num_stages > 1:
        lines.append(f"pipeline stages: {ready.stages}")
    return "\n".join(lines)


def _allow_connections(limits: RequestLimits) -> None:
    """Let this process have a file open for each connection. Raises ValueError if the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + _NUM_OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(
                f"--max-connections {limits.max_connections} needs {needed} open files, and this process may have "
                f"{hard} (ulimit -n); lower the flag or raise the limit"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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


def warn_if_open(config: ServerConfig) -> None:
    """Say so if other machines reach the server and no key is asked for."""
    if not config.api_keys and not is_loopback(config.host):
        log.warning("everybody who reaches --host %s may use this server; --api-key-file asks for a key", config.host)


def _url(listener: socket.socket, host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
