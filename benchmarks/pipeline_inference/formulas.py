"""What a token takes in a pipeline of equal stages, by formula: early exits, speculation, tensor parallelism.

All times are in one unit. A *row* is one token of one request; a pass of `n` rows through one stage takes
`alpha + beta * n`. Where a formula is for one request, two bounds hold for those that run together: each waits for its
own tokens (R / E[T]), and every row passes every stage (1 / pass time of a row).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Costs:
    """Of a pipeline whose stages are equal."""

    alpha: float
    """Of a pass of one stage, however many rows it has."""
    beta: float
    """Added by each row."""
    head: float = 0.0
    """To evaluate one head, whatever the rows."""
    hop: float = 0.0
    """From one stage to the next."""
    turn: float = 0.0
    """From an answer over the engine to the beginning of the next row's pass on stage 0."""

    def run(self, rows: float) -> float:
        """A pass of one stage."""
        return self.alpha + self.beta * rows

    def token(self, num_stages: int, num_heads: int = 1, rows: float = 1.0) -> float:
        """A token that is answered after so many stages and evaluated heads, in passes of so many rows."""
        return num_stages * self.run(rows) + num_heads * self.head + (num_stages - 1) * self.hop + self.turn


def full_token(costs: Costs, num_stages: int, num_requests: int = 1) -> float:
    """A token of each of `num_requests`, all stages, in as many groups as there are stages."""
    return costs.token(num_stages, rows=-(-num_requests // num_stages))


def exit_token(costs: Costs, shares: Sequence[float]) -> float:
    """E[T] of one request. shares: of tokens that each stage answers, the last with the final head; every stage that a
    token passes until then evaluates one head."""
    return sum(share * costs.token(stage, stage) for stage, share in enumerate(shares, start=1))


def exit_throughput(costs: Costs, shares: Sequence[float], num_requests: int) -> float:
    """Tokens per unit of time that `num_requests` cannot exceed: they wait for their own tokens, and all rows, those
    that have exited too, pass the busiest stage, at best all in one pass. That is stage 0 with its head."""
    return num_requests / max(exit_token(costs, shares), costs.run(num_requests) + costs.head)


def speculation_speedup(num_stages: int, acceptance: float) -> float:
    """Of speculation across stages over waiting for the last stage, before hops and heads: an accepted token takes one
    stage, a rejected one all of them."""
    return num_stages / (acceptance + num_stages * (1 - acceptance))


def speculation_token(costs: Costs, num_stages: int, acceptance: float, window: int | None = None) -> float:
    """One request; `window` rows may be unverified, default one a stage. Every row evaluates the exit on stage 0 and
    the final head. An accepted draft waits for stage 0, or for the window. A rejected one waits for the last stage, and
    for the row of a stale draft that stage 0 is running then."""
    window = num_stages if window is None else window
    if window == 1:
        return costs.token(num_stages)
    full = costs.token(num_stages, num_heads=2)
    accepted = max(costs.token(1, 1), full / window)
    last_stale = min(math.ceil(full / accepted - 1e-9) - 1, window - 1)
    rejected = max(full, last_stale * accepted + costs.run(1) + costs.head)
    return acceptance * accepted + (1 - acceptance) * rejected


def drafted_token(costs: Costs, num_stages: int, acceptance: float, draft_length: int) -> float:
    """One request that drafts on stage 0 and then verifies all drafts in one pass of the stages behind it."""
    drafts = draft_length * costs.token(1, 1)
    verification = costs.token(1, 0) - costs.turn + costs.hop + costs.token(num_stages - 1, 1, rows=draft_length + 1)
    return (drafts + verification) / sum(acceptance**count for count in range(draft_length + 1))


def tensor_parallel(costs: Costs, num_ranks: int, collectives: float) -> Costs:
    """Costs of a pass through all layers, on as many tensor-parallel ranks as there would be stages: each layer in
    `1 / num_ranks` of its time, and its collectives. A token takes `token(1)` of them. A stated model.

    collectives: of a layer, as a share of the layer's time on one device."""
    return replace(costs, alpha=costs.alpha * (1 + num_ranks * collectives), head=costs.head / num_ranks, hop=0.0)
