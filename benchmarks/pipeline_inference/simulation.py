"""A pipeline that decodes, event by event: what the stages' and the scheduler's rules make of given costs.

It has the rules of `inference/worker/inbox.py` and of the engine, and nothing else of them: a stage drains its inbox
into one pass, answers as soon as it can, hands rows that have exited on while it has credit; stage 0 caps its passes by
the load; the scheduler keeps a window of unverified rows. All requests begin at once and never end. Tokens are numbers
of a request; which stage answers them, and whether a draft is right, is drawn from a seed, the same in every mode.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from benchmarks.pipeline_inference.formulas import Costs
from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.draft_length import DraftWindow

Mode = Literal["full", "early_exit", "draft_then_verify", "across_stages"]


def window(costs: Costs, num_stages: int, num_requests: int) -> int:
    """Unverified rows of a request, as the engine chooses them."""
    seconds = tuple(costs.run(rows) for rows in ROW_COUNTS)
    return DraftWindow(None, num_stages, StepCosts(seconds, seconds, seconds, seconds)).next(num_requests)


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

    mode: Mode
    num_stages: int
    num_requests: int
    costs: Costs
    shares: tuple[float, ...] = ()
    """early_exit: of tokens that each stage answers."""
    acceptance: float = 1.0
    """Of a draft that follows right ones."""
    draft_length: int = 3
    """draft_then_verify"""
    window: int | None = None
    """across_stages: rows of a request that may be unverified; None: as the engine chooses it."""
    cap: int | None = None
    """Rows that no exit can answer and stage 0 runs in one pass; 0: any number, None: as a stage chooses it."""
    fill_credit: int = 64
    fill_min_rows: int = 1
    pause: float = 0.0
    """How long stage 0 waits after a pass in which an exit has answered: the next rows of these requests are on their
    way, and run in the same pass as those that lie there."""
    seed: int = 0

    @property
    def rows_in_flight(self) -> int:
        """That a request may have."""
        if self.mode != "across_stages":
            return 1
        return self.window or window(self.costs, self.num_stages, self.num_requests)

    @property
    def most_not_exiting(self) -> int:
        return self.num_requests if self.cap == 0 else self.cap or -(-self.num_requests // self.num_stages)


@dataclass(frozen=True)
class Outcome:
    """Of the second half of the simulated time."""

    tokens_per_time: float
    """Of all requests."""
    rows_per_pass: tuple[float, ...]
    """Of each stage."""
    busy: tuple[float, ...]
    """Share of the time in which each stage runs a pass."""
    largest_inbox: int
    """Rows that lay before a stage at once."""
    acceptance: float
    """Of the drafts that were compared."""
    shares: tuple[float, ...]
    """Of tokens that each stage answered."""


@dataclass
class _Row:
    """Rows of one request that run together: a newest one, and those before it that it takes along."""

    request: int
    position: int
    epoch: int
    is_owed: bool = True
    """Whether its newest row waits for an answer of a stage."""
    count: int = 1


@dataclass
class _Stage:
    inbox: list[_Row] = field(default_factory=list)
    deferred: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Rows that have exited here and wait, by request."""
    credit: int = 0
    is_busy: bool = False
    passes: list[tuple[float, float, int]] = field(default_factory=list)
    """(start, duration, rows)"""
    epochs: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Newest epoch of each request that has come, and the position at which it began."""


@dataclass
class _Request:
    """What the scheduler knows."""

    verified: int = 0
    """Tokens of the answer: the row at this position is the first whose answer is not final."""
    fed: int = 0
    """Position behind the last row that was fed."""
    drafted: int = 0
    """Drafts are known for the positions before it."""
    epoch: int = 0


class _Simulation:
    def __init__(self, setting: Setting) -> None:
        self.setting, self.costs, self.now = setting, setting.costs, 0.0
        self.stages = [_Stage(credit=setting.fill_credit) for _ in range(setting.num_stages)]
        self.requests = [_Request() for _ in range(setting.num_requests)]
        self.answers: list[tuple[float, int]] = []
        """(time, tokens)"""
        self.num_compared = self.num_accepted = 0
        """Drafts"""
        self.num_answered = [0] * setting.num_stages
        """Tokens of each stage."""
        self.largest_inbox = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def run(self, until: float) -> None:
        self._send([row for request in range(self.setting.num_requests) for row in self._next_rows(request)])
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _after(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._numbers), event))

    def _draw(self, request: int, position: int, what: str) -> float:
        """From 0 to 1, the same in every mode."""
        return random.Random(f"{self.setting.seed} {request} {position} {what}").random()

    # The scheduler.

    def _send(self, rows: list[_Row]) -> None:
        """Half of a turn is on the way from the engine, half on the way to it."""
        if rows:
            self._after(self.costs.turn / 2, lambda: self._arrive(0, rows))

    def _next_rows(self, request: int) -> list[_Row]:
        """Rows that a request may have in flight and has not."""
        state = self.requests[request]
        known = max(state.drafted, state.verified) + 1
        drafts = self.setting.mode == "draft_then_verify"
        most = self.setting.draft_length + 1 if drafts else self.setting.rows_in_flight
        positions = range(state.fed, min(known, state.verified + most))
        state.fed = max(state.fed, positions.stop)
        return [_Row(request, position, state.epoch) for position in positions]

    def _is_right(self, request: int, position: int) -> bool:
        """Whether the draft behind a position is what the final head says."""
        return self._draw(request, position, "draft") < self.setting.acceptance

    def _answer(self, rows: list[_Row], take: Callable[[_Row], None]) -> None:
        """Have the scheduler take what became of rows, and send what follows from it in one step."""

        def arrive() -> None:
            for row in rows:
                if row.epoch == self.requests[row.request].epoch:
                    take(row)
            self._send(
                [one for request in dict.fromkeys(row.request for row in rows) for one in self._next_rows(request)]
            )

        if rows:
            self._after(self.costs.turn / 2, arrive)

    def _take_draft(self, row: _Row) -> None:
        self.requests[row.request].drafted = row.position + 1

    def _take_token(self, row: _Row) -> None:
        """The last stage, or an exit in mode early_exit, has answered; drafts up to this row are compared."""
        state = self.requests[row.request]
        first, state.verified = state.verified, row.position + 1
        for position in range(first, row.position + 1):
            if state.fed == position + 1:
                break
            self.num_compared += 1
            self.num_accepted += self._is_right(row.request, position)
            if not self._is_right(row.request, position):
                state.verified = state.fed = state.drafted = position + 1
                state.epoch += 1
                break
        self.answers.append((self.now, state.verified - first))

    # A stage.

    def _arrive(self, number: int, rows: list[_Row]) -> None:
        stage = self.stages[number]
        for row in rows:
            epoch, start = stage.epochs.get(row.request, (0, 0))
            if row.epoch > epoch:
                stage.epochs[row.request] = row.epoch, row.position
                stage.inbox = [one for one in stage.inbox if not self._is_dead(stage, one)]
                stage.deferred[row.request] = 0
            if not self._is_dead(stage, row):
                stage.inbox.append(row)
        self.largest_inbox = max(self.largest_inbox, sum(one.count for one in stage.inbox))
        self._begin(number)

    @staticmethod
    def _is_dead(stage: _Stage, row: _Row) -> bool:
        epoch, start = stage.epochs.get(row.request, (0, 0))
        return row.epoch < epoch and row.position >= start

    def _begin(self, number: int) -> None:
        """Run a pass if there is something to run."""
        stage = self.stages[number]
        rows = [] if stage.is_busy else self._choose(number)
        if not rows:
            return
        stage.inbox = [row for row in stage.inbox if row not in rows]
        if number > 0 and (fill := sum(row.count for row in rows if not row.is_owed)):
            self._after(self.costs.hop, lambda: self._add_credit(number - 1, fill))
        count = sum(row.count for row in rows)
        heads = self.costs.head if any(self._evaluates(number, row) for row in rows) else 0.0
        duration = self.costs.run(count) + heads
        stage.is_busy = True
        stage.passes.append((self.now, duration, count))
        self._after(duration, lambda: self._finish(number, rows))

    def _choose(self, number: int) -> list[_Row]:
        """All rows that lie before a stage, but for those that no exit can answer and are more than the cap of stage 0,
        and fill rows that the next stage need not take."""
        stage, chosen, num_not_exiting = self.stages[number], [], 0
        newest = {row.request: row for row in stage.inbox}
        credit = stage.credit
        for row in stage.inbox:
            if not newest[row.request].is_owed and not self._is_last(number):
                if row.count > credit:
                    continue
                credit -= row.count
            if number == 0 and not self._evaluates(0, row):
                num_not_exiting += 1
                if num_not_exiting > self.setting.most_not_exiting:
                    continue
            chosen.append(row)
        return chosen

    def _is_last(self, number: int) -> bool:
        return number == self.setting.num_stages - 1

    def _drafts(self, row: _Row) -> bool:
        """draft_then_verify: whether a row leaves at the exit."""
        return row.position < self.requests[row.request].verified + self.setting.draft_length

    def _evaluates(self, number: int, row: _Row) -> bool:
        """Whether a stage evaluates its head on a row."""
        if self._is_last(number) or not row.is_owed:
            return row.is_owed
        if self.setting.mode == "draft_then_verify":
            return number == 0 and self._drafts(row)
        if self.setting.mode == "across_stages":
            return number == 0 and self.setting.rows_in_flight > 1
        return self.setting.mode == "early_exit"

    def _exits_at(self, row: _Row) -> int:
        """early_exit: the stage that answers a row."""
        share, drawn = 0.0, self._draw(row.request, row.position, "exit")
        for stage, one in enumerate(self.setting.shares):
            share += one
            if drawn < share:
                return stage
        return self.setting.num_stages - 1

    def _finish(self, number: int, rows: list[_Row]) -> None:
        stage, mode = self.stages[number], self.setting.mode
        rows = [row for row in rows if not self._is_dead(stage, row)]
        if self._is_last(number):
            answered = [row for row in rows if row.is_owed]
            self._answer(answered, self._take_token)
            self.num_answered[number] += len(answered)
            self._end(number, pause=0.0)
            return
        drafted, exited = [], []
        if number == 0 and mode == "across_stages" and self.setting.rows_in_flight > 1:
            drafted = rows
        if number == 0 and mode == "draft_then_verify":
            drafted = [row for row in rows if self._drafts(row)]
        self._answer(drafted, self._take_draft)
        if mode == "early_exit":
            exited = [row for row in rows if row.is_owed and self._exits_at(row) == number]
            self._answer([replace(row) for row in exited], self._take_token)
            self.num_answered[number] += len(exited)
            for row in exited:
                row.is_owed = False
        left = drafted if mode == "draft_then_verify" else []
        for row in left:
            stage.deferred[row.request] += 1
        following = [row for row in rows if row not in left and self._goes_on(stage, row)]
        if following:
            self._after(self.costs.hop, lambda: self._arrive(number + 1, following))
        self._end(number, self.setting.pause if number == 0 and (drafted or exited) else 0.0)

    def _end(self, number: int, pause: float) -> None:
        """Have a stage run the next pass."""

        def free() -> None:
            self.stages[number].is_busy = False
            self._begin(number)

        if pause:
            self._after(pause, free)
        else:
            free()

    def _goes_on(self, stage: _Stage, row: _Row) -> bool:
        """Take along what was deferred; a row that is owed no token needs credit, or is deferred."""
        row.count += stage.deferred.pop(row.request, 0)
        if not row.is_owed:
            if row.count < self.setting.fill_min_rows or row.count > stage.credit:
                stage.deferred[row.request] = row.count
                return False
            stage.credit -= row.count
        return True

    def _add_credit(self, number: int, rows: int) -> None:
        self.stages[number].credit += rows


def simulate(setting: Setting, num_tokens: int = 400) -> Outcome:
    """num_tokens: of each request, about; the first half of the time is not counted."""
    costs = setting.costs
    end = num_tokens * costs.token(setting.num_stages, setting.num_stages, setting.num_requests / setting.num_stages)
    simulation = _Simulation(setting)
    simulation.run(until=end)
    start = end / 2
    counted = [[one for one in stage.passes if one[0] >= start] for stage in simulation.stages]
    return Outcome(
        tokens_per_time=sum(tokens for time, tokens in simulation.answers if time >= start) / (end - start),
        rows_per_pass=tuple(_mean([rows for _, _, rows in passes]) for passes in counted),
        busy=tuple(sum(duration for _, duration, _ in passes) / (end - start) for passes in counted),
        largest_inbox=simulation.largest_inbox,
        acceptance=simulation.num_accepted / max(simulation.num_compared, 1),
        shares=tuple(count / max(sum(simulation.num_answered), 1) for count in simulation.num_answered),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
