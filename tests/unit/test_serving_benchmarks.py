"""The parts of the serving benchmarks that compute: arrivals, what answers say, what counts as right."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable

import pytest

from benchmarks.serving import load_goals, over_full
from benchmarks.serving_abuse import Sample, abuse_goals, growth
from benchmarks.serving_abusers import ABUSERS, is_expected
from benchmarks.serving_client import Address, Answer, fetch, stream_answer, take_event
from benchmarks.serving_kills import ending, kill_goals
from benchmarks.serving_statistics import (
    Bound,
    most_at_once,
    poisson_arrivals,
    quantiles,
    shared_beginning,
    summarise,
)


def answer(started: float, *token_times: float, **fields: object) -> Answer:
    """A whole one that ends with its last token."""
    given = {"status": 200, "finish_reason": "length", "ended": token_times[-1] if token_times else started}
    return Answer(started, token_times=list(token_times), **{**given, **fields})


def test_arrivals_are_poisson() -> None:
    times = poisson_arrivals(4.0, 20_000, seed=1)
    gaps = [later - before for before, later in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)  # of an exponential: its mean
    assert times == poisson_arrivals(4.0, 20_000, seed=1) != poisson_arrivals(4.0, 20_000, seed=2)


def test_a_load_is_summed_up() -> None:
    answers = [
        answer(0.0, 0.5, 0.6, 0.9),
        answer(1.0, 3.0, 3.1),  # late
        answer(1.0, 1.2, 2.0),  # slow
        answer(2.0, 2.1, error="EngineFailed", finish_reason=None, ended=4.0),
        answer(2.0, error="busy", status=429, finish_reason=None, ended=2.1),
        answer(2.0, 2.2, error="closed", finish_reason=None, is_cut=True, ended=2.3),
    ]
    summary = summarise(answers, Bound(first_token_seconds=1.0, between_tokens_seconds=0.25))
    assert (summary["requests"], summary["whole"], summary["refused"], summary["cut"]) == (6, 3, 1, 1)
    assert summary["seconds"] == 4.0
    assert summary["requests_per_second"] == 3 / 4
    assert summary["tokens_per_second"] == 7 / 4
    assert summary["goodput_requests_per_second"] == 1 / 4
    assert summary["within_bound"] == pytest.approx(1 / 6)
    assert summary["seconds_to_first_token"]["p50"] == pytest.approx(0.5)
    assert summary["seconds_between_tokens"]["p50"] == pytest.approx(0.2)
    assert summary["seconds_to_end"]["p99"] == pytest.approx(2.1, abs=0.03)


def test_quantiles_lie_between_neighbours() -> None:
    assert quantiles([]) is None
    assert quantiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}
    assert quantiles(range(101)) == {"p50": 50, "p95": 95, "p99": 99}


def test_requests_that_are_open_at_one_moment() -> None:
    assert most_at_once([answer(0, 2), answer(1, 3), answer(2, 4), answer(5, 6)]) == 2
    assert most_at_once([answer(0, 9), answer(1, 2), answer(1.5, 3), answer(1.7, 3)]) == 4


def test_where_answers_part() -> None:
    assert shared_beginning([1, 2, 3], [1, 2, 4]) == 2
    assert shared_beginning([1, 2], [1, 2, 4]) == 2
    assert shared_beginning([5], [1]) == 0


def test_events_become_an_answer() -> None:
    one = Answer(0.0)
    chunk = {"index": 0, "text": "ab", "exit_layers": [2, 6], "token_ids": [7, 8], "finish_reason": None}
    events = [{"choices": [chunk]}, {"choices": [{**chunk, "text": "c", "token_ids": [9], "exit_layers": [6]}]}]
    events += [{"choices": [one]} for one in ({"delta": {"content": "d"}}, {"text": "", "finish_reason": "length"})]
    for number, event in enumerate([*events, {"choices": [], "usage": {}}], start=1):
        take_event(one, b"data: " + json.dumps(event).encode(), float(number))
    take_event(one, b"data: [DONE]", 9.0)
    take_event(one, b": a comment", 9.0)
    assert (one.text, one.token_ids, one.token_times) == ("abcd", [7, 8, 9], [1, 1, 2, 3])
    assert one.is_whole
    take_event(one, b'data: {"error": {"message": "dead"}}', 9.0)
    assert not one.is_whole
    assert not one.is_cut


def respond(response: bytes) -> Callable[[Address], object]:
    """A server that answers every connection with these bytes and closes it."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await writer.drain()
        writer.close()

    def run(call: Callable[[Address], object]) -> object:
        async def main() -> object:
            server = await asyncio.start_server(handle, "127.0.0.1", 0)
            async with server:
                return await call(Address(*server.sockets[0].getsockname()[:2]))

        return asyncio.run(main())

    return run


STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def test_a_stream_is_read_wherever_its_pieces_end() -> None:
    events = b'data: {"choices": [{"text": "hi", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    pieces = b"".join(chunk(events[at : at + 7]) for at in range(0, len(events), 7))
    one = respond(STREAM + pieces + b"0\r\n\r\n")(lambda address: stream_answer(address, {"prompt": "a"}))
    assert (one.status, one.text, one.is_whole) == (200, "hi", True)


@pytest.mark.parametrize("response", [b"", STREAM, STREAM + chunk(b'data: {"choices": []}\n\n'), STREAM + b"40\r\nabc"])
def test_connections_that_are_cut_are_seen(response: bytes) -> None:
    one = respond(response)(lambda address: stream_answer(address, {"prompt": "a"}))
    assert one.is_cut
    assert not one.is_whole
    assert ending(one) == "a cut connection"


def test_a_refusal_keeps_its_words() -> None:
    server = respond(b"HTTP/1.1 429 Busy\r\ncontent-length: 5\r\n\r\nlater")
    one = server(lambda address: stream_answer(address, {"prompt": "a"}))
    assert (one.status, one.error, one.is_cut) == (429, "later", False)
    assert ending(one) == "status 429"
    assert server(lambda address: fetch(address, "GET", "/health")) == (429, b"later")


def run(case: str, number: int, tokens_per_second: float, **verdicts: int) -> dict:
    times = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    return {
        "case": case, "round": number, "share": 0.5, "tokens_per_second": tokens_per_second,
        "goodput_requests_per_second": 0.0, "seconds_to_first_token": times, "seconds_between_tokens": times,
        "seconds_to_end": None if case == "slow" else times, "verdicts": verdicts,
    }  # fmt: skip


def test_ratios_are_those_of_the_same_round() -> None:
    runs = [run("full", 0, 10.0), run("early_exit", 0, 20.0), run("full", 1, 100.0), run("early_exit", 1, 110.0)]
    (ratios,) = over_full(runs)
    assert ratios["tokens_per_second"] == pytest.approx((2.0 + 1.1) / 2)
    assert ratios["goodput"] is None  # nothing was in time to compare with
    assert over_full([run("full", 0, 1.0), run("slow", 0, 1.0)])[0]["seconds_to_end_p50"] is None


def test_a_load_fails_by_lost_or_wrong_answers_of_our_server() -> None:
    met = lambda *runs: load_goals(runs)["no_answer_is_lost_or_wrong"]["met"]
    assert met(run("full", 0, 1.0, equal=5, rounding=1), run("transformers serve", 0, 1.0, lost=3))
    assert not met(run("full", 0, 1.0, equal=5, wrong=1))
    assert not met(run("early_exit", 0, 1.0, equal=5, lost=1))


def sample(**fields: float) -> Sample:
    default = {"seconds": 0, "health": 200, "health_seconds": 0.1, "tasks": 3, "files": 20, "engine_files": 30}
    return Sample(**{**default, "memory_mib": 100.0, "engine_memory_mib": 300.0, **fields})


