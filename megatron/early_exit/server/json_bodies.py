"""Bodies of requests: read whole, within limits, and checked, before any handler sees them.

Python's JSON takes NaN, numbers beyond all floats, lone surrogates and any depth, and each breaks something later.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron.early_exit.server.config import RequestLimits
from megatron.early_exit.server.errors import (
    ApiError,
    BadRequest,
    BodyTooLarge,
    NoJson,
    Overloaded,
    TooLate,
    error_response,
)

_METHODS = ("POST", "PUT", "PATCH")
_MAX_DEPTH = 64
"""Of objects and lists in each other."""
_MAX_BYTES_AT_ONCE = 64 << 10
"""Larger bodies are checked in a thread, while others are served."""

_Container = dict[str, Any] | list[Any]
_Path = tuple[str | int, ...]
"""Names and indices that lead to a value."""


class JsonBodies:
    """Middleware. A request with a body reaches the application when it has come whole and is JSON."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app, self._limits = app, limits
        self._num_bytes = 0
        """Of all bodies in memory: handlers keep them until their request ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in _METHODS:
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            self._check_headers(Headers(scope=scope))
            is_whole = await self._read(body, receive)
            if not is_whole:
                return
            await (asyncio.to_thread(check_json, body) if len(body) > _MAX_BYTES_AT_ONCE else _at_once(body))
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, send)
        else:
            await self._app(scope, _replay(bytes(body), receive), send)
        finally:
            self._num_bytes -= len(body)

    def _check_headers(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise NoJson(f"the content type is {kind or 'missing'}; send application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise NoJson(f"the content encoding {headers['content-encoding']} is not supported; send the body as it is")
        length = headers.get("content-length", "")
        if length.isdecimal():
            self._check_length(int(length))

    def _check_length(self, length: int) -> None:
        if length > self._limits.max_body_bytes:
            raise BodyTooLarge(f"the body has more than {self._limits.max_body_bytes} bytes")

    async def _read(self, body: bytearray, receive: Receive) -> bool:
        """Whether all of it has come; False: the client has gone."""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    self._add(body, message.get("body", b""))
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise TooLate(f"the body was not complete within {self._limits.body_seconds:g} seconds") from None

    def _add(self, body: bytearray, part: bytes) -> None:
        self._check_length(len(body) + len(part))
        if self._num_bytes + len(part) > self._limits.max_total_body_bytes:
            raise Overloaded("the bodies of all requests take too much memory; try again later", retry_after=1)
        body += part
        self._num_bytes += len(part)


async def _at_once(body: bytearray) -> None:
    check_json(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that begins with a body that has been read."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


def check_json(body: bytes | bytearray) -> None:
    """Raise BadRequest, which says what is wrong and where, unless a body is a JSON object that can be worked with."""
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise BadRequest(f"the body is nested too deeply; at most {_MAX_DEPTH} levels are taken") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    _check_value(value)


def _check_value(value: dict[str, Any]) -> None:
    """Check all that is in an object, level by level."""
    level: list[tuple[_Container, _Path]] = [(value, ())]
    for _ in range(_MAX_DEPTH):
        following: list[tuple[_Container, _Path]] = []
        for container, path in level:
            for key, item in _items(container):
                if isinstance(key, str) and not _is_unicode(key):
                    raise _fault(path, "a name is not valid Unicode: it has half of a surrogate pair")
                if isinstance(item, dict | list):
                    following.append((item, (*path, key)))
                elif isinstance(item, float):
                    if not math.isfinite(item):
                        raise _fault((*path, key), "NaN, infinite and larger numbers than 1.8e308 are not taken")
                elif isinstance(item, str) and not _is_unicode(item):
                    raise _fault((*path, key), "the text is not valid Unicode: it has half of a surrogate pair")
        level = following
        if not level:
            return
    raise _fault(level[0][1][:3], f"nested too deeply; at most {_MAX_DEPTH} levels are taken")


def _items(container: _Container) -> Iterable[tuple[str | int, Any]]:
    return container.items() if isinstance(container, dict) else enumerate(container)


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault(path: _Path, what: str) -> BadRequest:
    """What is wrong at a place: `messages[0].content: ...`."""
    where = "".join(_parts(path)) or None
    return BadRequest(f"{where}: {what}" if where else what, param=where)


def _parts(path: _Path) -> Iterator[str]:
    for index, part in enumerate(path):
        if isinstance(part, int):
            yield f"[{part}]"
        else:
            yield f"{'.' if index else ''}{part[:64]}"
