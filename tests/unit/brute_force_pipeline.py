"""Times of a plan by brute force: the smallest times that satisfy every "not before", found by trying over and over.

Slow and without any cleverness, on purpose: it is what builders, validator and simulator are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.early_exit.schedules.plan import Action, Kind, Plan


class NeverEndsError(Exception):
    """Actions wait for each other in a circle, or for a message that nobody sends."""


@dataclass(frozen=True)
class Costs:
    """Of one microbatch on each stage; a backward is without exits."""

    forward: Sequence[float]
    backward: Sequence[float]
    exit: Sequence[float]
    communication: float = 0.0

    @classmethod
    def equal(cls, num_stages: int, backward: float = 2.0, exit: float = 0.0, communication: float = 0.0) -> Costs:
        return cls([1.0] * num_stages, [backward] * num_stages, [exit] * num_stages, communication)


def end_times(plan: Plan, costs: Costs) -> list[list[float]]:
    """For each rank when each of its actions ends."""
    ends = [[0.0] * len(actions) for actions in plan.ranks]
    sends = {}  # (kind, microbatch, sending stage): (rank, index)
    for rank, actions in enumerate(plan.ranks):
        for index, action in enumerate(actions):
            if action.kind in ("SF", "SB", "ST"):
                sends[str(action.kind), action.microbatch, action.chunk * plan.num_ranks + rank] = (rank, index)
    for _ in range(sum(map(len, ends)) + 2):
        is_settled = True
        for rank, actions in enumerate(plan.ranks):
            for index, action in enumerate(actions):
                stage = action.chunk * plan.num_ranks + rank
                begin = ends[rank][index - 1] if index else 0.0
                if action.kind in ("RF", "RB", "RT"):
                    kind = f"S{action.kind[1]}"
                    sender = stage - 1 if action.kind == "RF" else stage + 1
                    key = (kind, action.microbatch, sender)
                    if key not in sends:
                        raise NeverEndsError(f"rank {rank} waits for {key}")
                    other_rank, other_index = sends[key]
                    begin = max(begin, ends[other_rank][other_index] + costs.communication)
                # A tiny time for everything, so that waiting in a circle grows without end.
                end = begin + duration(plan, rank, action, costs) + 1e-9
                if end > ends[rank][index] + 1e-12:
                    ends[rank][index], is_settled = end, False
        if is_settled:
            return ends
    raise NeverEndsError("actions wait for each other in a circle")


def duration(plan: Plan, rank: int, action: Action, costs: Costs) -> float:
    stage = action.chunk * plan.num_ranks + rank
    early = Action(Kind.EXIT, action.microbatch, action.chunk, action.is_partial) in plan.ranks[rank]
    return {
        "F": costs.forward[stage],
        "B": costs.backward[stage] + (0.0 if early else costs.exit[stage]),
        "X": costs.exit[stage],
    }.get(str(action.kind), 0.0)


def iteration_time(plan: Plan, costs: Costs) -> float:
    return max(ends[-1] for ends in end_times(plan, costs) if ends)


def most_in_flight(plan: Plan, rank: int) -> int:
    """The largest number of microbatches that a rank holds between a forward and a backward at once."""
    actions = plan.ranks[rank]
    held, most = 0, 0
    for action in actions:
        if action.kind == "F" and Action(Kind.BACKWARD, action.microbatch, action.chunk, action.is_partial) in actions:
            held += 1
        if action.kind == "B":
            held -= 1
        most = max(most, held)
    return most
