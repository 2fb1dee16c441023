"""HTTP by hand, for clients that no library plays."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit

HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"


class Answer(NamedTuple):
    """To one request."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """receive_buffer: bytes that the system takes for a client that does not read."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((urlsplit(url).hostname, urlsplit(url).port))
    return connection


def read_answer(connection: socket.socket, method: str = "GET") -> Answer:
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def exchange(url: str, request: str | bytes) -> Answer:
    """Send bytes as they are, on a connection of their own; the first answer."""
    with connect(url) as connection:
        connection.sendall(request.encode() if isinstance(request, str) else request)
        return read_answer(connection)


def post(path: str, body: bytes | str, *headers: str) -> bytes:
    """The bytes of a request with a JSON body."""
    body = body.encode() if isinstance(body, str) else body
    lines = [f"POST {path} HTTP/1.1", *HEAD.strip().split("\r\n"), f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the server closes the connection within so many seconds, whatever it sends before."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True
