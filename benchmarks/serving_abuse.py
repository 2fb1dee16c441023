"""Whether the server stands what no client should do, and what is seen when one of its processes dies.

    python -m benchmarks.serving_abuse abuse --seconds 240
    python -m benchmarks.serving_abuse kill

`abuse`: all kinds of bad requests beside a steady stream of good ones, whose answers are compared with the engine's
alone. `kill`: SIGKILL for each process in turn while requests are answered. Everything goes to 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.serving import MODES, a_model
from benchmarks.serving_abusers import ABUSERS, is_expected
from benchmarks.serving_client import fetch, stream_answer
from benchmarks.serving_offline import Offline, cases
from benchmarks.serving_processes import Server, serve
from benchmarks.serving_statistics import quantiles

MIB = 2**20
_NUM_GOOD, _NUM_BAD = 2, 8
"""Clients that are there at any time."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    seconds: float
    """Since the beginning."""
    health: int
    """Status of /health."""
    health_seconds: float
    tasks: int
    """Of the event loop."""
    files: int
    """Open in the HTTP process."""
    engine_files: int
    memory_mib: float
    """Resident, of the HTTP process."""
    engine_memory_mib: float


@dataclass
class Record:
    """What came of a time of abuse."""

    samples: list[Sample] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    """Of good requests."""
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """Of bad requests, by kind."""


class Abuse:
    """One server, good and bad clients."""

    def __init__(self, offline: Offline, server: Server, seed: int) -> None:
        self._offline, self._server, self._draw = offline, server, random.Random(seed)
        self._cases = cases(20, 60, seed)
        self._right = {name: offline.answer(self._cases, mode) for name, mode in MODES.items()}
        self.record = Record()
        self._start = time.monotonic()

    async def run(self, seconds: float) -> None:
        """Abuse for so long."""
        self._start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(_NUM_GOOD):
                group.create_task(self._good(seconds))
            for _ in range(_NUM_BAD):
                group.create_task(self._bad(seconds))
            group.create_task(self._watch(seconds))

    def _is_over(self, seconds: float) -> bool:
        return time.monotonic() - self._start > seconds

    async def _good(self, seconds: float) -> None:
        while not self._is_over(seconds):
            self.record.verdicts[await self.good_request()] += 1

    async def good_request(self) -> str:
        """The verdict on one of any mode."""
        name, index = self._draw.choice([*MODES]), self._draw.randrange(len(self._cases))
        answer = await stream_answer(self._server.address, self._cases[index].body(MODES[name]))
        return self._offline.judge(answer, self._right[name][index], MODES[name])

    async def _bad(self, seconds: float) -> None:
        while not self._is_over(seconds):
            abuser = self._draw.choice(ABUSERS)
            outcome = await abuser(self._server.address, self._draw)
            self.record.outcomes.setdefault(abuser.__name__, Counter())[outcome] += 1

    async def _watch(self, seconds: float) -> None:
        while not self._is_over(seconds):
            self.record.samples.append(await self.sample())
            await asyncio.sleep(1.0)

    async def sample(self) -> Sample:
        before = time.monotonic()
        status, _ = await fetch(self._server.address, "GET", "/health")
        now = time.monotonic()
        http, engine = self._server.http_process, self._server.engine_process
        tasks = await asyncio.to_thread(self._server.num_tasks)
        memory = [process.memory_info().rss / MIB for process in (http, engine)]
        return Sample(now - self._start, status, now - before, tasks, http.num_fds(), engine.num_fds(), *memory)

    async def settle(self, calm: Sample) -> Sample:
        """The server when all that has been left is cleared away: as in `calm`, or as it is after 20 seconds."""
        for _ in range(40):
            after = await self.sample()
            if after.tasks <= calm.tasks and after.files <= calm.files:
                break
            await asyncio.sleep(0.5)
        return after


