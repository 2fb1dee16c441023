"""What the server brings and costs: an open loop of requests, many connections at once, HTTP beside the bare engine.

    python -m benchmarks.serving load --load CHECKPOINTS --hugging-face FOLDER
    python -m benchmarks.serving connections
    python -m benchmarks.serving cost --load CHECKPOINTS

Servers are real ones, over HTTP with streams on 127.0.0.1. Every answer is compared with that of the engine alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from benchmarks.serving_client import Address, Answer, stream_answer
from benchmarks.serving_offline import Case, Offline, cases
from benchmarks.serving_processes import Server, cpu_seconds, serve, serve_transformers
from benchmarks.serving_statistics import Bound, most_at_once, poisson_arrivals, summarise

FULL = {"mode": "full"}
EARLY_EXIT = {"mode": "early_exit", "exit_thresholds": 0.8}
SPECULATIVE = {"mode": "self_speculative"}
MODES = {"full": FULL, "early_exit": EARLY_EXIT, "self_speculative": SPECULATIVE}
TRANSFORMERS = "transformers serve"
_LONGEST_SECONDS = 300.0
"""Of one request: what takes longer counts as hanging."""


# Loads.


async def open_loop(
    address: Address, bodies: Sequence[dict[str, Any]], arrivals: Sequence[float]
) -> tuple[list[Answer], float]:
    """Send each request at its time, whatever has been answered. Returns the answers and the worst delay of sending."""
    start = time.perf_counter() + 0.1
    delays = []

    async def one(body: dict[str, Any], arrival: float) -> Answer:
        await asyncio.sleep(max(start + arrival - time.perf_counter(), 0.0))
        delays.append(time.perf_counter() - start - arrival)
        return await stream_answer(address, body, timeout=_LONGEST_SECONDS)

    answers = await asyncio.gather(*(one(*pair) for pair in zip(bodies, arrivals, strict=True)))
    return list(answers), max(delays)


async def at_once(address: Address, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Send all requests now."""
    return list(await asyncio.gather(*(stream_answer(address, body, timeout=_LONGEST_SECONDS) for body in bodies)))


# Open loop: modes and transformers at several rates.


class LoadRun:
    """The same requests at the same times for every case of a rate; all cases in turn in every round."""

    def __init__(self, offline: Offline, all_cases: list[Case], addresses: dict[str, Address], bound: Bound) -> None:
        self._offline, self._cases, self._addresses, self._bound = offline, all_cases, addresses, bound
        self.transformers_model = ""
        """What `transformers serve` calls its model."""
        self.right = {name: offline.answer(all_cases, mode) for name, mode in MODES.items()}

    def capacity(self, num_requests: int) -> float:
        """Requests a second of full passes when there are always enough: the rate beyond which queues grow."""
        bodies = [self._body("full", index % len(self._cases)) for index in range(num_requests)]
        answers = asyncio.run(at_once(self._addresses["full"], bodies))
        assert all(answer.is_whole for answer in answers), [answer.error for answer in answers]
        return summarise(answers, self._bound)["requests_per_second"]

    def measure(self, name: str, rate: float, num_requests: int, seed: int) -> dict[str, Any]:
        """One case at one rate."""
        draw = random.Random(seed)
        chosen = [draw.randrange(len(self._cases)) for _ in range(num_requests)]
        bodies = [self._body(name, index) for index in chosen]
        arrivals = poisson_arrivals(rate, num_requests, seed)
        answers, delay = asyncio.run(open_loop(self._addresses[name], bodies, arrivals))
        verdicts = Counter(self._judge(name, *pair) for pair in zip(answers, chosen, strict=True))
        return {**summarise(answers, self._bound), "verdicts": dict(verdicts), "worst_delay_of_sending": delay}

    def _body(self, name: str, index: int) -> dict[str, Any]:
        case = self._cases[index]
        if name in MODES:
            return case.body(MODES[name])
        fields = {"prompt": case.prompt, "max_tokens": case.num_tokens, "temperature": 0}
        return {"model": self.transformers_model, **fields}

    def _judge(self, name: str, answer: Answer, index: int) -> str:
        if name in MODES:
            return self._offline.judge(answer, self.right[name][index], MODES[name])
        if not answer.is_whole:
            return "lost"
        # No ids are sent: an answer that differs may do so by rounding or not.
        return "equal" if answer.text == self.right["full"][index].text else "other text"


