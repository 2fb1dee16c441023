"""What pipeline stages, early exits and speculation bring in decoding, measured with real processes beside formulas.

    python -m benchmarks.pipeline_inference            (from the root of the repository)

The package's engine, executor and stages, a process for each rank, over a model of which only time is real
(`pipeline_inference_workers.py`): a pass of a stage sleeps for `alpha + beta * rows`, a head for `head`. Ranks that
sleep do not compete for cores, so what is measured is how passes, messages and decisions overlap. In each round, in
turn, with 1, 4 and 16 requests:
- full: all stages for every token, the baseline;
- early_exit: tokens leave at the stages with given shares;
- draft_then_verify, across_stages: drafts of the exit on stage 0, accepted with a given probability;
- tp_full, tp_early_exit: the same layers on as many tensor-parallel ranks, by a stated model: one process that sleeps
  as long as they would take.
What carrying a token costs beside its passes is measured with short passes before every round, and used in the formulas
and in the event simulation (`pipeline_inference_simulation.py`), which also shows pipelines of other lengths. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks import pipeline_inference_formulas as formulas
from benchmarks.pipeline_inference_formulas import Costs
from benchmarks.pipeline_inference_simulation import Mode, Outcome, Setting, simulate, window
from benchmarks.pipeline_inference_workers import (
    NUM_POSITIONS,
    THRESHOLD,
    VOCAB_SIZE,
    PassTimes,
    Script,
    exit_config,
    factory,
)
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.distributed import start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import RequestResult

SHORT_PASS = 0.002
"""Seconds of a pass of a stage when the rest of a token is measured."""
NUM_SLOTS = 16
SIMULATED_TOKENS = 1000
"""Of one request; of more, a third of it each."""


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
                    _progress(f"round {number + 1}: {case.name}, {requests} requests")
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


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# What comes of it.


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, by case and requests; ratios are of one round's pair."""
    by_key: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_key.setdefault((row["requests"], row["case"]), {})[row["round"]] = row
    summary = []
    for (requests, case), mine in by_key.items():
        baseline = by_key[requests, "full"]
        over_full = [row["tokens_per_second"] / baseline[number]["tokens_per_second"] for number, row in mine.items()]
        over_formula = [row["tokens_per_second"] / row["formula"] for row in mine.values()]
        over = lambda name: common.median([row["tokens_per_second"] / row[name] for row in mine.values() if row[name]])
        summary.append({
            "case": case, "requests": requests,
            "tokens_per_second": common.median([row["tokens_per_second"] for row in mine.values()]),
            "over_full": common.median(over_full), "over_full_range": [min(over_full), max(over_full)],
            "over_formula": common.median(over_formula), "over_formula_range": [min(over_formula), max(over_formula)],
            "is_bound": next(iter(mine.values()))["is_bound"],
            "over_simulated": over("simulated"), "over_simulated_pausing": over("simulated_pausing"),
            "acceptance": statistics.fmean(row["acceptance"] for row in mine.values()),
        })  # fmt: skip
    return summary


def simulate_pipelines(setup: Setup, costs: Costs) -> list[dict[str, Any]]:
    """Pipelines of 2, 4 and 8 stages, with the costs of one stage as measured."""
    return [
        _simulated_row(setup, costs, stages, requests) for stages in (2, 4, 8) for requests in (1, 4, 16)
    ]  # fmt: skip


def simulate_row_costs(setup: Setup, costs: Costs) -> list[dict[str, Any]]:
    """Four stages, by what a row costs beside a pass: from where weights are read to where arithmetic counts."""
    return [
        {"beta_over_alpha": share} | _simulated_row(setup, replace(costs, beta=share * costs.alpha), 4, requests)
        for share in (0.005, 0.1, 0.5, 2.0)
        for requests in (4, 16)
    ]


