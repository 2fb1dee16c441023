"""Ways to decode, measured side by side: the same prompts, in turn, so that a slow moment of the machine meets all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import RequestResult

Ids = Sequence[int]


@dataclass(frozen=True)
class Run:
    """Some prompts, answered at once."""

    answers: tuple[tuple[int, ...], ...]
    """Tokens of each answer, in the order of prompts."""
    decode_tokens: int
    """Tokens that came after all of them had their first."""
    decode_seconds: float
    """In which they came."""
    results: tuple[RequestResult, ...] = ()
    """Of our engine."""
    first_token_seconds: float | None = None
    """From the start until all had their first token."""
    fastest_step_seconds: float | None = None
    """Of our engine: the fastest of the steps that gave each prompt a token or more; None: there was none, as over
    pipeline stages, which work on several at once."""

    @property
    def seconds_per_token(self) -> float:
        """Of decoding; NaN if it gave none."""
        return self.decode_seconds / self.decode_tokens if self.decode_tokens else np.nan


Way = Callable[[Sequence[Ids]], Run]
"""One way to decode: answers some prompts at once."""


def decode(engine: Engine, params: GenerationParams, prompts: Sequence[Ids], *, keep_prefixes: bool = False) -> Run:
    """Answer prompts at once. keep_prefixes: use what slots still hold of them; without, all is computed.

    Raises ValueError for a request that fails, ExecutorError if the workers have ended."""
    if not keep_prefixes:
        engine.forget_prefixes()
    begun = time.perf_counter()
    ids = [engine.add(prompt, params) for prompt in prompts]
    results: dict[int, RequestResult] = {}
    waiting = set(ids)
    all_begun: float | None = None
    num_tokens, fastest = 0, None
    before = begun
    while engine.has_work:
        events, ended = engine.step(), time.perf_counter()
        if all_begun is not None:
            num_tokens += sum(len(event.tokens) for event in events)
            if len(events) == len(prompts):
                fastest = min(fastest or ended - before, ended - before)
        before = ended
        waiting -= {event.request_id for event in events}
        results |= {event.request_id: event.result for event in events if isinstance(event.result, RequestResult)}
        if all_begun is None and not waiting:
            all_begun = ended
    if engine.failure is not None:
        raise ExecutorError(engine.failure)
    in_order = tuple(results[one] for one in ids)
    failed = next((one for one in in_order if one.error is not None), None)
    if failed is not None:
        raise ValueError(f"a prompt could not be answered: {failed.error}")
    answers = tuple(tuple(one.token_ids) for one in in_order)
    assert all_begun is not None, "all have ended without a failure, so all have begun"
    return Run(answers, num_tokens, ended - all_begun, in_order, all_begun - begun, fastest)


@dataclass(frozen=True)
class Measurement:
    """One way to decode, over all prompts and rounds."""

    rounds: tuple[tuple[Run, ...], ...]
    """[rounds, groups of prompts that were answered at once]. The answers of all rounds are the same, but for
    rounding."""

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """Of each prompt, of the first round."""
        return [answer for run in self.rounds[0] for answer in run.answers]

    @property
    def results(self) -> list[RequestResult]:
        """Of each prompt, of the first round; empty if it was not our engine."""
        return [result for run in self.rounds[0] for result in run.results]

    @property
    def seconds_per_token(self) -> np.ndarray:
        """[rounds, groups], of decoding."""
        return np.array([[run.seconds_per_token for run in of_round] for of_round in self.rounds])

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: geometric mean over rounds and groups, so that ratios are those of `speed_ratio`; None if no
        answer has two tokens."""
        known = self.seconds_per_token[~np.isnan(self.seconds_per_token)]
        return float(np.exp(-np.log(known).mean())) if known.size else None

    @property
    def first_token_seconds(self) -> float | None:
        """Mean over requests and rounds; of others than our engine, until all of a group have one."""
        runs = [run for of_round in self.rounds for run in of_round]
        of_requests = [result.statistics.first_token_seconds for run in runs for result in run.results]
        return _mean(of_requests or [run.first_token_seconds for run in runs])

    @property
    def latency_per_token(self) -> float | None:
        """Mean over requests and rounds of the seconds between two tokens of one answer."""
        return _mean([
            result.statistics.decode_seconds / (len(result.tokens) - 1)
            for of_round in self.rounds for run in of_round for result in run.results if len(result.tokens) > 1
        ])  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def measure(
    ways: Mapping[str, Way],
    prompts: Sequence[Ids],
    batch: int,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Measurement]:
    """Every way over all prompts, `batch` at once, `rounds` times; those that are left over are not answered.

    Each group of prompts is answered in all ways before the next one, in an order that rotates. Each way answers one
    group before anything counts."""
    groups = [prompts[first : first + batch] for first in range(0, len(prompts) - batch + 1, batch)]
    if not groups:
        raise ValueError(f"{len(prompts)} prompts are fewer than the {batch} to answer at once")
    for way in ways.values():
        way(groups[0])
    runs: dict[str, list[list[Run]]] = {name: [[] for _ in range(rounds)] for name in ways}
    names, total = list(ways), rounds * len(groups)
    for number in range(total):
        turn, group = divmod(number, len(groups))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name][turn].append(ways[name](groups[group]))
        progress(number + 1, total)
    return {name: Measurement(tuple(map(tuple, of_way))) for name, of_way in runs.items()}