@contextmanager
def without_ends(folder: Path) -> Iterator[Path]:
    """A copy of a folder of Hugging Face whose model ends no answer by itself, as `ignore_eos` asks of our server."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, Path(temporary) / "model"))
        for path in (copy / "config.json", copy / "generation_config.json"):
            if path.exists():
                path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
        yield copy


def run_load(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    bound = Bound(args.first_token_seconds, args.between_tokens_seconds)
    offline = Offline(args.load, args.slots)
    with ExitStack() as stack:
        server = stack.enter_context(serve(args.load, "--max-requests", args.slots))
        addresses = dict.fromkeys(MODES, server.address)
        if args.hugging_face:
            folder = stack.enter_context(without_ends(args.hugging_face))
            addresses[TRANSFORMERS] = stack.enter_context(serve_transformers(folder, *args.transformers_flags))
        run = LoadRun(offline, cases(*args.tokens, args.seed), addresses, bound)
        if args.hugging_face:
            run.transformers_model = str(folder)
        names = [*addresses]
        for name in names:
            run.measure(name, 100.0, 2, args.seed)  # warm up
        capacity = run.capacity(args.slots)
        runs = []
        for number in range(args.rounds):
            for share in args.shares:
                rate = share * capacity
                num_requests = max(round(rate * args.seconds), 4)
                for name in names if number % 2 == 0 else reversed(names):
                    measured = run.measure(name, rate, num_requests, args.seed + number)
                    runs.append({"round": number, "share": share, "rate": rate, "case": name, **measured})
                    print(describe(runs[-1]), flush=True)
    results = {"capacity_requests_per_second": capacity, "bound": asdict(bound), "over_full": over_full(runs)}
    return {**results, "runs": runs}, load_goals(runs)


def describe(run: dict[str, Any]) -> str:
    """One line of a run."""
    seconds = lambda name: "  ".join(f"{value:6.3f}" for value in (run[name] or {}).values())
    return (
        f"{run['case']:18} {run['rate']:6.2f}/s: {run['requests_per_second']:6.2f} requests/s, "
        f"{run['tokens_per_second']:7.1f} tokens/s, within bound {run['within_bound']:.2f}, first token "
        f"{seconds('seconds_to_first_token')}, between {seconds('seconds_between_tokens')}, {run['verdicts']}"
    )


def over_full(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds of each case's ratios to full passes at the same rate in the same round."""
    full = {(run["round"], run["share"]): run for run in runs if run["case"] == "full"}
    pairs: dict[tuple[str, float], list[tuple[dict, dict]]] = {}
    for run in runs:
        pairs.setdefault((run["case"], run["share"]), []).append((run, full[run["round"], run["share"]]))
    return [{"case": case, "share": share, **_ratios(some)} for (case, share), some in pairs.items() if case != "full"]


_FIRST, _BETWEEN, _END = "seconds_to_first_token", "seconds_between_tokens", "seconds_to_end"


def _ratios(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float | None]:
    def of(*names: str) -> float | None:
        def value(run: Any) -> Any:
            for name in names:
                run = None if run is None else run[name]
            return run

        ratios = [common.ratio(value(run), value(full)) for run, full in pairs]
        return common.median([one for one in ratios if one is not None])

    return {
        "tokens_per_second": of("tokens_per_second"),
        "goodput": of("goodput_requests_per_second"),
        f"{_FIRST}_p50": of(_FIRST, "p50"),
        f"{_BETWEEN}_p95": of(_BETWEEN, "p95"),
        f"{_END}_p50": of(_END, "p50"),
    }


