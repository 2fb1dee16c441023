"""Clients that do what no client should: each kind sends one bad request and says what came of it.

All of them end by themselves within seconds, whatever the server does.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable

from benchmarks.serving_client import COMPLETIONS, Address, ConnectionCut, read_response

_SECONDS = 30.0
"""Until a server that says nothing counts as hanging."""
_PIECE = b"x" * (1 << 20)

Abuser = Callable[[Address, random.Random], Awaitable[str]]
"""Returns the status of the response, or how the exchange ended otherwise: left, closed, hangs."""


async def _send(address: Address, request: bytes) -> str:
    """The response to raw bytes."""
    reader, writer = await address.connect()
    try:
        writer.write(request)
        return await _status(reader)
    finally:
        writer.transport.abort()


async def _status(reader: asyncio.StreamReader) -> str:
    try:
        async with asyncio.timeout(_SECONDS):
            status, pieces = await read_response(reader)
            async for _ in pieces:
                pass
            return str(status)
    except (ConnectionCut, OSError, asyncio.LimitOverrunError):
        return "closed"
    except TimeoutError:
        return "hangs"


async def _post(address: Address, body: bytes, headers: str = "") -> str:
    return await _send(address, address.request("POST", COMPLETIONS, body, headers))


def _good(draw: random.Random, is_streamed: bool = True) -> bytes:
    prompt = "".join(draw.choice("abc def") for _ in range(draw.randint(1, 60)))
    return json.dumps({"prompt": prompt, "max_tokens": 150, "ignore_eos": True, "stream": is_streamed}).encode()


async def malformed_json(address: Address, draw: random.Random) -> str:
    good = _good(draw)
    return await _post(address, good[: draw.randrange(1, len(good) - 1)])


async def bad_utf8(address: Address, draw: random.Random) -> str:
    return await _post(address, b'{"prompt": "%b"}' % draw.choice([b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\xf8"]))


async def lone_surrogate(address: Address, draw: random.Random) -> str:
    return await _post(address, rb'{"prompt": "\ud800 and \udfff"}')


async def not_a_number(address: Address, draw: random.Random) -> str:
    value = draw.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999"])
    field = draw.choice([b"temperature", b"top_p", b"exit_thresholds", b"seed"])
    return await _post(address, b'{"prompt": "a", "%b": %b}' % (field, value))


async def deep_nesting(address: Address, draw: random.Random) -> str:
    depth = draw.choice([100, 10_000, 1_000_000])
    begin, end = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return await _post(address, b'{"prompt": "a", "user": %b1%b}' % (begin * depth, end * depth))


async def many_prompts(address: Address, draw: random.Random) -> str:
    return await _post(address, json.dumps({"prompt": ["a"] * draw.choice([1_000, 100_000])}).encode())


async def wrong_values(address: Address, draw: random.Random) -> str:
    wrong = [
        {"prompt": "a", "max_tokens": "many"}, {"prompt": {"a": 1}}, {"prompt": ""}, {"prompt": []}, {"max_tokens": 3},
        {"prompt": [-1]}, {"prompt": [10**12]}, {"prompt": "a", "n": 10**9}, {"prompt": "a", "temperature": -1},
        {"prompt": "a", "mode": "fast"}, {"prompt": "a", "exit_layers": [99], "mode": "early_exit"},
        {"prompt": "a", "stop": ["x" * 10_000]}, {"prompt": "a", "seed": 2**70}, {"prompt": "a " * 100_000},
        {"prompt": "a", "unknown_field": 1}, {"prompt": "a", "": 0}, [], "prompt", 7, None,
    ]  # fmt: skip
    return await _post(address, json.dumps(draw.choice(wrong)).encode())


async def huge_body(address: Address, draw: random.Random) -> str:
    """More than any request may have, announced or in chunks without end."""
    reader, writer = await address.connect()
    try:
        is_announced = draw.random() < 0.5
        length = f"Content-Length: {64 << 20}" if is_announced else "Transfer-Encoding: chunked"
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
        writer.write(head.encode())
        status = asyncio.ensure_future(_status(reader))
        for _ in range(64):
            if status.done():
                break
            writer.write(_PIECE if is_announced else b"%x\r\n%b\r\n" % (len(_PIECE), _PIECE))
            async with asyncio.timeout(_SECONDS):
                await writer.drain()
        return await status
    except OSError:
        return "closed"
    finally:
        writer.transport.abort()


async def _leave_after(address: Address, request: bytes, seconds: float) -> str:
    """Send some bytes, wait, and be gone."""
    _, writer = await address.connect()
    try:
        writer.write(request)
        await asyncio.sleep(seconds)
        return "left"
    finally:
        writer.transport.abort()


async def half_headers(address: Address, draw: random.Random) -> str:
    request = address.request("POST", COMPLETIONS, b"{}")
    return await _leave_after(address, request[: draw.randrange(1, len(request) - 4)], draw.uniform(0.0, 1.0))


async def half_body(address: Address, draw: random.Random) -> str:
    request = address.request("POST", COMPLETIONS, _good(draw))
    return await _leave_after(address, request[: -draw.randrange(1, 20)], draw.uniform(0.0, 1.0))


async def leaves_in_stream(address: Address, draw: random.Random) -> str:
    request = address.request("POST", COMPLETIONS, _good(draw))
    return await _leave_after(address, request, draw.uniform(0.0, 0.5))


async def leaves_before_the_answer(address: Address, draw: random.Random) -> str:
    request = address.request("POST", COMPLETIONS, _good(draw, is_streamed=False))
    return await _leave_after(address, request, draw.uniform(0.0, 0.3))


async def slow_reader(address: Address, draw: random.Random) -> str:
    """Takes a few bytes at a time of a long answer, then leaves."""
    reader, writer = await address.connect()
    try:
        writer.write(address.request("POST", COMPLETIONS, _good(draw)))
        for _ in range(10):
            await reader.read(40)
            await asyncio.sleep(draw.uniform(0.0, 0.4))
        return "left"
    except OSError:
        return "closed"
    finally:
        writer.transport.abort()


async def wrong_paths(address: Address, draw: random.Random) -> str:
    method = draw.choice(["GET", "DELETE", "PUT", "OPTIONS", "BREW"])
    path = draw.choice([COMPLETIONS, "/nothing", "/" + "a" * 5_000, "/../../etc/passwd", "/%ff%00"])
    return await _send(address, address.request(method, path))


async def wrong_headers(address: Address, draw: random.Random) -> str:
    headers = draw.choice(["Authorization: Bearer wrong\r\n", "X: " + "a" * 100_000 + "\r\n", "Content-Length: -5\r\n"])
    return await _post(address, b"{", headers)


async def no_http(address: Address, draw: random.Random) -> str:
    return await _send(address, draw.randbytes(draw.randrange(1, 2_000)) + b"\r\n\r\n")


ABUSERS: tuple[Abuser, ...] = (
    malformed_json, bad_utf8, lone_surrogate, not_a_number, deep_nesting, many_prompts, wrong_values, huge_body,
    half_headers, half_body, leaves_in_stream, leaves_before_the_answer, slow_reader, wrong_paths, wrong_headers,
    no_http,
)  # fmt: skip


def is_expected(outcome: str) -> bool:
    """Whether a server may end a bad request so: it is refused (4xx; 503 for more than it can hold), or the connection
    is closed. It is never answered, and nothing fails or hangs."""
    return outcome in ("left", "closed", "503") or outcome.startswith("4")
