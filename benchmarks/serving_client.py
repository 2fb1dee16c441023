"""An HTTP client for loads: one connection a request, server-sent events as they come, the time of every token.

It costs little, so that a server on the same cores is measured and not its client, and it sees connections that are
cut. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

COMPLETIONS = "/v1/completions"


@dataclass
class Answer:
    """What a client saw of one request. Times are of `time.perf_counter`, in seconds."""

    started: float
    """Before the connection was opened."""
    status: int | None = None
    """Of HTTP; None if there was no response."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    """When each token came; tokens that came together have one time."""
    finish_reason: str | None = None
    error: str | None = None
    """An event of an error, or the body of a refusal, or how the connection ended; None for a whole answer."""
    is_cut: bool = False
    """The connection ended with neither a whole answer nor an error that the server wrote."""
    ended: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether the server said that this is all of it."""
        return self.error is None and self.finish_reason is not None


class ConnectionCut(Exception):
    """The connection ended in the middle of a response."""


@dataclass(frozen=True)
class Address:
    """Of a server on this machine."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        parts = urlsplit(url)
        return cls(parts.hostname, parts.port)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
        """A whole request, after whose response the connection is closed."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def fetch(address: Address, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of one response. Raises OSError or ConnectionCut."""
    reader, writer = await address.connect()
    try:
        writer.write(address.request(method, path, body))
        status, pieces = await read_response(reader)
        return status, b"".join([piece async for piece in pieces])
    finally:
        writer.close()


async def read_response(reader: asyncio.StreamReader) -> tuple[int, AsyncIterator[bytes]]:
    """Status, and the pieces of the body as they come. Raises ConnectionCut, also while pieces are read."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    except asyncio.IncompleteReadError as error:
        raise ConnectionCut("the connection was closed before a response") from error
    lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    if headers.get("transfer-encoding") == "chunked":
        pieces = _chunks(reader)
    else:
        pieces = _sized(reader, headers.get("content-length"))
    return int(lines[0].split()[1]), pieces


async def _sized(reader: asyncio.StreamReader, length: str | None) -> AsyncIterator[bytes]:
    try:
        yield await (reader.read() if length is None else reader.readexactly(int(length)))
    except asyncio.IncompleteReadError as error:
        raise ConnectionCut("the connection was closed in the middle of a body") from error


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            piece = await reader.readexactly(size + 2)
            yield piece[:-2]
        await reader.readuntil(b"\r\n")
    except asyncio.IncompleteReadError as error:
        raise ConnectionCut("the connection was closed in the middle of a stream") from error


async def stream_answer(
    address: Address, body: dict[str, Any], path: str = COMPLETIONS, timeout: float = 120.0, seconds_a_read: float = 0.0
) -> Answer:
    """Ask for one answer as a stream. body: without `stream`. seconds_a_read: pause before each piece is taken, for
    clients that read slowly. Raises TimeoutError if the whole takes longer than `timeout` seconds: it hangs."""
    answer = Answer(time.perf_counter())
    async with asyncio.timeout(timeout):
        try:
            await _stream(address, json.dumps({**body, "stream": True}).encode(), path, seconds_a_read, answer)
        except (ConnectionCut, OSError) as error:
            answer.error, answer.is_cut = f"{type(error).__name__}: {error}", True
    answer.ended = time.perf_counter()
    return answer


async def _stream(address: Address, body: bytes, path: str, seconds_a_read: float, answer: Answer) -> None:
    reader, writer = await address.connect()
    try:
        writer.write(address.request("POST", path, body))
        answer.status, pieces = await read_response(reader)
        if answer.status != 200:
            answer.error = b"".join([piece async for piece in pieces]).decode(errors="replace")
            return
        rest = b""
        async for piece in pieces:
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                take_event(answer, event, time.perf_counter())
            if seconds_a_read:
                await asyncio.sleep(seconds_a_read)
    finally:
        writer.close()


def take_event(answer: Answer, event: bytes, now: float) -> None:
    """Add one server-sent event of a completion, or of a chat, to an answer."""
    if not event.startswith(b"data: ") or event == b"data: [DONE]":
        return
    document = json.loads(event[6:])
    if "error" in document:
        answer.error = json.dumps(document["error"])
        return
    for choice in document["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        token_ids = choice.get("token_ids") or []
        answer.text += text
        answer.token_ids += token_ids
        # Servers that say nothing of tokens send each as an event.
        answer.token_times += [now] * (len(choice["exit_layers"]) if "exit_layers" in choice else bool(text))
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
