"""Connections with deadlines: uvicorn's HTTP/1.1 protocol, which by itself waits for ever for headers, and for clients
that do not read.

The deadline of bodies is in `json_bodies.py`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron.early_exit.server.config import RequestLimits
from megatron.early_exit.server.errors import ApiError, BadRequest, TooLate, error_response

log = logging.getLogger(__name__)

SURPLUS_KEY = "is_surplus"
"""In the state of requests on connections beyond `max_connections`: they are told to try again."""

_NUM_TOLD = 64
"""Connections beyond `max_connections` that are told so; still more are closed at once."""
_SEND_BUFFER = 256 << 10
"""Bytes of the system's memory for what a client has not read; by itself it takes 4 MB for each."""
_NO_LINGER = struct.pack("ii", 1, 0)
"""Closing a connection drops what has not been sent."""
_SECONDS_FOR_REST = 5.0
"""For the rest of a body that is not read any more since the request has been answered."""


def deadline_protocol(limits: RequestLimits) -> type[asyncio.Protocol]:
    """The class of which uvicorn makes an object for each connection."""

    class Connection(_DeadlineProtocol):
        _limits = limits

    return Connection


class _DeadlineProtocol(H11Protocol):
    """One connection."""

    _limits: RequestLimits

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._request_deadline, self._reader_deadline = _Deadline(self.loop), _Deadline(self.loop)

    # asyncio declares it with the base class of all transports; a connection's is of this one.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if len(self.connections) > self._limits.max_connections + _NUM_TOLD:
            transport.abort()
        elif len(self.connections) > self._limits.max_connections:
            self.app_state = {**self.app_state, SURPLUS_KEY: True}
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_deadline.cancel()
        self._reader_deadline.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()
        if self.transport.get_write_buffer_size() > 0:
            self._reader_deadline.start(self._limits.reader_seconds, self._reads_nothing)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_deadline.start(self._limits.reader_seconds, self._reads_nothing)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_deadline.cancel()

    def _watch_request(self) -> None:
        """Have a deadline while headers are incomplete, and while the rest of a body is thrown away."""
        state = self.conn.their_state
        if state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            self._request_deadline.start(self._limits.header_seconds, self._headers_late)
        elif state is h11.SEND_BODY and self.cycle.response_complete:
            self._request_deadline.start(_SECONDS_FOR_REST, self.transport.close)
        else:
            self._request_deadline.cancel()

    def _headers_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(TooLate(f"the headers were not complete within {self._limits.header_seconds:g} seconds"))
        else:  # a browser's connection in reserve, for instance
            self.transport.close()

    def _reads_nothing(self) -> None:
        if self.transport.get_write_buffer_size() > 0:
            log.info("a client read nothing for %g seconds; its connection is closed", self._limits.reader_seconds)
            # Else the system would keep what it has for the client to read.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for what is no HTTP."""
        self._refuse(BadRequest(msg))

    def _refuse(self, error: ApiError) -> None:
        """Answer what never became a request, and close the connection."""
        if self.conn.our_state is not h11.IDLE:  # in the middle of an answer
            self.transport.abort()
            return
        response = error_response("", error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        body = h11.Data(data=bytes(response.body))
        for event in (h11.Response(status_code=error.status, headers=headers), body, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class _Deadline:
    """A timer that runs, or does not."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None
        self._on_end: Any = None

    def start(self, seconds: float, on_end: Any) -> None:
        """Call `on_end` after so many seconds, unless a call of it is due already."""
        if self._on_end != on_end:
            self.cancel()
            self._handle, self._on_end = self._loop.call_later(seconds, on_end), on_end

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._on_end = None
