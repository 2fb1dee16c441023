"""Decodes in all ways, in turn, with ranks that sleep, and expects of each what formulas and simulation say."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.pipeline_inference import formulas
from benchmarks.pipeline_inference.formulas import Costs
from benchmarks.pipeline_inference.simulation import Setting, simulate, window
from benchmarks.pipeline_inference.workers import (
    NUM_POSITIONS,
    THRESHOLD,
    VOCAB_SIZE,
    PassTimes,
    Script,
    exit_config,
    factory,
)
from benchmarks.rounds import progress
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.distributed import start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import RequestResult

SHORT_PASS = 0.002
"""Seconds of a pass of a stage when the rest of a token is measured."""
NUM_SLOTS = 16


@dataclass(frozen=True)
class Setup:
    """What is measured. Times in seconds, of one stage."""

    num_stages: int = 4
    alpha: float = 0.02
    beta: float = 0.0004
    head: float = 0.001
    """A twentieth of a stage: a head with 128,000 ids of a model of 70B parameters on four stages."""
    shares: tuple[float, ...] = (0.6, 0.2, 0.1, 0.1)
    acceptance: float = 0.8
    draft_length: int = 3
    collectives: float = 0.2
    """Time of a layer's collectives as a share of the layer's time on one device (stated, not measured): two
    all-reduces of some rows take some ten microseconds each over NVLink, and a layer that reads 0.4 GB takes 130."""
    seconds: float = 4.0
    """About, for each case of a round; of one request twice and a half as long, since it meets fewer tokens."""
    num_requests: tuple[int, ...] = (1, 4, 16)
    rounds: int = 3
    seed: int = 0

    def window(self, num_requests: int) -> int:
        """As the engine chooses it."""
        return window(Costs(self.alpha, self.beta), self.num_stages, num_requests)


class Ranks:
    """An engine over processes that sleep."""

    def __init__(self, setup: Setup, num_stages: int, folder: Path) -> None:
        """num_stages: 1: all layers in one process."""
        self.num_layers, self.script = setup.num_stages, Script(setup.seed, setup.shares, setup.acceptance)
        self.times = PassTimes(str(folder / f"times_{num_stages}"))
        self.times.write(0.0, 0.0, 0.0)
        made = factory(
            times=str(folder / f"times_{num_stages}"), num_layers=self.num_layers, num_stages=num_stages,
            num_slots=NUM_SLOTS, seed=setup.seed, shares=list(setup.shares), acceptance=setup.acceptance,
        )  # fmt: skip
        self.executor = start_workers(made, Layout(1, num_stages))
        self.engine = Engine(self.executor, exit_config(self.num_layers))

    def close(self) -> None:
        self.executor.close()


@dataclass
class Run:
    """What some requests did that ran at once."""

    tokens_per_second: float
    """Of all of them, while all run."""
    results: list[RequestResult] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def shares(self, num_layers: int) -> tuple[float, ...]:
        """Of tokens that left after each layer."""
        layers = [token.exit_layer for result in self.results for token in result.tokens]
        return tuple(layers.count(layer) / len(layers) for layer in range(1, num_layers + 1))

    def acceptance(self, script: Script) -> float:
        """Share of tokens at which the exit says what the final head says."""
        right = [
            script.exit_token(position, before) == token
            for prompt, result in zip(self.prompts, self.results, strict=True)
            for position, (before, token) in enumerate(
                zip([prompt[-1], *result.token_ids], result.token_ids), start=len(prompt) - 1
            )
        ]
        return sum(right) / len(right)


def decode(ranks: Ranks, params: GenerationParams, num_requests: int, seed: str, warmup: int = 4) -> Run:
    """Run requests with prompts from `seed`. The rate is of the time from when each has `warmup` tokens until the first
    one ends."""
    engine, draw = ranks.engine, random.Random(seed)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(3)] for _ in range(num_requests)]
    engine.prepare(params)  # measures, for drafts alone, with the times that are slept now
    ids = [engine.add(prompt, params) for prompt in prompts]
    counts, results, times = dict.fromkeys(ids, 0), {}, []
    started = ended = None
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            counts[event.request_id] += len(event.tokens)
            if event.result is not None:
                results[event.request_id] = event.result
        if started is not None and ended is None:
            times.append((now, sum(len(event.tokens) for event in events)))
        if started is None and min(counts.values()) >= warmup:
            started = now
        if ended is None and results:
            ended = now
    answers = [results[one] for one in ids]
    if failed := [one.error for one in answers if one.error]:
        raise RuntimeError(failed[0])
    return Run(sum(count for _, count in times) / (ended - started), answers, prompts)


# What carrying a token costs.


def measure_overheads(ranks: Ranks, num_stages: int, seed: str, num_tokens: int = 60) -> Costs:
    """Seconds of a token beside its passes: heads, hops, turn (alpha and beta are 0). Measured with short passes."""
    ranks.times.write(SHORT_PASS, 0.0, 0.0)

    def overhead(layers: int, **settings: Any) -> float:
        run = decode(ranks, GenerationParams(max_tokens=num_tokens, **settings), 1, seed)
        return 1 / run.tokens_per_second - layers * SHORT_PASS

    last = ranks.num_layers
    full = overhead(last)
    first = overhead(1, mode="early_exit", exit_layers=(1,), exit_thresholds=(0.0,))
    never = overhead(last, mode="early_exit", exit_thresholds=(1.0,))
    head = max((never - full) / (last - 1), 0.0)
    hop = max((full - first) / (num_stages - 1), 0.0) if num_stages > 1 else 0.0
    return Costs(0.0, 0.0, head=head, hop=hop, turn=max(first - head, 0.0))  # a difference of two timings


# Cases.


@dataclass(frozen=True)
class Case:
    """One way to decode."""

    name: str
    settings: dict[str, Any]
    is_tensor_parallel: bool = False

    def params(self, num_tokens: int) -> GenerationParams:
        return GenerationParams(max_tokens=num_tokens, **self.settings)


def all_cases(setup: Setup) -> list[Case]:
    exits = {"mode": "early_exit", "exit_thresholds": (THRESHOLD,)}
    drafts = {"mode": "self_speculative", "draft_exit": 1}
    verified = {**drafts, "speculation": "draft_then_verify", "draft_length": setup.draft_length}
    return [
        Case("full", {}),
        Case("early_exit", exits),
        Case("draft_then_verify", verified),
        Case("across_stages", {**drafts, "speculation": "across_stages"}),
        Case("tp_full", {}, is_tensor_parallel=True),
        Case("tp_early_exit", exits, is_tensor_parallel=True),
    ]


@dataclass(frozen=True)
class Expectation:
    """Tokens per second."""

    formula: float
    is_bound: bool
    """Whether the formula only bounds it from above."""
    simulated: float | None
    """By events."""
    simulated_pausing: float | None
    """The same where stage 0 waits for the rows that it has just answered: what a real stage does by chance, as a pass
    takes a moment to end."""


def expect(
    setup: Setup, case: str, requests: int, costs: Costs, tp_costs: Costs, shares: Sequence[float], acceptance: float
) -> Expectation:
    """shares, acceptance: those of the tokens that were decoded."""
    stages = setup.num_stages
    if case.startswith("tp_"):
        layer = replace(tp_costs, alpha=tp_costs.alpha / stages, beta=tp_costs.beta / stages, hop=0.0)
        if case == "tp_full":
            return Expectation(requests / layer.token(stages, 1, requests), False, None, None)
        # A step of all requests ends with the row that leaves last.
        reached = [sum(shares[: depth + 1]) ** requests for depth in range(stages)]
        of_last = [after - before for before, after in zip([0.0, *reached], reached)]
        seconds = sum(share * layer.token(depth, depth, requests) for depth, share in enumerate(of_last, start=1))
        return Expectation(requests / seconds, False, None, None)
    mode = "across_stages" if case.startswith("across_stages") else case
    window = None
    if mode == "across_stages":
        window = setup.window(requests)
    setting = Setting(
        mode, stages, requests, costs, tuple(shares), acceptance, setup.draft_length, window=window, seed=setup.seed
    )
    simulated = [simulate(replace(setting, pause=pause)).tokens_per_time for pause in (0.0, 1.1 * costs.turn)]
    if case == "full" or window == 1:
        return Expectation(requests / formulas.full_token(costs, stages, requests), False, *simulated)
    if case == "early_exit":
        return Expectation(formulas.exit_throughput(costs, shares, requests), requests > 1, *simulated)
    token = {
        "draft_then_verify": lambda: formulas.drafted_token(costs, stages, acceptance, setup.draft_length),
        "across_stages": lambda: formulas.speculation_token(costs, stages, acceptance, window),
    }[mode]()
    return Expectation(requests / token, requests > 1, *simulated)


def measure(setup: Setup) -> list[dict[str, Any]]:
    """One row for each round, case and number of requests."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pipeline = stack.enter_context(closing(Ranks(setup, setup.num_stages, Path(folder))))
        one = stack.enter_context(closing(Ranks(setup, 1, Path(folder))))
        for number in range(setup.rounds):
            costs, tp_costs = _costs(setup, pipeline, one, f"{setup.seed} {number}")
            pipeline.times.write(setup.alpha, setup.beta, setup.head)
            stated = formulas.tensor_parallel(
                Costs(setup.alpha, setup.beta, setup.head), setup.num_stages, setup.collectives
            )
            one.times.write(stated.alpha / setup.num_stages, stated.beta / setup.num_stages, stated.head)
            for requests in setup.num_requests:
                tokens: dict[str, list[list[int]]] = {}
                for case in all_cases(setup):
                    progress(f"round {number + 1}: {case.name}, {requests} requests")
                    row = _measure_case(setup, case, requests, number, pipeline, one, costs, tp_costs, tokens)
                    rows.append(row)
                answers = {name: tokens[name] for name in tokens if not name.endswith("early_exit")}
                _check_equal(answers)
    return rows


