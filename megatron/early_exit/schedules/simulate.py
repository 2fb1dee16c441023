"""Simulation of a plan: when every action runs and what it keeps in memory, given the costs of the stages.

The model: a rank runs its actions one after the other. A send costs its rank nothing; the message arrives
`communication_sec` of the sending stage later, however many are on their way. A receive waits for it. A backward whose
microbatch had its exits computed before costs the backward alone, any other one the stage's exits too. Passes of
microbatches that fill bubbles cost what all others cost, but a forward without a backward on its stage keeps nothing.

Knows nothing of whether the plan computes the right thing: that is the validator's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.early_exit.schedules.messages import CHANNEL_OF
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.stage_costs import StageCosts


class TimedAction(NamedTuple):
    """One action with its time; of a plan, or measured."""

    rank: int
    action: Action
    start_sec: float
    """Since the start of the iteration; of a receive, when the rank begins to wait."""
    end_sec: float
    exit_sec: float = 0.0
    """Part of a backward that is work of exits."""


@dataclass(frozen=True)
class Timeline:
    """All actions of one iteration with their times."""

    name: str
    actions: tuple[TimedAction, ...]
    """Actions of rank 0 in order, then of rank 1, ..."""
    num_ranks: int

    @classmethod
    def of(cls, name: str, rows: Iterable[TimedAction | tuple[int, Action, float, float]]) -> Timeline:
        """Make a timeline of rows (rank, action, start_sec, end_sec), in any order, with any origin of time."""
        timed = [row if isinstance(row, TimedAction) else TimedAction(*row) for row in rows]
        origin = min((row.start_sec for row in timed), default=0.0)
        moved = [row._replace(start_sec=row.start_sec - origin, end_sec=row.end_sec - origin) for row in timed]
        moved.sort(key=lambda row: (row.rank, row.start_sec, row.end_sec))
        return cls(name, tuple(moved), max((row.rank for row in timed), default=-1) + 1)

    @property
    def iteration_sec(self) -> float:
        """Time from the start of the first action to the end of the last one."""
        starts = min((timed.start_sec for timed in self.actions), default=0.0)
        return max((timed.end_sec for timed in self.actions), default=0.0) - starts

    def of_rank(self, rank: int) -> list[TimedAction]:
        return [timed for timed in self.actions if timed.rank == rank]

    def idle_sec(self, rank: int) -> float:
        """Time of the iteration in which a rank runs no pass."""
        passes = (timed for timed in self.of_rank(rank) if not timed.action.kind.is_message)
        return self.iteration_sec - sum(timed.end_sec - timed.start_sec for timed in passes)

    def idle_share(self, rank: int) -> float:
        """Share of the iteration in which a rank is idle."""
        return self.idle_sec(rank) / self.iteration_sec if self.iteration_sec else 0.0


class DeadlockError(ValueError):
    """Ranks wait for messages that never come; `waiting` has the rank, the index and the action of each."""

    def __init__(self, plan: Plan, waiting: Sequence[tuple[int, int, Action]]):
        self.waiting = tuple(waiting)
        lines = []
        for rank, index, action in waiting:
            source = _source(plan, rank, action)
            sender, kind = source.stage % plan.num_ranks, source.kind
            chunk = f", chunk {source.stage // plan.num_ranks}" if plan.num_chunks > 1 else ""
            lines.append(
                f"  - rank {rank} at {action} (action {index} of {len(plan.ranks[rank])}, counted from 0): needs "
                f"{kind}{action.microbatch} of rank {sender}{chunk}"
            )
        super().__init__(
            f"{plan.name} comes to a halt; these wait for messages that are not sent:\n" + "\n".join(lines)
        )


def simulate(plan: Plan, costs: Sequence[StageCosts]) -> Timeline:
    """Times of all actions. costs: of every stage. Raises DeadlockError, or ValueError for too few costs."""
    check_costs(plan, costs)
    arrivals: dict[_Message, float] = {}
    ranks: list[list[TimedAction]] = [[] for _ in plan.ranks]
    early_exits: set[tuple[int, int]] = set()
    is_moving = True
    while is_moving:
        is_moving = False
        for rank, actions in enumerate(plan.ranks):
            done = ranks[rank]
            while len(done) < len(actions):
                timed = _run(
                    plan, rank, actions[len(done)], done[-1].end_sec if done else 0.0, costs, arrivals, early_exits
                )
                if timed is None:
                    break
                done.append(timed)
                is_moving = True
    waiting = [
        (rank, len(done), actions[len(done)])
        for rank, (actions, done) in enumerate(zip(plan.ranks, ranks))
        if len(done) < len(actions)
    ]
    if waiting:
        raise DeadlockError(plan, waiting)
    return Timeline(plan.name, tuple(timed for done in ranks for timed in done), plan.num_ranks)


def check_costs(plan: Plan, costs: Sequence[StageCosts]) -> None:
    if len(costs) != plan.num_stages:
        raise ValueError(
            f"costs of {len(costs)} stages are given for a plan of {plan.num_stages} "
            f"({plan.num_ranks} ranks x {plan.num_chunks} chunks): give one for each stage"
        )


class _Message(NamedTuple):
    """What identifies a message: who sent it."""

    kind: Kind
    stage: int
    microbatch: int


def _source(plan: Plan, rank: int, receive: Action) -> _Message:
    """The send that a receive waits for."""
    channel = CHANNEL_OF[receive.kind]
    return _Message(channel.send, receive.chunk * plan.num_ranks + rank - channel.step, receive.microbatch)


def _run(
    plan: Plan,
    rank: int,
    action: Action,
    now: float,
    costs: Sequence[StageCosts],
    arrivals: dict[_Message, float],
    early_exits: set[tuple[int, int]],
) -> TimedAction | None:
    """The action with its times, or None for a receive whose message has not been sent. Notes sends and early exits."""
    stage = action.chunk * plan.num_ranks + rank
    cost = costs[stage]
    if action.kind.is_message and action.kind == CHANNEL_OF[action.kind].receive:
        arrival = arrivals.get(_source(plan, rank, action))
        return None if arrival is None else TimedAction(rank, action, now, max(now, arrival))
    if action.kind.is_message:
        arrivals[_Message(action.kind, stage, action.microbatch)] = now + cost.communication_sec
        return TimedAction(rank, action, now, now)
    if action.kind == Kind.FORWARD:
        return TimedAction(rank, action, now, now + cost.forward_sec)
    if action.kind == Kind.EXIT:
        early_exits.add((stage, action.microbatch))
        return TimedAction(rank, action, now, now + cost.exit_sec)
    exit_sec = 0.0 if (stage, action.microbatch) in early_exits else cost.exit_sec
    return TimedAction(rank, action, now, now + cost.backward_sec + exit_sec, exit_sec)


# Memory. A rank's actions run in order, so what it keeps depends on the plan alone, not on times.


def peak_activation_bytes(plan: Plan, costs: Sequence[StageCosts]) -> list[int]:
    """Most bytes that activations, gradients of early-computed exits and heads at work take at once on each rank.

    Parameters, gradients and optimizer state are not in it; `state_bytes` has them."""
    check_costs(plan, costs)
    return [_peak_of_rank(plan, rank, costs) for rank in range(plan.num_ranks)]


def state_bytes(plan: Plan, costs: Sequence[StageCosts]) -> list[int]:
    """Bytes of the parameters, gradients and optimizer state of each rank."""
    check_costs(plan, costs)
    return [sum(cost.state_bytes for cost in costs[rank :: plan.num_ranks]) for rank in range(plan.num_ranks)]


def _peak_of_rank(plan: Plan, rank: int, costs: Sequence[StageCosts]) -> int:
    actions = plan.ranks[rank]
    has_backward = {(a.chunk, a.microbatch) for a in actions if a.kind == Kind.BACKWARD}
    early: set[tuple[int, int]] = set()
    kept = peak = 0
    for action in actions:
        key, cost = (action.chunk, action.microbatch), costs[action.chunk * plan.num_ranks + rank]
        at_work = 0  # beyond what is kept afterwards
        released = 0
        if action.kind == Kind.FORWARD:
            at_work = cost.final_head_bytes
            if key in has_backward:
                kept += cost.activation_bytes
        elif action.kind == Kind.EXIT:
            at_work = cost.exit_head_bytes
            if key in has_backward:
                early.add(key)
                kept += cost.exit_gradient_bytes
        elif action.kind == Kind.BACKWARD:
            at_work = cost.recompute_bytes + (0 if key in early else cost.exit_head_bytes)
            released = cost.activation_bytes + (cost.exit_gradient_bytes if key in early else 0)
        peak = max(peak, kept + at_work)
        kept -= released
    return peak