def abuse_results(**fields: object) -> dict:
    before = vars(sample())
    return {
        "samples": [before], "before": before, "after": before, "answers_open_afterwards": 0,
        "good_requests": {"equal": 9}, "good_requests_afterwards": {"equal": 4},
        "bad_requests": {"no_http": {"400": 3, "closed": 1}},
        "growth_mib": {"memory_mib": 1.0, "engine_memory_mib": -2.0}, **fields,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("goal", "fields"),
    [
        ("good_answers_are_right", {"good_requests": {"equal": 9, "wrong": 1}}),
        ("good_answers_are_right", {"good_requests": {}}),
        ("good_answers_are_right_afterwards", {"good_requests_afterwards": {"lost": 1}}),
        ("bad_requests_are_refused", {"bad_requests": {"no_http": {"500": 1, "400": 8}}}),
        ("bad_requests_are_refused", {"bad_requests": {"half_body": {"hangs": 1}}}),
        ("bad_requests_are_refused", {"bad_requests": {"malformed_json": {"200": 1}}}),
        ("health_is_true_throughout", {"samples": [vars(sample()), vars(sample(health=503))]}),
        ("no_tasks_or_files_are_left", {"after": vars(sample(tasks=4))}),
        ("no_tasks_or_files_are_left", {"after": vars(sample(engine_files=31))}),
        ("no_answer_is_left", {"answers_open_afterwards": 1}),
        ("memory_stays", {"growth_mib": {"memory_mib": 40.0, "engine_memory_mib": 0.0}}),
    ],
)
def test_each_goal_of_abuse_can_be_missed(goal: str, fields: dict) -> None:
    assert all(one["met"] for one in abuse_goals(abuse_results(), growth_mib=32).values())
    goals = abuse_goals(abuse_results(**fields), growth_mib=32)
    assert [name for name, one in goals.items() if not one["met"]] == [goal]


def test_growth_leaves_out_the_first_quarter() -> None:
    samples = [sample(memory_mib=memory) for memory in [*range(100, 200, 4), *[200] * 65, *[207] * 10]]
    assert growth(samples) == {"memory_mib": 7.0, "engine_memory_mib": 0.0}


def test_kinds_of_abuse_have_names_of_their_own() -> None:
    assert len({abuser.__name__ for abuser in ABUSERS}) == len(ABUSERS)
    assert all(map(is_expected, ("left", "closed", "400", "413", "431", "503")))
    assert not any(map(is_expected, ("200", "500", "hangs")))


def kill(**fields: object) -> dict:
    return {
        "killed": "engine", "hanging": 0, "processes_left": 0, "seconds_until_the_last_was_told": 1.0,
        "seconds_until_not_ready": 0.5, "what_they_saw": {"an error event": 4}, "verdicts": {"equal": 2},
        "verdicts_after_restart": None, **fields,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("goal", "fields"),
    [
        ("nothing_hangs", {"hanging": 1}),
        ("nothing_hangs", {"processes_left": 1}),
        ("every_request_is_told_within_10_seconds", {"seconds_until_the_last_was_told": 11.0}),
        ("not_ready_within_10_seconds", {"seconds_until_not_ready": None}),
        ("no_connection_is_cut_while_the_http_process_lives", {"what_they_saw": {"a cut connection": 1}}),
        ("whole_answers_are_right", {"verdicts": {"wrong": 1}}),
        ("answers_after_a_restart", {"verdicts_after_restart": {}}),
    ],
)
def test_each_goal_of_kills_can_be_missed(goal: str, fields: dict) -> None:
    of_http = kill(killed="HTTP", what_they_saw={"a cut connection": 1})
    assert all(one["met"] for one in kill_goals([kill(), of_http]).values())
    assert [name for name, one in kill_goals([kill(), kill(**fields)]).items() if not one["met"]] == [goal]