def _simulated_row(setup: Setup, costs: Costs, stages: int, requests: int) -> dict[str, Any]:
    """Tokens per second, over those of full passes."""
    shares, num_tokens = _spread(setup.shares, stages), SIMULATED_TOKENS if requests == 1 else SIMULATED_TOKENS // 3

    def run(mode: Mode, **changes: Any) -> Outcome:
        setting = Setting(mode, stages, requests, costs, shares, setup.acceptance, setup.draft_length)
        return simulate(replace(setting, **changes), num_tokens)

    full, exits, pause = run("full").tokens_per_time, run("early_exit"), 1.1 * costs.turn
    speeds = {
        "early_exit": exits,
        "early_exit_pausing": run("early_exit", pause=pause),
        "draft_then_verify": run("draft_then_verify"),
        "across_stages": run("across_stages"),
        "across_stages_pausing": run("across_stages", pause=pause),
    }
    row: dict[str, Any] = {"stages": stages, "requests": requests, "full_tokens_per_second": full}
    row["early_exit_bound"] = formulas.exit_throughput(costs, exits.shares, requests) / full
    return row | {name: outcome.tokens_per_time / full for name, outcome in speeds.items()}


def _spread(shares: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """The same shares by depth, with more or fewer stages."""
    if num_stages >= len(shares):
        each = num_stages // len(shares)
        return tuple(share / each for share in shares for _ in range(each))
    each = len(shares) // num_stages
    return tuple(sum(shares[first : first + each]) for first in range(0, len(shares), each))


def simulate_speculation(costs: Costs) -> list[dict[str, Any]]:
    """One request beside P / (a + P (1 - a)): without hops and heads, and with those that were measured."""
    rows = []
    for stages, acceptance in ((2, 0.8), (4, 0.8), (8, 0.8), (8, 0.94)):
        row: dict[str, Any] = {"stages": stages, "acceptance": acceptance}
        for name, one in (("bare", Costs(costs.alpha, 0.0)), ("measured", costs)):
            outcome = simulate(Setting("across_stages", stages, 1, one, acceptance=acceptance), 2 * SIMULATED_TOKENS)
            full = formulas.full_token(one, stages)
            expected = full / formulas.speculation_token(one, stages, outcome.acceptance)
            if name == "bare":
                expected = formulas.speculation_speedup(stages, outcome.acceptance)
            row[f"{name}_speedup"], row[f"{name}_formula"] = outcome.tokens_per_time * full, expected
        rows.append(row)
    return rows


def tensor_parallel_table(setup: Setup, costs: Costs, tp_costs: Costs) -> list[dict[str, float]]:
    """Milliseconds of a token of one request, by what collectives cost: formulas alone."""
    full, exits = formulas.full_token(costs, setup.num_stages), formulas.exit_token(costs, setup.shares)
    rows = []
    for collectives in (0.05, 0.2, 0.5, 1.0):
        stated = formulas.tensor_parallel(Costs(setup.alpha, setup.beta, setup.head), setup.num_stages, collectives)
        token = replace(stated, head=tp_costs.head, turn=tp_costs.turn).token(1)
        rows.append({"collectives": collectives, "tp": token, "pipeline_full": full, "pipeline_early_exit": exits})
    return rows


def goals(summary: Sequence[dict[str, Any]], speculation: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_key = {(row["case"], row["requests"]): row for row in summary}
    exits, across = by_key.get(("early_exit", 1)), by_key.get(("across_stages", 1))
    exact = [row for row in summary if not row["is_bound"]]
    beside = [{"case": row["case"], "requests": row["requests"], "over_formula": row["over_formula"]} for row in exact]
    of_bounds = [
        {name: row[name] for name in ("case", "requests", "over_simulated", "over_simulated_pausing")}
        for row in summary if row["is_bound"]
    ]  # fmt: skip
    long = [row["bare_speedup"] / row["bare_formula"] for row in speculation if row["stages"] == 8]
    return {
        "early exits of one request at least 2.2 times as fast": {
            "met": exits and exits["over_full"] >= 2.2, "over_full": exits and exits["over_full"],
        },
        "speculation across stages at least 0.9 of its formula": {
            "met": across and across["over_formula"] >= 0.9, "over_formula": across and across["over_formula"],
        },
        "within 10% of the formula": {
            "met": all(abs(row["over_formula"] - 1) <= 0.1 for row in beside), "checks": beside,
        },
        "where the formula is a bound, between the two simulations, within 10%": {
            "met": all(row["over_simulated"] >= 0.9 and row["over_simulated_pausing"] <= 1.1 for row in of_bounds),
            "checks": of_bounds,
        },
        "simulated speculation over 8 stages within 5% of the formula": {
            "met": all(abs(one - 1) <= 0.05 for one in long), "over_formula": long,
        },
    }  # fmt: skip


def _print(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(common.format_table(header, rows) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options: list[tuple[str, Callable[[str], Any], str]] = [
        ("num_stages", int, "pipeline stages"), ("alpha", float, "seconds of a pass"), ("beta", float, "and of a row"),
        ("head", float, "seconds of a head"), ("acceptance", float, "of drafts"), ("rounds", int, "of all cases"),
        ("seconds", float, "of a case"), ("collectives", float, "share of a layer's time on one device"),
    ]  # fmt: skip
    for name, kind, text in options:
        default = getattr(Setup, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text}; default {default}"
        )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=Setup.shares, help="of tokens that leave at each stage"
    )
    parser.add_argument("--num-requests", type=int, nargs="+", default=Setup.num_requests)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: a file in benchmarks/results")
    args = vars(parser.parse_args(argv))
    output = args.pop("output")
    args["shares"], args["num_requests"] = tuple(args["shares"]), tuple(args["num_requests"])
    setup, machine = Setup(**args), common.machine_info()
    rows = measure(setup)
    document = report(setup, rows, machine)
    common.finish(document, output)


def _median_costs(measured: Sequence[dict[str, float]]) -> Costs:
    return Costs(**{name: statistics.median(one[name] for one in measured) for name in measured[0]})


def report(setup: Setup, rows: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    """Print tables; returns the JSON document."""
    summary = summarise(rows)
    costs, tp_costs = (
        _median_costs([row["costs"] for row in rows if row["case"] == case]) for case in ("full", "tp_full")
    )
    pipelines, row_costs = simulate_pipelines(setup, costs), simulate_row_costs(setup, costs)
    speculation = simulate_speculation(costs)
    tensor_parallel = tensor_parallel_table(setup, costs, tp_costs)
    print("milliseconds beside passes: " + ", ".join(
        f"{name} {1000 * getattr(costs, name):.2f}" for name in ("head", "hop", "turn")
    ))  # fmt: skip
    _print(
        ["case", "requests", "tokens/s", "over full", "range", "over formula", "range", "bound", "over simulated",
         "pausing"],
        [
            [row["case"], row["requests"], f"{row['tokens_per_second']:.1f}", row["over_full"],
             "{:.2f}-{:.2f}".format(*row["over_full_range"]), row["over_formula"],
             "{:.2f}-{:.2f}".format(*row["over_formula_range"]), row["is_bound"], row["over_simulated"],
             row["over_simulated_pausing"]]
            for row in summary
        ],
    )  # fmt: skip
    print("simulated, over full passes")
    _print(list(pipelines[0]), [list(row.values()) for row in pipelines])
    _print(list(row_costs[0]), [list(row.values()) for row in row_costs])
    _print(list(speculation[0]), [list(row.values()) for row in speculation])
    print("seconds of a token of one request, by formula")
    _print(list(tensor_parallel[0]), [list(row.values()) for row in tensor_parallel])
    verdicts = goals(summary, speculation)
    _print(["goal", "met"], [[name, one["met"]] for name, one in verdicts.items()])
    results = {
        "summary": summary, "raw": rows, "simulated_pipelines": pipelines, "simulated_row_costs": row_costs,
        "simulated_speculation": speculation,
        "tensor_parallel_by_formula": tensor_parallel,
    }  # fmt: skip
    settings = asdict(setup) | {"niceness": os.nice(0)}
    return common.result_document("pipeline_inference", machine, settings, setup.seed, results, verdicts)


if __name__ == "__main__":
    main()
