"""The engine in a process of its own: it takes requests from the HTTP process and sends what every step brings.

It runs by itself (`python -m`, its settings on standard input) and ends with the HTTP process. Ranks that share the
model are its children, or those of torchrun.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec
import zmq

from megatron.early_exit.config.checkpoint_files import iteration_of
from megatron.early_exit.inference.engine.engine import Engine, Event
from megatron.early_exit.inference.engine.request import Result
from megatron.early_exit.inference.engine_loading import LoadedEngine, load_engine
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.results import RequestResult, Statistics
from megatron.early_exit.inference.text_engine import request_error
from megatron.early_exit.inference.worker.kv_cache import CacheSize
from megatron.early_exit.platform.command_line import configure_output
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.processes import die_with_parent
from megatron.early_exit.server.engine_messages import (
    Add,
    Cancel,
    EngineLoad,
    Failed,
    FromEngine,
    Ping,
    Pong,
    ProcessSettings,
    Ready,
    RequestEvent,
    Shutdown,
    StepEvents,
    Stop,
    ToEngine,
)

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.25
"""At the workers, while there is nothing to run."""

_NOTHING = Statistics(0, 0, 0, 0, 0, 0.0, None, 0.0)


def main() -> NoReturn:
    """Run the engine with the settings on standard input."""
    settings = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ProcessSettings)
    die_with_parent(settings.parent)
    configure_output(is_verbose=settings.is_verbose)
    # Ctrl-C is for the HTTP process, which tells this one to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    try:
        status = _run(settings)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    sys.stderr.flush()
    os._exit(status)  # libraries take a second to be taken down


def _run(settings: ProcessSettings) -> int:
    channel, loaded, status = _Channel(settings.endpoint), None, 0
    channel.send(Pong())
    signal.signal(signal.SIGTERM, _end_loading)
    try:
        loaded = load_engine(settings.path, join_torchrun=True, **settings.settings)
        loaded.engine.measure_costs()  # with requests there would be no time for it
        # From now on the HTTP process says when it is over: some send SIGTERM to all processes of a service, and the
        # requests that run may finish.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        channel.send(_ready(loaded))
        _EngineLoop(loaded.engine, channel).run()
    except Exception as error:
        log.info("the engine failed", exc_info=True)
        channel.send(_failed(error))  # at once: ending the workers takes its time
        status = 1
    finally:
        if loaded is not None:
            loaded.engine.executor.close()
        channel.close()
    return status


def _end_loading(*_: object) -> NoReturn:
    """End what is being loaded, wherever it is, and the ranks that load it."""
    raise SystemExit(128 + signal.SIGTERM)


def _ready(loaded: LoadedEngine) -> Ready:
    engine, checkpoint = loaded.engine, loaded.checkpoint
    model = engine.description
    return Ready(
        description=model,
        exits=engine.exits,
        ends=tuple(engine.ends),
        tokenizer=checkpoint.description.tokenizer,
        calibrated=tuple(engine.checks.calibrated),
        certificates=engine.checks.certificates,
        no_probes=engine.checks.no_probes,
        checkpoint=str(checkpoint.folder),
        iteration=iteration_of(checkpoint.folder),
        memory=str(CacheSize(model.num_slots, model.num_positions, model.bytes_per_token)),
        stages=checkpoint.stages_in_words,
    )


def _failed(error: Exception) -> Failed:
    if isinstance(error, ValueError | OSError):
        return Failed(in_words(error), "ValueError" if isinstance(error, ValueError) else "OSError")
    return Failed(request_error(error))


class _Channel:
    """This process's end of the link to the HTTP process."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # the engine never waits for the HTTP process
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encode(message))

    def receive(self, seconds: float) -> ToEngine | None:
        """The next message; None if none comes within `seconds`."""
        if seconds and not self._socket.poll(round(1000 * seconds)):
            return None
        try:
            return self._decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self) -> None:
        """Let what was sent arrive."""
        self._socket.close(linger=2000)
        self._context.term()


class _EngineLoop:
    """Takes what has come, runs a step, sends what it brought, and waits only if there is nothing to run."""

    def __init__(self, engine: Engine, channel: _Channel) -> None:
        self._engine, self._channel = engine, channel
        self._ids: dict[int, int] = {}
        """Of the engine, by those of the HTTP process."""
        self._names: dict[int, int] = {}
        """The other way round."""
        self._others: list[RequestEvent] = []
        """Those that no step brings."""
        self._sent_load = EngineLoad()

    def run(self) -> None:
        """Until the HTTP process says that it is over. Raises ExecutorError if the workers have ended."""
        while self._take_messages():
            events = self._others + [self._named(event) for event in self._engine.step()]
            self._others, self._sent_load = [], self._load
            if self._engine.failure is not None:
                # Those that end with it are told by `Failed`, from when on the server is not ready.
                events = [event for event in events if event.result is None or event.result.error is None]
            self._channel.send(StepEvents(events, self._sent_load))
            if self._engine.failure is not None:
                raise ExecutorError(self._engine.failure)

    def _take_messages(self) -> bool:
        """Whether to go on."""
        while True:
            message = self._channel.receive(_SECONDS_BETWEEN_LOOKS if self._is_idle else 0)
            if isinstance(message, Shutdown):
                return False
            if message is not None:
                self._take(message)
            elif self._is_idle:
                self._engine.look_after_workers()
            else:
                return True

    @property
    def _is_idle(self) -> bool:
        """Whether there is nothing to run and nothing to tell."""
        engine = self._engine
        has_work = engine.has_work or engine.audit.has_work
        return not (has_work or engine.failure or self._others) and self._load == self._sent_load

    def _take(self, message: ToEngine) -> None:
        match message:
            case Add():
                self._add(message)
            case Cancel():
                self._end(message.request_id, self._engine.cancel)
            case Stop():
                result = self._end(message.request_id, lambda one: self._engine.stop(one, message.num_tokens))
                if result is not None:
                    self._others.append(RequestEvent(message.request_id, [], _answer(result)))
            case Ping():
                self._channel.send(Pong(self._engine.executor.stage_loads(), self._engine.audit.reports()))

    def _add(self, message: Add) -> None:
        try:
            request_id = self._engine.add(message.prompt_ids, message.params, seed_offset=message.sample_index)
        except Exception as error:  # whatever it is, it is this request's
            result = RequestResult(
                message.request_id, (), "error", _NOTHING, (), self._engine.description.num_layers,
                error=request_error(error),
            )  # fmt: skip
            self._others.append(RequestEvent(message.request_id, [], result))
        else:
            self._ids[message.request_id], self._names[request_id] = request_id, message.request_id

    def _end(self, name: int, end: Callable[[int], Result | None]) -> Result | None:
        """The result; None for a request that has ended already."""
        if name not in self._ids:
            return None
        request_id = self._ids.pop(name)
        del self._names[request_id]
        return end(request_id)

    def _named(self, event: Event) -> RequestEvent:
        name = self._names[event.request_id]
        if event.result is not None:
            del self._names[event.request_id], self._ids[name]
        return RequestEvent(name, event.tokens, None if event.result is None else _answer(event.result))

    @property
    def _load(self) -> EngineLoad:
        return EngineLoad(self._engine.num_running, self._engine.num_waiting, self._engine.kv_cache_usage)


def _answer(result: Result) -> RequestResult:
    assert isinstance(result, RequestResult), "only `Add` makes requests here, and they are for answers"
    return result


if __name__ == "__main__":
    main()
