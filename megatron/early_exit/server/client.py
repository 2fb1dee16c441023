"""A client of the server, with Python's own library: JSON, server-sent events, and as much patience as a status asks
for."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_SECONDS_BETWEEN_TRIES = 1.0
_LONGEST_PAUSE = 60.0


class RequestFailed(Exception):
    """The server has refused a request or could not answer it; the message is the server's."""


class ServerUnavailable(OSError):
    """No request can be answered: no server there, no key, or no patience left. The message says what to do."""


@dataclass
class Client:
    """Requests to one server."""

    url: str
    """Where it listens: `http://HOST:PORT`"""
    api_key: str | None = None
    wait_seconds: float = 0.0
    """To wait in all while there is no server yet, or it loads its model."""
    busy_seconds: float = 60.0
    """To wait in all while it has too many requests."""
    timeout: float = 600.0
    """Seconds that it may be silent."""

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1").removesuffix("/api")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url} is no address of a server; it looks like http://127.0.0.1:5000")

    def get(self, path: str) -> dict[str, Any]:
        """The document at a path. Raises as `send`."""
        return self._document("GET", path, None)

    def send(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises RequestFailed or ServerUnavailable."""
        return self._document(method, path, body)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer as they come. Raises as `send`, also in mid-stream."""
        with self._open("POST", path, {**body, "stream": True}) as response:
            try:
                for line in response:
                    data = line.strip().removeprefix(b"data: ")
                    if data == b"[DONE]":
                        return
                    if data:
                        chunk = json.loads(data)
                        if "error" in chunk:
                            raise RequestFailed(chunk["error"]["message"])
                        yield chunk
            except (http.client.HTTPException, OSError) as error:
                raise RequestFailed(f"the answer broke off ({_words(error)})") from error
        raise RequestFailed("the answer broke off: the server has ended, or something between it and here")

    def _document(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self._open(method, path, body) as response:
            document: dict[str, Any] = json.load(response)
        return document

    def _open(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        start = time.monotonic()
        while True:
            try:
                request = self._request(method, path, body)
                response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=self.timeout)
                return response
            except urllib.error.HTTPError as error:
                message, status = _message(error), error.code
                pause = _retry_after(error)
            except (OSError, http.client.HTTPException) as error:
                message, status, pause = _words(error), None, _SECONDS_BETWEEN_TRIES
            waited = time.monotonic() - start
            if waited + pause > self._patience(status):
                raise self._failure(status, message)
            time.sleep(pause)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.url + path, data, headers, method=method)

    def _patience(self, status: int | None) -> float:
        return {429: self.busy_seconds, 503: self.wait_seconds, None: self.wait_seconds}.get(status, -1.0)

    def _failure(self, status: int | None, message: str) -> Exception:
        match status:
            case None:
                return ServerUnavailable(
                    f"no server answers at {self.url} ({message}); start one with tools/run_text_generation_server.py, "
                    "give its address with --url, or wait for it with --wait SECONDS"
                )
            case 401:
                return ServerUnavailable(f"{message}; give the key with --api-key, or in EARLY_EXIT_API_KEY")
            case 503:
                return ServerUnavailable(f"the server is not ready: {message}; --wait SECONDS waits until it is")
            case 429:
                return ServerUnavailable(f"the server has too many requests: {message}; --busy SECONDS waits longer")
            case _:
                return RequestFailed(message)


def _message(error: urllib.error.HTTPError) -> str:
    """In the form of either API; else the status."""
    try:
        document = json.loads(error.read())
        return str(document["error"]["message"] if "error" in document else document["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"status {error.code} ({error.reason}); is this a server for text generation?"


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return min(float(error.headers["Retry-After"]), _LONGEST_PAUSE)
    except (TypeError, ValueError):
        return _SECONDS_BETWEEN_TRIES


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