def load_goals(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of our server alone."""
    verdicts: Counter[str] = Counter()
    for run in runs:
        if run["case"] in MODES:
            verdicts.update(run["verdicts"])
    return {"no_answer_is_lost_or_wrong": {"met": not verdicts["lost"] + verdicts["wrong"], "verdicts": dict(verdicts)}}


# Many connections.


def run_connections(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    with a_model(args.load) as checkpoint:
        offline = Offline(checkpoint, args.slots)
        all_cases = cases(*args.tokens, args.seed)
        right = {name: offline.answer(all_cases, mode) for name, mode in MODES.items()}
        plan = [(name, index % len(all_cases)) for index, name in enumerate(_in_turn(args.connections))]
        bodies = [all_cases[index].body(MODES[name]) for name, index in plan]
        with serve(checkpoint, "--max-requests", args.slots, "--max-waiting", args.connections) as server:
            answers = asyncio.run(at_once(server.address, bodies))
        pairs = zip(answers, plan, strict=True)
        verdicts = Counter(offline.judge(answer, right[name][index], MODES[name]) for answer, (name, index) in pairs)
    at_once_count = most_at_once(answers)
    results = {**summarise(answers, Bound()), "most_at_once": at_once_count, "verdicts": dict(verdicts)}
    print(f"{at_once_count} requests at once, {results['seconds']:.1f} s: {dict(verdicts)}")
    met = at_once_count == args.connections and set(verdicts) <= {"equal", "rounding"}
    goal = {"met": met, "most_at_once": at_once_count, "verdicts": dict(verdicts)}
    return results, {"all_connections_at_once_and_every_answer_right": goal}


def _in_turn(count: int) -> list[str]:
    names = [*MODES]
    return [names[index % len(names)] for index in range(count)]


@contextmanager
def a_model(path: str | None) -> Iterator[str]:
    """A checkpoint; without a path a tiny model with random weights."""
    if path is not None:
        yield path
        return
    from tests.server.models import plain_model

    with tempfile.TemporaryDirectory() as temporary:
        yield str(plain_model(Path(temporary)))


# Cost of HTTP.


def run_cost(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    with a_model(args.load) as checkpoint:
        offline = Offline(checkpoint, args.slots)
        chosen = [case for case, _ in zip(cases(args.tokens[1], args.tokens[1], args.seed), range(args.slots))]
        right = offline.answer(chosen, FULL)
        with serve(checkpoint, "--max-requests", args.slots) as server:
            asyncio.run(at_once(server.address, [case.body(FULL) for case in chosen]))  # warm up
            rounds = [_cost_round(offline, server, chosen, right, is_odd=bool(n % 2)) for n in range(args.rounds)]
    of = lambda name: common.median([one[name] for one in rounds])
    ratio = common.median_ratio([one["http_seconds"] for one in rounds], [one["engine_seconds"] for one in rounds])
    processor = common.median(
        [(one["http_cpu_us_a_token"] + one["engine_cpu_us_a_token"]) / one["bare_cpu_us_a_token"] for one in rounds]
    )
    results = {
        "http_over_engine": ratio,
        "processor_http_over_engine": processor,
        "interval": common.mean_ratio(
            [one["http_seconds"] for one in rounds], [one["engine_seconds"] for one in rounds]
        ) if args.rounds > 1 else None,
        **{name: of(name) for name in rounds[0]},
        "rounds": rounds,
    }  # fmt: skip
    print(
        f"over HTTP / of the engine: {ratio:.3f} by the clock, {processor:.3f} by the processor; microseconds a token: "
        f"engine {of('engine_us_a_token'):.0f}, over HTTP {of('http_us_a_token'):.0f}; of the processor's: bare engine "
        f"{of('bare_cpu_us_a_token'):.0f}, engine's process {of('engine_cpu_us_a_token'):.0f}, HTTP process "
        f"{of('http_cpu_us_a_token'):.0f}, client {of('client_cpu_us_a_token'):.0f}"
    )
    return results, {"http_costs_at_most_5_percent": {"met": ratio <= 1.05, "http_over_engine": ratio}}


def _cost_round(
    offline: Offline, server: Server, chosen: Sequence[Case], right: Sequence[Any], is_odd: bool
) -> dict[str, float]:
    """The same requests over HTTP and by the engine in this process, one after the other."""
    num_tokens = sum(case.num_tokens for case in chosen)
    this = psutil.Process()

    def bare() -> dict[str, float]:
        before, cpu = time.perf_counter(), cpu_seconds(this)
        offline.answer(chosen, FULL)
        seconds = time.perf_counter() - before
        return {
            "engine_seconds": seconds,
            "engine_us_a_token": seconds / num_tokens * 1e6,
            "bare_cpu_us_a_token": (cpu_seconds(this) - cpu) / num_tokens * 1e6,
        }

    def over_http() -> dict[str, float]:
        bodies = [{**case.body(FULL), "return_token_ids": False} for case in chosen]
        http, engine = server.cpu_seconds()
        client, before = cpu_seconds(this), time.perf_counter()
        answers = asyncio.run(at_once(server.address, bodies))
        seconds = time.perf_counter() - before
        http_after, engine_after = server.cpu_seconds()
        texts = [output.text for output in right]
        equal = statistics.fmean(answer.text == text for answer, text in zip(answers, texts, strict=True))
        assert sum(len(answer.token_times) for answer in answers) == num_tokens, [answer.error for answer in answers]
        return {
            "http_seconds": seconds,
            "http_us_a_token": seconds / num_tokens * 1e6,
            "http_cpu_us_a_token": (http_after - http) / num_tokens * 1e6,
            "engine_cpu_us_a_token": (engine_after - engine) / num_tokens * 1e6,
            "client_cpu_us_a_token": (cpu_seconds(this) - client) / num_tokens * 1e6,
            "equal_texts": equal,
        }

    first, second = (over_http, bare) if is_odd else (bare, over_http)
    return {**first(), **second()}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    load = parts.add_parser("load", help="open loop at several rates: modes of early exit, and transformers")
    load.add_argument("--load", required=True, metavar="DIR", help="checkpoints of a model with exits")
    load.add_argument("--hugging-face", type=Path, metavar="DIR", help="the same model for `transformers serve`")
    load.add_argument("--transformers-flags", nargs="*", default=[], metavar="FLAG", help="without the first dashes")
    load.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.8, 1.6], help="rates, over the capacity")
    load.add_argument("--seconds", type=float, default=20.0, help="of arrivals, for each case and rate")
    load.add_argument("--rounds", type=int, default=3)
    load.add_argument("--first-token-seconds", type=float, default=1.0, help="bound of goodput")
    load.add_argument("--between-tokens-seconds", type=float, default=0.2, help="bound of goodput, mean of an answer")
    connections = parts.add_parser("connections", help="many streams at once, every answer compared")
    connections.add_argument("--connections", type=int, default=500)
    cost = parts.add_parser("cost", help="HTTP beside the engine without a server")
    cost.add_argument("--rounds", type=int, default=9)
    for part, slots, tokens in ((load, 16, (16, 48)), (connections, 64, (100, 200)), (cost, 16, (64, 64))):
        part.add_argument("--slots", type=int, default=slots, help="requests that run at once")
        part.add_argument("--tokens", type=int, nargs=2, default=tokens, metavar="N", help="shortest, longest answer")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--output", type=Path, metavar="FILE", help="default: a file in benchmarks/results")
        part.add_argument("--model-name", default="tiny", help="what the model is, for the result")
        if part is not load:
            part.add_argument("--load", metavar="DIR", help="default: a tiny model with random weights")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.transformers_flags = [f"--{flag}" for flag in getattr(args, "transformers_flags", [])]
    machine = common.machine_info()
    results, goals = {"load": run_load, "connections": run_connections, "cost": run_cost}[args.part](args)
    settings = {name: value for name, value in vars(args).items() if name not in ("load", "hugging_face", "output")}
    settings["threads"] = threads()
    name = f"serving_{args.part}_{args.model_name}"
    common.finish(common.result_document(name, machine, settings, args.seed, results, goals), args.output)
    return 0 if all(goal["met"] for goal in goals.values()) else 1


def threads() -> int:
    """Of torch, in this process; servers inherit what says so."""
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    sys.exit(main())
