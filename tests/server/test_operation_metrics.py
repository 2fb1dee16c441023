"""The numbers of /metrics against requests that were made: counts are equal, not near."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.raw_http import connect, post
from tests.server.serving import RunningServer, start_server

PREFIX = "early_exit_"
Numbers = dict[tuple[str, tuple], float]


def numbers(server: RunningServer) -> Numbers:
    """By name without prefix and labels."""
    text = httpx.get(f"{server.url}/metrics").text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(one.name.removeprefix(PREFIX), tuple(sorted(one.labels.items()))): one.value for one in samples}


def changes(before: Numbers, after: Numbers, name: str) -> dict[tuple, float]:
    """By labels, where something has changed."""
    found = {labels: value - before.get((key, labels), 0.0) for (key, labels), value in after.items() if key == name}
    return {labels: value for labels, value in found.items() if value}


def change(before: Numbers, after: Numbers, name: str, **labels: str) -> float:
    key = name, tuple(sorted(labels.items()))
    return after.get(key, 0.0) - before.get(key, 0.0)


REQUESTS = [
    {
        "prompt": "reads lines",
        "max_tokens": 12,
        "mode": "early_exit",
        "exit_thresholds": [0.9, 0.5],
        "ignore_eos": True,
    },
    {"prompt": ["a small model", "b"], "n": 2, "max_tokens": 7, "ignore_eos": True},
    {"prompt": "one of four", "max_tokens": 20, "mode": "self_speculative", "draft_length": 3, "ignore_eos": True},
    {"prompt": "stops at once", "max_tokens": 20, "temperature": 1.5, "seed": 5},
]


def test_counts_are_those_of_the_answers(server: RunningServer) -> None:
    before, usages, choices, tokens = numbers(server), [], [], Counter()
    for request in REQUESTS:
        answer = httpx.post(f"{server.url}/v1/completions", json=request).json()
        usages.append(answer["usage"])
        choices += answer["choices"]
        for exit_layer, count in answer["usage"]["early_exit"]["tokens_by_exit"].items():
            tokens[("exit_layer", exit_layer), ("mode", request.get("mode", "full"))] += count
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": []}).status_code == 400
    after = numbers(server)
    assert changes(before, after, "generation_tokens_total") == {key: count for key, count in tokens.items() if count}
    assert len(+tokens) > 3, "several exits and modes"
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert change(before, after, "prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    for name in ("drafted", "accepted"):
        count = sum(usage["early_exit"][name] for usage in usages)
        assert change(before, after, f"{name}_tokens_total") == count
        assert count > 0 or name == "accepted"
    reasons = Counter((("finished_reason", one["finish_reason"]),) for one in choices)
    assert changes(before, after, "request_success_total") == reasons
    num_answers = len(choices)
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert change(before, after, f"{name}_seconds_count") == num_answers
    assert change(before, after, "inter_token_latency_seconds_count") == generated - num_answers
    assert (
        0
        < change(before, after, "time_to_first_token_seconds_sum")
        < change(before, after, "e2e_request_latency_seconds_sum")
    )
    # The shares that the responses tell, from counters: requests of one mode that generated one answer.
    for request, usage in zip(REQUESTS, usages):
        if request.get("mode") in ("early_exit", "self_speculative"):
            labels = {"mode": request["mode"]}
            full = change(before, after, "full_model_layer_passes_total", **labels)
            for saved, name in (("layers_saved", "layer_passes_total"), ("runs_saved", "layer_runs_total")):
                share = 1 - change(before, after, name, **labels) / full
                assert share == pytest.approx(usage["early_exit"][saved], abs=1e-4)
    assert change(before, after, "http_responses_total", status="200") == len(REQUESTS) + 1  # that of the first metrics
    assert change(before, after, "http_responses_total", status="400") == 1


def test_gauges_follow_what_runs_and_what_waits(server: RunningServer) -> None:
    """Of 20 answers 4 have a slot. When their client goes, they are counted as cancelled, and nothing runs."""
    body = {"prompt": "a", "n": 20, "max_tokens": 240, "ignore_eos": True, "stream": True}
    before = numbers(server)
    connection = connect(server.url)
    connection.sendall(post("/v1/completions", json.dumps(body)))
    connection.recv(4096)
    seen = until(server, lambda now: now["num_requests_running", ()] == 4)
    assert 0 < seen["num_requests_waiting", ()] <= 16 and 0 < seen["kv_cache_usage_perc", ()] <= 1
    connection.close()
    seen = until(server, lambda now: now["num_requests_running", ()] == now["kv_cache_usage_perc", ()] == 0)
    assert seen["num_requests_waiting", ()] == 0
    ended = {labels[0][1]: count for labels, count in changes(before, seen, "request_success_total").items()}
    assert ended["cancelled"] >= 12 and sum(ended.values()) == 20


def until(server: RunningServer, condition: object, seconds: float = 20) -> Numbers:
    deadline = time.monotonic() + seconds
    while not condition(now := numbers(server)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return now


def settled(server: RunningServer) -> Numbers:
    """When stages have told of all that ran before; they do so once a second."""
    before = numbers(server)
    while True:
        time.sleep(2.2)
        now = numbers(server)
        if not changes(before, now, "stage_rows_total"):
            return now
        before = now


def check_stages(server: RunningServer, num_stages: int) -> None:
    """Stages run the rows that requests have: prompts, then one for each further token."""
    before = settled(server)
    body = {"prompt": list(range(5, 45)), "max_tokens": 11, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    rows = lambda now: list(changes(before, now, "stage_rows_total").values())
    after = until(server, lambda now: sum(rows(now)) >= num_stages * 50)
    assert rows(after) == [50] * num_stages
    for stage in range(num_stages):
        assert 11 <= change(before, after, "stage_passes_total", stage=str(stage)) <= 12
        assert 0 < change(before, after, "stage_busy_seconds_total", stage=str(stage)) < 30
        assert after["stage_backlog_rows", (("stage", str(stage)),)] == 0


def test_the_load_of_one_stage(server: RunningServer) -> None:
    check_stages(server, 1)


def test_the_load_of_stages_in_processes_of_their_own(checkpoint: Path) -> None:
    flags = ("--pipeline-model-parallel-size", 2, "--max-requests", 2, "--no-access-log")
    with start_server(checkpoint, *flags) as running:
        check_stages(running.wait_until_ready(), 2)
        assert not any(line.startswith("{") for line in running.lines), "no log of requests"
