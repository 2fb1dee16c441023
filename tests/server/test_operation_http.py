"""What requests meet before a handler sees them: keys, bodies, deadlines, limits, over real connections."""

from __future__ import annotations

import base64
import json
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.server.raw_http import HEAD, connect, exchange, is_closed, post, read_answer
from tests.server.serving import RunningServer, start_server

KEY = "key-of-tests"
BEARER = f"Authorization: Bearer {KEY}"
MAX_BODY, MAX_TOTAL = 20_000, 30_000
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def limited(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One slot, a key, and limits that a test can wait for."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"another\n{KEY}\n")
    flags = {
        "max-requests": 1, "max-waiting": 7, "max-connections": 8, "max-body-bytes": MAX_BODY,
        "max-total-body-bytes": MAX_TOTAL, "header-seconds": 1, "body-seconds": 1, "reader-seconds": 1,
        "keep-alive-seconds": 3, "api-key-file": keys, "allowed-origins": "https://friend.example",
    }  # fmt: skip
    with start_server(checkpoint, *(word for name, value in flags.items() for word in (f"--{name}", value))) as running:
        yield running.wait_until_ready()


def metric(server: RunningServer, name: str) -> float:
    """A value of /metrics, by name and labels; 0 if it is not there."""
    lines = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


# Bodies. Row 12.


@pytest.mark.parametrize("body, param, words", [
    ('{"prompt": "a", "temperature": NaN}', "temperature", "NaN"),
    ('{"prompt": "a", "temperature": -Infinity}', "temperature", "infinite"),
    ('{"prompt": "a", "exit_thresholds": [0.5, 1e999]}', "exit_thresholds[1]", "infinite"),
    ('{"prompt": "a \\ud800 b"}', "prompt", "surrogate"),
    ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "messages[0].content", "surrogate"),
    ('{"\\ud800": 1}', None, "surrogate"),
    ('{"prompt": ' + "[" * 100 + "]" * 100 + "}", "prompt[0][0]", "nested too deeply"),
    ('{"prompt": ' + "[" * 9000 + "]" * 9000 + "}", None, "nested too deeply"),
    ('{"prompt": "a"', None, "not valid JSON"),
    ('{"prompt": ' + "1" * 5000 + "}", None, "not valid JSON"),
    ("", None, "not valid JSON"),
    ("[1]", None, "must be a JSON object"),
    (b'{"prompt": "\xff"}', None, "not UTF-8: invalid start byte at byte 12"),
    ('{"prompt": "a"}'.encode("utf-16"), None, "not UTF-8"),
])  # fmt: skip
def test_what_is_no_strict_json_is_refused(server: RunningServer, body: str | bytes, param: str, words: str) -> None:
    answer = exchange(server.url, post(TEXT, body))
    assert answer.status == 400 and words in answer.error["message"] and answer.error["param"] == param


def test_json_that_only_looks_odd_is_taken(server: RunningServer) -> None:
    body = '{"prompt": "\\ud83d\\ude00 \\u00e9", "max_tokens": 1, "temperature": 1e-400, "max_tokens": 2}'
    answer = exchange(server.url, post(TEXT, body))
    assert answer.status == 200 and json.loads(answer.body)["usage"]["completion_tokens"] <= 2


def test_a_length_that_is_said_twice_ends_the_connection(server: RunningServer) -> None:
    """Else what a proxy took for the end of the body would be another request here."""
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    second = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server.url) as connection:
        connection.sendall(f"{head}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}".encode())
        answer = read_answer(connection)
        assert answer.status == 400 and "Transfer-Encoding" in answer.error["message"]
        assert is_closed(connection, 5)


@pytest.mark.parametrize("headers", [
    "Content-Type: text/plain\r\n", "", "Content-Type: application/x-www-form-urlencoded\r\n",
    "Content-Type: application/json\r\nContent-Encoding: gzip\r\n",
])  # fmt: skip
def test_another_content_type_is_refused(server: RunningServer, headers: str) -> None:
    answer = exchange(server.url, f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 2\r\n\r\n{{}}")
    assert answer.status == 415 and answer.error["type"] == "invalid_request_error"


def test_large_bodies_are_refused_and_their_connection_goes_on(limited: RunningServer) -> None:
    """As a whole, in chunks, and announced to be asked for."""
    large = b" " * (20 * MAX_BODY)
    with connect(limited.url) as connection:
        connection.sendall(post(TEXT, large, BEARER))
        answer = read_answer(connection)
        assert answer.status == 413 and str(MAX_BODY) in answer.error["message"]
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(connection).status == 200
    chunked = f"POST {TEXT} HTTP/1.1\r\n{HEAD}{BEARER}\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (
        exchange(limited.url, chunked + "4000\r\n" + "x" * 0x4000 + "\r\n4000\r\n" + "x" * 0x4000 + "\r\n").status
        == 413
    )
    asking = f"POST {TEXT} HTTP/1.1\r\n{HEAD}{BEARER}\r\nContent-Length: 999999999999\r\nExpect: 100-continue\r\n\r\n"
    assert exchange(limited.url, asking).status == 413


