"""The link to the engine's process, which is started here: messages, whether it is alive, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from megatron.early_exit.server.config import EngineConfig
from megatron.early_exit.server.engine_messages import (
    FromEngine,
    Ping,
    ProcessSettings,
    Ready,
    Shutdown,
    ToEngine,
)

# Not imported: it needs torch, and this process does not.
_ENGINE_PROCESS = "megatron.early_exit.server.engine_process"

_SECONDS_BETWEEN_PINGS = 1.0
_SECONDS_TO_END = 5.0
_SECONDS_FOR_LAST_WORDS = 1.0
"""Of a process that has ended by itself: they may be on the way."""
_SECONDS_FOR_LAST_EVENTS = 0.1
"""Of one that was killed, which has said nothing of its end."""


class EngineLink:
    """The engine's process, and this end of the link to it."""

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, folder: Path) -> None:
        self._process, self._socket, self._folder = process, socket, folder
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode
        self._ending = asyncio.ensure_future(process.wait())
        self._last_message = time.monotonic()
        self._is_loaded = False
        self._why_killed: str | None = None

    @classmethod
    async def start(cls, config: EngineConfig) -> EngineLink:
        folder = Path(tempfile.mkdtemp(prefix="early_exit_", dir=_short_temporary_folder()))
        socket = zmq.asyncio.Context().socket(zmq.PAIR)
        socket.linger = 0
        socket.setsockopt(zmq.SNDHWM, 0)  # admission bounds what is sent
        try:
            endpoint = f"ipc://{folder}/engine"
            socket.bind(endpoint)
            settings = msgspec.msgpack.encode(ProcessSettings(
                endpoint, os.getpid(), logging.getLogger().isEnabledFor(logging.INFO), config.path,
                {"worker_timeout": config.worker_timeout, **config.settings},
            ))  # fmt: skip
            environment = dict(os.environ)
            # What this process can import, the engine can.
            environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", _ENGINE_PROCESS,
                env=environment, stdin=asyncio.subprocess.PIPE, stdout=2,
                start_new_session=True,  # Ctrl-C is for this process alone; uvloop knows no process_group
            )  # fmt: skip
        except BaseException:
            socket.context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        assert process.stdin is not None, "a pipe was asked for"
        process.stdin.write(settings)
        process.stdin.close()
        return cls(process, socket, folder)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Without waiting: the queue has no limit, and messages leave in order."""
        with contextlib.suppress(zmq.ZMQError):  # the process has ended, as `receive_or_end` tells
            self._socket.send(self._encode(message))

    async def receive_or_end(self) -> FromEngine | None:
        """The next message; None when the process has ended and has said nothing more."""
        receiving = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait({receiving, self._ending}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            is_killed = self._ending.result() < 0
            seconds = _SECONDS_FOR_LAST_EVENTS if is_killed else _SECONDS_FOR_LAST_WORDS
            await asyncio.wait({receiving}, timeout=seconds)
        if not receiving.done() or receiving.cancelled():  # cancelled by `end`, which closes the socket
            receiving.cancel()
            return None
        self._last_message = time.monotonic()
        self._forget_address()
        message = self._decode(receiving.result())
        self._is_loaded |= isinstance(message, Ready)
        return message

    async def watch(self, limit: float) -> None:
        """Kill the process if it is silent for `limit` seconds."""
        silent, before = 0.0, time.monotonic()
        while True:
            self.send(Ping())
            await asyncio.sleep(_SECONDS_BETWEEN_PINGS)
            now = time.monotonic()
            # While this process was suspended nobody was silent.
            silent = 0.0 if self._last_message > before else silent + min(now - before, 2 * _SECONDS_BETWEEN_PINGS)
            before = now
            if silent > limit:
                self._why_killed = f"the engine made no progress for {limit:.0f} seconds"
                self._process.kill()
                return

    async def end(self) -> str:
        """End the process, by force if it does not listen. Returns what became of it, in words."""
        try:
            if self._process.returncode is None:
                if self._is_loaded:
                    self.send(Shutdown())
                else:  # it reads no messages yet
                    self._process.terminate()
                try:
                    await asyncio.wait_for(asyncio.shield(self._ending), _SECONDS_TO_END)
                except TimeoutError:
                    self._process.kill()
            status = await self._ending
            return self._why_killed or f"the engine's process {_ending(status)}"
        finally:
            self._socket.context.destroy(linger=0)
            self._forget_address()

    def _forget_address(self) -> None:
        """Remove what the process needs to connect. When it has, nothing is left on the disk, however this one ends."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _ending(status: int) -> str:
    if status >= 0:
        return f"has ended with status {status}"
    return f"was ended by signal {-status}" + (" (was there too little memory?)" if status == -9 else "")


def _short_temporary_folder() -> str | None:
    """Where paths of sockets are short enough: the system allows 107 characters."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"