def run_abuse(
    checkpoint: str, seconds: float, seed: int = 0, slots: int = 4, growth_mib: float = 32.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and goals. growth_mib: that each process may grow by from the first quarter to the end."""
    offline = Offline(checkpoint, slots)
    with serve(checkpoint, "--max-requests", slots, counts_tasks=True) as server:
        abuse = Abuse(offline, server, seed)

        async def phases() -> tuple[Sample, Sample, Counter[str], float]:
            await asyncio.gather(*(abuse.good_request() for _ in range(2 * slots)))
            calm = await abuse.settle(await abuse.sample())
            await abuse.run(seconds)
            settled = await abuse.settle(calm)
            afterwards = Counter(await asyncio.gather(*(abuse.good_request() for _ in range(4 * slots))))
            return calm, settled, afterwards, await _open_answers(server)

        calm, settled, afterwards, open_answers = asyncio.run(phases())
    record = abuse.record
    results = {
        "before": asdict(calm),
        "after": asdict(settled),
        "seconds": seconds,
        "good_requests": dict(record.verdicts),
        "good_requests_afterwards": dict(afterwards),
        "bad_requests": {kind: dict(outcomes) for kind, outcomes in sorted(record.outcomes.items())},
        "health_seconds": quantiles([sample.health_seconds for sample in record.samples]),
        "growth_mib": growth(record.samples),
        "answers_open_afterwards": open_answers,
        "samples": [asdict(sample) for sample in record.samples],
    }
    return results, abuse_goals(results, growth_mib)


async def _open_answers(server: Server) -> float:
    """That the server believes to be running or waiting, by its metrics, when nobody asks anything."""
    await asyncio.sleep(0.5)
    _, text = await fetch(server.address, "GET", "/metrics")
    lines = [line.split() for line in text.decode().splitlines()]
    values = [float(line[1]) for line in lines if line[:1] and line[0].startswith("early_exit_num_requests_")]
    assert len(values) == 2, text  # running and waiting
    return sum(values)


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """MiB that each process has grown by from the end of the first quarter to the end, by medians of a tenth."""
    tenth = max(len(samples) // 10, 1)
    begin = len(samples) // 4
    grown = {}
    for name in ("memory_mib", "engine_memory_mib"):
        values = [getattr(sample, name) for sample in samples]
        grown[name] = common.median(values[-tenth:]) - common.median(values[begin : begin + tenth])
    return grown


def abuse_goals(results: dict[str, Any], growth_mib: float) -> dict[str, Any]:
    """What must hold, with the numbers behind it."""
    right = {"equal", "rounding"}
    health = Counter(sample["health"] for sample in results["samples"])
    unexpected = {
        kind: {outcome: count for outcome, count in outcomes.items() if not is_expected(outcome)}
        for kind, outcomes in results["bad_requests"].items()
    }
    unexpected = {kind: outcomes for kind, outcomes in unexpected.items() if outcomes}
    before, after = results["before"], results["after"]
    left = {name: after[name] - before[name] for name in ("tasks", "files", "engine_files")}
    good, afterwards = results["good_requests"], results["good_requests_afterwards"]
    return {
        "good_answers_are_right": {"met": set(good) <= right and bool(good), "verdicts": good},
        "good_answers_are_right_afterwards": {"met": set(afterwards) <= right, "verdicts": afterwards},
        "bad_requests_are_refused": {"met": not unexpected, "unexpected": unexpected},
        "health_is_true_throughout": {"met": set(health) == {200}, "statuses": {str(k): n for k, n in health.items()}},
        "no_tasks_or_files_are_left": {"met": max(left.values()) <= 0, "more_than_before": left},
        "no_answer_is_left": {
            "met": results["answers_open_afterwards"] == 0, "open": results["answers_open_afterwards"],
        },
        "memory_stays": {
            "met": max(results["growth_mib"].values()) <= growth_mib, "bound_mib": growth_mib, **results["growth_mib"],
        },
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.serving_kills import LAYOUTS, run_kills

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    abuse = parts.add_parser("abuse", help="bad requests beside good ones")
    abuse.add_argument("--seconds", type=float, default=240.0)
    kill = parts.add_parser("kill", help="SIGKILL for each process in turn under load")
    kill.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS])
    for part in (abuse, kill):
        part.add_argument("--load", metavar="DIR", help="default: a tiny model with random weights")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--output", type=Path, metavar="FILE", help="default: a file in benchmarks/results")
    args = parser.parse_args(argv)
    machine = common.machine_info()
    with a_model(args.load) as checkpoint:
        if args.part == "abuse":
            results, goals = run_abuse(checkpoint, args.seconds, args.seed)
        else:
            results, goals = run_kills(checkpoint, args.layouts, args.seed)
    for name, goal in goals.items():
        print(f"{name}: {goal}")
    settings = {name: value for name, value in vars(args).items() if name not in ("load", "output", "part")}
    document = common.result_document(f"serving_{args.part}", machine, settings, args.seed, results, goals)
    common.finish(document, args.output)
    return 0 if all(goal["met"] for goal in goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