def test_a_body_that_is_answered_and_never_ends_has_its_connection_closed(limited: RunningServer) -> None:
    with connect(limited.url) as connection:
        connection.sendall(f"POST {TEXT} HTTP/1.1\r\n{HEAD}{BEARER}\r\nContent-Length: 999999\r\n\r\n".encode())
        assert read_answer(connection).status == 413
        assert is_closed(connection, 8)


def test_bodies_together_are_bounded(limited: RunningServer) -> None:
    half = post(TEXT, b" " * (MAX_BODY - 10), BEARER)[:-1]
    with connect(limited.url) as first, connect(limited.url) as second:
        first.sendall(half)
        time.sleep(0.2)
        second.sendall(half)
        answer = read_answer(second)
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
        assert read_answer(first).status == 408
    assert exchange(limited.url, post(TEXT, b" " * (MAX_BODY - 10), BEARER)).status == 400, "the memory is given back"


# Deadlines and connections. Rows 26 to 28.


def test_half_a_body_is_waited_for_no_longer_than_its_deadline(limited: RunningServer) -> None:
    started = time.monotonic()
    assert exchange(limited.url, post(TEXT, '{"prompt": "a"}', BEARER)[:-3]).status == 408
    assert 0.9 < time.monotonic() - started < 4


def test_headers_that_trickle_are_waited_for_no_longer_than_their_deadline(limited: RunningServer) -> None:
    with connect(limited.url) as connection:
        started = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(4):
            time.sleep(0.2)
            connection.sendall(b"X-Slow: 1\r\n")
        assert read_answer(connection).status == 408
        assert 0.9 < time.monotonic() - started < 4
        assert is_closed(connection, 2)


def test_a_connection_without_a_request_is_closed(limited: RunningServer) -> None:
    with connect(limited.url) as connection:
        started = time.monotonic()
        assert is_closed(connection, 5) and time.monotonic() - started > 0.9


def test_a_connection_stays_between_requests_for_as_long_as_it_is_told(limited: RunningServer) -> None:
    with connect(limited.url) as connection:
        for pause in (0.0, 1.6):  # longer than the deadline of headers
            time.sleep(pause)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_answer(connection).status == 200
        # The deadline of headers holds for later requests too.
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert read_answer(connection).status == 408


def test_what_is_no_http_is_refused_in_the_form_of_the_api(limited: RunningServer) -> None:
    answer = exchange(limited.url, "nonsense\r\n\r\n")
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


