"""Arrivals of requests, and what a load's answers say: rates, latencies, goodput, and whether they are right."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving_client import Answer


@dataclass(frozen=True)
class Bound:
    """What a user still calls fast."""

    first_token_seconds: float = 1.0
    between_tokens_seconds: float = 0.2
    """Mean of one answer."""

    def is_kept(self, answer: Answer) -> bool:
        """Whether an answer is whole and in time."""
        if not answer.is_whole or not answer.token_times:
            return False
        first = answer.token_times[0] - answer.started
        return first <= self.first_token_seconds and (mean_gap(answer) or 0.0) <= self.between_tokens_seconds


def poisson_arrivals(rate: float, num_requests: int, seed: int) -> list[float]:
    """Seconds after the start at which requests come, `rate` a second on average and independent of each other."""
    draw, times, now = random.Random(seed), [], 0.0
    for _ in range(num_requests):
        now += draw.expovariate(rate)
        times.append(now)
    return times


def mean_gap(answer: Answer) -> float | None:
    """Mean seconds between tokens; None for a single token."""
    times = answer.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99, between neighbouring values in proportion; None for no values."""
    if not values:
        return None
    if len(values) == 1:
        return dict.fromkeys(("p50", "p95", "p99"), values[0])
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def summarise(answers: Sequence[Answer], bound: Bound) -> dict[str, Any]:
    """Of one load: counts, requests and tokens a second from its first request to its last answer, seconds to the first
    token, between tokens (of tokens that came together all but one have 0) and to the end, of whole answers."""
    whole = [answer for answer in answers if answer.is_whole]
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    gaps = [
        later - before
        for answer in whole
        for before, later in zip(answer.token_times, answer.token_times[1:], strict=False)
    ]
    return {
        "requests": len(answers),
        "whole": len(whole),
        "refused": sum(answer.status in (429, 503) for answer in answers),
        "cut": sum(answer.is_cut for answer in answers),
        "seconds": seconds,
        "requests_per_second": len(whole) / seconds,
        "tokens_per_second": sum(len(answer.token_times) for answer in whole) / seconds,
        "goodput_requests_per_second": sum(map(bound.is_kept, answers)) / seconds,
        "within_bound": sum(map(bound.is_kept, answers)) / len(answers),
        "seconds_to_first_token": quantiles([a.token_times[0] - a.started for a in whole if a.token_times]),
        "seconds_between_tokens": quantiles(gaps),
        "seconds_to_end": quantiles([answer.ended - answer.started for answer in whole]),
    }


def most_at_once(answers: Sequence[Answer]) -> int:
    """The largest number of requests that were open at one moment."""
    changes = sorted([(answer.started, 1) for answer in answers] + [(answer.ended, -1) for answer in answers])
    open_now = most = 0
    for _, change in changes:
        open_now += change
        most = max(most, open_now)
    return most


def shared_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