def _costs(setup: Setup, pipeline: Ranks, one: Ranks, seed: str) -> tuple[Costs, Costs]:
    """(of the pipeline, of its ranks as tensor-parallel ones), with what carrying a token costs now."""
    stated = Costs(setup.alpha, setup.beta, setup.head)
    of_tp = formulas.tensor_parallel(stated, setup.num_stages, setup.collectives)
    measured = measure_overheads(pipeline, setup.num_stages, seed)
    measured_tp = measure_overheads(one, 1, seed)
    add = lambda costs, beside: replace(costs, head=costs.head + beside.head, hop=beside.hop, turn=beside.turn)
    return add(stated, measured), add(of_tp, measured_tp)


def _measure_case(
    setup: Setup, case: Case, requests: int, number: int, pipeline: Ranks, one: Ranks, costs: Costs, tp_costs: Costs,
    tokens: dict[str, list[list[int]]],
) -> dict[str, Any]:  # fmt: skip
    ranks = one if case.is_tensor_parallel else pipeline
    about = expect(setup, case.name, requests, costs, tp_costs, setup.shares, setup.acceptance)
    rate = about.simulated or about.formula
    seconds = setup.seconds * (2.5 if requests == 1 else 1)
    num_tokens = min(max(round(seconds * rate / requests), 12), NUM_POSITIONS - 8)
    run = decode(ranks, case.params(num_tokens), requests, f"{setup.seed} {number} {requests}")
    tokens[case.name] = [result.token_ids for result in run.results]
    shares, acceptance = run.shares(setup.num_stages), run.acceptance(ranks.script)
    expected = expect(setup, case.name, requests, costs, tp_costs, shares, acceptance)
    return {
        "round": number, "case": case.name, "requests": requests, "tokens": num_tokens,
        "tokens_per_second": run.tokens_per_second, "shares": shares, "acceptance": acceptance,
        **asdict(expected),
        "costs": asdict(tp_costs if case.is_tensor_parallel else costs),
    }  # fmt: skip


def _check_equal(answers: dict[str, list[list[int]]]) -> None:
    """Raise RuntimeError unless speculation gives what all layers give, as far as answers go."""
    for name, mine in answers.items():
        for one, other in zip(mine, answers["full"], strict=True):
            length = min(len(one), len(other))
            if list(one[:length]) != list(other[:length]):
                raise RuntimeError(f"{name} does not give the tokens of full passes")
