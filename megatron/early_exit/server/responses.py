"""Responses that end when their client does: a stream of server-sent events, and one that is computed as a whole.

Only what a client still waits for is computed; one that reads nothing of what it was sent is left alone after a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection; there is nobody to answer."""


class EventStream(Response):
    """Server-sent events. The iterator of events is closed when they end, and when the client disconnects or reads
    nothing for `reader_seconds`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], reader_seconds: float) -> None:
        """events: whole ones, `data: ...` with an empty line behind."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._reader_seconds = events, reader_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await self._send(send, {"type": "http.response.body", "body": event, "more_body": True})
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("a client read nothing for %g seconds; its request is cancelled", self._reader_seconds)

    async def _send(self, send: Send, message: dict) -> None:
        # Waits while the client reads more slowly than tokens come.
        async with asyncio.timeout(self._reader_seconds):
            await send(message)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects: raises ClientGone then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[dict]]) -> None:
    """The request has been read: whatever comes now until the client goes is of no interest."""
    while (await receive())["type"] != "http.disconnect":
        pass