def test_connections_beyond_the_limit_are_told_to_try_again(limited: RunningServer) -> None:
    with ExitStack() as open_ones:
        for _ in range(8):
            held = open_ones.enter_context(connect(limited.url))
            held.sendall(b"GET /health HTTP/1.1\r\n")
        answer = exchange(limited.url, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.status == 503 and answer.headers["retry-after"] == "1" and answer.headers["connection"] == "close"
        assert exchange(limited.url, "GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 200
    deadline = time.monotonic() + 5
    while exchange(limited.url, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").status != 200:
        assert time.monotonic() < deadline
    assert metric(limited, 'early_exit_http_responses_total{status="503"}') >= 1


def test_a_client_that_reads_nothing_is_left_and_its_slots_are_free(limited: RunningServer) -> None:
    body = {"prompt": "a", "n": 8, "max_tokens": 240, "ignore_eos": True, "stream": True, "logprobs": 5}
    body |= {"return_exit_details": True, "return_token_ids": True}
    before = metric(limited, 'early_exit_request_success_total{finished_reason="cancelled"}')
    with connect(limited.url, receive_buffer=4096) as connection:
        connection.sendall(post(TEXT, json.dumps(body), BEARER))
        deadline = time.monotonic() + 20
        while metric(limited, 'early_exit_request_success_total{finished_reason="cancelled"}') == before:
            assert time.monotonic() < deadline, "the request was not cancelled"
            time.sleep(0.1)
        with pytest.raises(ConnectionError):  # not closed in peace: aborted
            while connection.recv(1 << 16):
                pass
    assert metric(limited, "early_exit_num_requests_running") == 0
    assert metric(limited, "early_exit_num_requests_waiting") == 0


def test_five_hundred_connections_are_held_at_once(server: RunningServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    with ExitStack() as open_ones:
        connections = [open_ones.enter_context(connect(server.url)) for _ in range(500)]
        for _ in range(2):
            for connection in connections:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert [read_answer(connection).status for connection in connections] == [200] * 500


# Keys and pages of others. Row 29.


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", TEXT, "/", "/openapi.json", "/docs", "/health/", "/nowhere"]
)
@pytest.mark.parametrize("header", ["", "Bearer ", "Bearer wrong", "Bearer key-of-test", "Basic !!", KEY])
def test_all_routes_ask_for_the_key(limited: RunningServer, path: str, header: str) -> None:
    method = "POST" if path == TEXT else "GET"
    authorization = f"Authorization: {header}\r\n" if header else ""
    answer = exchange(limited.url, f"{method} {path} HTTP/1.1\r\n{HEAD}{authorization}Content-Length: 0\r\n\r\n")
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.error["type"] == "authentication_error" and KEY not in answer.error["message"]


def test_a_key_is_taken_as_bearer_and_as_password(limited: RunningServer) -> None:
    url, basic = f"{limited.url}/v1/models", base64.b64encode(f"anybody:{KEY}".encode()).decode()
    for value in (f"Bearer {KEY}", f"bearer {KEY}", "Bearer another", f"Basic {basic}"):
        assert httpx.get(url, headers={"Authorization": value}).status_code == 200, value
    assert httpx.get(url, headers={"Authorization": b"Bearer \xff\xfe"}).status_code == 401
    for path in ("/health", "/health/ready", "/health/live"):
        assert httpx.get(limited.url + path).status_code == 200
    page = httpx.get(f"{limited.url}/", headers={"Accept": "text/html"})
    assert page.status_code == 401 and page.headers["www-authenticate"].startswith("Basic ")


def test_pages_of_allowed_sites_may_call_and_no_others(limited: RunningServer, server: RunningServer) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    friend, stranger = {"Origin": "https://friend.example"}, {"Origin": "https://stranger.example"}
    allowed = httpx.options(limited.url + TEXT, headers={**friend, **asking})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == friend["Origin"]
    assert httpx.options(limited.url + TEXT, headers={**stranger, **asking}).status_code == 400
    # By default nobody is asked in vain, and a name that leads to this machine lets no page in.
    asked = httpx.options(server.url + TEXT, headers={**stranger, **asking})
    assert asked.status_code == 403 and "access-control-allow-origin" not in asked.headers
    body = {"prompt": "a", "max_tokens": 1}
    refused = httpx.post(server.url + TEXT, json=body, headers=stranger)
    assert refused.status_code == 403 and "--allowed-origins" in refused.json()["error"]["message"]
    for origin in ("http://localhost:5000", "http://127.0.0.1:5000", "http://[::1]:5000"):
        assert httpx.post(server.url + TEXT, json=body, headers={"Origin": origin}).status_code == 200


# The log.


def test_each_request_is_a_line_of_the_log(server: RunningServer) -> None:
    body = {"prompt": ["reads lines", "a"], "max_tokens": 5, "n": 2, "ignore_eos": True}
    answer = httpx.post(server.url + TEXT, json=body, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    line = json.loads(server.wait_for(r'^\{.*"mine-1"', 5).string)
    usage = answer.json()["usage"]
    assert line.pop("milliseconds") > 0 and line.pop("time").endswith("+00:00")
    assert line == {
        "client": "127.0.0.1", "method": "POST", "path": TEXT, "status": 200, "request_id": "mine-1",
        "prompt_tokens": usage["prompt_tokens"], "generated_tokens": 20,
    }  # fmt: skip
    assert usage["completion_tokens"] == 20
    odd = httpx.get(f"{server.url}/no%0Aline?secret=1", headers={"X-Request-Id": "two words"})
    assert odd.status_code == 404 and len(odd.headers["x-request-id"]) == 32
    line = json.loads(server.wait_for(odd.headers["x-request-id"], 5).string)
    assert (line["path"], line["status"]) == ("/no\nline", 404)
