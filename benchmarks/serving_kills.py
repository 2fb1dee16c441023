"""What is seen when a process of the server dies under load: `python -m benchmarks.serving_abuse kill`."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import FULL
from benchmarks.serving_client import Answer, ConnectionCut, fetch, stream_answer
from benchmarks.serving_offline import Case, Offline, cases
from benchmarks.serving_processes import Server, serve

LAYOUTS: dict[str, tuple[object, ...]] = {
    "one process": (),
    "TP 2": ("--tensor-model-parallel-size", 2),
    "PP 2": ("--pipeline-model-parallel-size", 2),
    "one process, restarts": ("--restart-workers",),
    "TP 2, restarts": ("--tensor-model-parallel-size", 2, "--restart-workers"),
}
_SLOTS, _CLIENTS = 4, 8
"""So that some requests run, and others wait."""
_SECONDS_TO_END = 30.0
"""What takes longer hangs."""
_SECONDS_TO_NOTICE = 10.0
"""The goal."""


class Kill:
    """One server, clients that ask again and again, and the death of one process."""

    def __init__(self, server: Server, all_cases: Sequence[Case], restarts: bool) -> None:
        self._server, self._cases, self._restarts = server, all_cases, restarts
        self._killed: float | None = None
        self._answers: list[tuple[Answer, int]] = []
        self._unhealthy: float | None = None
        self._healthy_again: float | None = None
        self._is_over = False

    async def run(self, victim: int) -> dict[str, Any]:
        clients = [asyncio.create_task(self._ask_again(number)) for number in range(_CLIENTS)]
        health = asyncio.create_task(self._watch_health())
        await asyncio.sleep(1.5)
        os.kill(victim, signal.SIGKILL)
        self._killed = time.perf_counter()
        hanging = 0
        try:
            if self._restarts:
                await self._until(lambda: self._healthy_again is not None)
                await asyncio.sleep(1.5)  # clients are answered again
            else:
                await self._until(lambda: self._server.running.process.poll() is not None)
        finally:
            ended = time.perf_counter()
            self._is_over = True
            _, pending = await asyncio.wait([*clients, health], timeout=_SECONDS_TO_END)
            hanging = len(pending)
            for task in pending:
                task.cancel()
        return {**self._seen(), "hanging": hanging, "seconds_to_end": None if self._restarts else ended - self._killed}

    async def _until(self, happens: Any) -> None:
        deadline = time.perf_counter() + 2 * _SECONDS_TO_END
        while not happens() and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)

    async def _ask_again(self, number: int) -> None:
        while not self._is_over:
            index = number % len(self._cases)
            self._answers.append((await stream_answer(self._server.address, self._cases[index].body(FULL)), index))
            number += 1
            if self._answers[-1][0].status != 200:
                await asyncio.sleep(0.05)

    async def _watch_health(self) -> None:
        while not self._is_over:
            try:
                async with asyncio.timeout(1):
                    status, _ = await fetch(self._server.address, "GET", "/health")
            except (OSError, ConnectionCut, TimeoutError):
                status = None
            now = time.perf_counter()
            if status != 200 and self._unhealthy is None:
                self._unhealthy = now
            if status == 200 and self._unhealthy is not None and self._healthy_again is None:
                self._healthy_again = now
            await asyncio.sleep(0.02)

    def _seen(self) -> dict[str, Any]:
        in_flight = [one for one, _ in self._answers if one.started < self._killed < one.ended]
        errors = [one for one in in_flight if not one.is_whole]
        since = lambda moment: None if moment is None else moment - self._killed
        return {
            "in_flight": len(in_flight),
            "what_they_saw": dict(Counter(map(ending, in_flight))),
            "seconds_until_the_last_was_told": max((one.ended - self._killed for one in errors), default=None),
            "seconds_until_not_ready": since(self._unhealthy),
            "seconds_until_ready_again": since(self._healthy_again),
            "an_error": next((one.error for one in errors if not one.is_cut), None),
        }

    def verdicts(self, offline: Offline, right: Sequence[Any], is_after: bool) -> Counter[str]:
        """Of whole answers; is_after: to requests that began after the kill."""
        chosen = [(a, i) for a, i in self._answers if a.is_whole and (a.started > self._killed) == is_after]
        return Counter(offline.judge(answer, right[index], FULL) for answer, index in chosen)


def ending(answer: Answer) -> str:
    """How a request ended, as its client sees it."""
    if answer.is_whole:
        return "a whole answer"
    if answer.is_cut:
        return "a cut connection"
    return "an error event" if answer.status == 200 else f"status {answer.status}"


def run_kills(checkpoint: str, layouts: Sequence[str], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each process of each layout."""
    offline = Offline(checkpoint, _SLOTS)
    all_cases = cases(150, 200, seed)
    right = offline.answer(all_cases, FULL)
    kills = []
    for layout in layouts:
        number, count = 0, 1
        while number < count:
            restarts = "--restart-workers" in LAYOUTS[layout]
            with serve(checkpoint, "--max-requests", _SLOTS, "--worker-timeout", 20, *LAYOUTS[layout]) as server:
                # The HTTP process is nobody's to restart.
                victims = ([] if restarts else [("HTTP", server.http_process.pid)]) + names(server.children)
                count = len(victims)
                kill = Kill(server, all_cases, restarts)
                children = server.children
                name, victim = victims[number]
                seen = asyncio.run(kill.run(victim))
                verdicts = kill.verdicts(offline, right, False) + kill.verdicts(offline, right, True)
                after = kill.verdicts(offline, right, True)
                kills.append({
                    "layout": layout, "killed": name, **seen, "status": server.running.process.poll(),
                    "processes_left": 0 if restarts else _left(children), "verdicts": dict(verdicts),
                    "verdicts_after_restart": dict(after) if restarts else None,
                })  # fmt: skip
                print(kills[-1], flush=True)
                number += 1
    return {"kills": kills}, kill_goals(kills)


def names(children: Sequence[int]) -> list[tuple[str, int]]:
    """Of the engine's process, and of the ranks below it in the order of their start."""
    is_engine = lambda pid: b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ranks = [pid for pid in sorted(children) if not is_engine(pid)]
    return [("engine", pid) for pid in children if is_engine(pid)] + [(f"rank {n}", pid) for n, pid in enumerate(ranks)]


def _left(children: Sequence[int]) -> int:
    """Processes that are there after some seconds still."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while (left := sum(map(_lives, children))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _lives(pid: int) -> bool:
    try:
        # Behind the name in parentheses: the state. A zombie has ended.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_goals(kills: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What must hold of every kill."""
    told = [kill["seconds_until_the_last_was_told"] for kill in kills]
    ready = [kill["seconds_until_not_ready"] for kill in kills]
    fast = lambda values: all(value is not None and value <= _SECONDS_TO_NOTICE for value in values)
    restarted = [kill for kill in kills if kill["verdicts_after_restart"] is not None]
    return {
        "nothing_hangs": {"met": not any(kill["hanging"] + kill["processes_left"] for kill in kills)},
        "every_request_is_told_within_10_seconds": {"met": fast(told), "seconds": told},
        "not_ready_within_10_seconds": {"met": fast(ready), "seconds": ready},
        "no_connection_is_cut_while_the_http_process_lives": {
            "met": not any("a cut connection" in kill["what_they_saw"] for kill in kills if kill["killed"] != "HTTP"),
        },
        "whole_answers_are_right": {"met": all(set(kill["verdicts"]) <= {"equal", "rounding"} for kill in kills)},
        "answers_after_a_restart": {"met": all(kill["verdicts_after_restart"] for kill in restarted)},
    }  # fmt: skip
