"""What every request passes before it reaches a handler: log, cross-origin rules, connections, keys, bodies.

All of it is plain ASGI. Starlette's `BaseHTTPMiddleware` puts a task and a queue between handler and client, and a
disconnect does not come through.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.errors import ApiError, BadRequest, Forbidden, NotReady, Unauthorized, error_response
from megatron.early_exit.server.json_bodies import JsonBodies
from megatron.early_exit.server.operation import HEALTH_PATHS, LIVE_PATH
from megatron.early_exit.server.protocol import SURPLUS_KEY
from megatron.early_exit.server.request_record import RequestRecord, current_record

_STATUS_CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def protect(app: ASGIApp, context: ServerContext) -> ASGIApp:
    """The application behind all of this."""
    config = context.config
    app = JsonBodies(app, config.limits)
    if config.api_keys:
        app = ApiKeys(app, config.api_keys)
    elif is_loopback(config.host):
        app = OwnPages(app, config.allowed_origins)
    app = Connections(app)
    if config.allowed_origins:
        app = CORSMiddleware(
            app, allow_origins=config.allowed_origins, allow_methods=["GET", "POST", "PUT"], allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    return Records(app, context.metrics.on_response, write_line if config.access_log else None)


class Records:
    """Gives each request an id (`X-Request-Id`, the client's if it has sent one), counts its status, and logs it in a
    line of JSON when it has ended."""

    def __init__(self, app: ASGIApp, count: Callable[[int], None], write: Callable[[str], None] | None) -> None:
        """count: called with each status. write: with each line; None: nothing is logged."""
        self._app, self._count, self._write = app, count, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served
        given = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        current_record.set(record)
        status, started = _STATUS_CLIENT_GONE, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._count(status)
            if self._write is not None:
                self._write(_line(scope, record, status, time.monotonic() - started))


def _line(scope: Scope, record: RequestRecord, status: int, seconds: float) -> str:
    client = scope.get("client")
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "milliseconds": round(1000 * seconds, 1),
        "request_id": record.request_id,
    }
    if record.answers:
        entry["prompt_tokens"] = sum(len(ids) for answers in record.answers for ids in answers.prompt_ids)
        entry["generated_tokens"] = sum(answers.num_generated for answers in record.answers)
    return json.dumps(entry)


def write_line(line: str) -> None:
    """Write to standard output; if nobody reads that any more, the server goes on."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except OSError:
        pass


class Connections:
    """Tells requests on connections beyond the limit to try again; whether the process lives is still answered. Ends
    connections with a request whose length is said in two ways: a proxy may have read another end of it (RFC 9112,
    section 6.1)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        error: ApiError | None = None
        if scope.get("state", {}).get(SURPLUS_KEY) and scope["path"] != LIVE_PATH:
            error = NotReady("too many connections are open; try again later", retry_after=1)
        elif "content-length" in headers and "transfer-encoding" in headers:
            error = BadRequest("both Content-Length and Transfer-Encoding say how long the body is; send one of them")
        if error is None:
            await self._app(scope, receive, send)
        else:
            response = error_response(scope["path"], error)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)


class OwnPages:
    """Refuses requests of web pages that are neither this server's nor allowed, where no key protects it.

    A page of another site cannot send JSON without being asked for permission first (CORS), unless the name of that
    site leads to this machine (DNS rebinding). So pages must come from an address, from localhost or from an allowed
    site."""

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str]) -> None:
        self._app, self._allowed = app, frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, origin = self._app, Headers(scope=scope).get("origin")
        if origin is not None and not self._is_known(origin):
            error = Forbidden(f"pages of {origin[:200]} may not call this server; --allowed-origins lets them")
            app = error_response(scope["path"], error)
        await app(scope, receive, send)

    def _is_known(self, origin: str) -> bool:
        if origin in self._allowed or "*" in self._allowed:
            return True
        try:
            host = urlsplit(origin).hostname or ""
            return host == "localhost" or bool(ipaddress.ip_address(host))
        except ValueError:
            return False


class ApiKeys:
    """Lets requests through that bring a key: as `Authorization: Bearer KEY`, or as the password of HTTP Basic, which
    browsers ask for. Health needs none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, headers = self._app, Headers(scope=scope)
        if scope["path"] not in HEALTH_PATHS and not self._is_known(_key_of(headers.get("authorization", ""))):
            error = Unauthorized("the API key is missing or wrong; send it as Authorization: Bearer KEY")
            app = error_response(scope["path"], error)
            wants_page = scope["method"] in ("GET", "HEAD") and "text/html" in headers.get("accept", "")
            app.headers["WWW-Authenticate"] = 'Basic realm="API key as password"' if wants_page else "Bearer"
        await app(scope, receive, send)

    def _is_known(self, given: bytes) -> bool:
        # Of all keys, each in the same time whether right or wrong.
        return any([hmac.compare_digest(given, key) for key in self._keys])


def _key_of(authorization: str) -> bytes:
    """The key in a header; empty if there is none. Headers come as latin-1."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
