"""A plan as one of its ranks sees it: where messages go, what follows a pass, and how much each microbatch counts.

**Weights.** Stage s runs backward for N microbatches of the batch and for C_s of the cooldown's fill. Its estimate of
the gradient is the mean over these, so a gradient that comes from stage s + 1, a mean over N + C_{s+1}, is multiplied
by (N + C_{s+1}) / (N + C_s) on arrival. An exit on stage q also sees the W_q warmup fills that get there: every
microbatch that it sees counts 1 / (N + C_q + W_q). With these weights every parameter's gradient is unbiased, whatever
stages a microbatch passes.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.early_exit.schedules.messages import CHANNEL_OF
from megatron.early_exit.schedules.plan import Action, Kind, Plan


class Edge(NamedTuple):
    """One direction between two neighbouring stages."""

    is_forward: bool
    """Hidden states to the next stage, not gradients to the previous one."""
    is_wrap: bool
    """Between the last rank and the first one, whose chunks follow each other."""

    @property
    def tag(self) -> int:
        """Tells messages of one direction from those of another where both share a process group (gloo)."""
        return 1 + 2 * self.is_wrap + self.is_forward


class PassCounts(NamedTuple):
    """How many microbatches a stage learns from; see the module's text."""

    backward: int
    """Microbatches of the batch and of the cooldown's fill: N + C_s."""
    exits: int
    """Microbatches that its exits see: N + C_q + W_q."""
    gradient_factor: float
    """Factor for gradients from the next stage, of the batch and of the cooldown's fill."""


def pass_counts(plan: Plan, stage: int) -> PassCounts:
    """Counts of a stage, from the plan alone."""

    def count(stage: int, warmup: bool) -> int:
        backwards = plan.microbatches(stage, Kind.BACKWARD)
        return sum((microbatch in plan.fill_warmup) == warmup for microbatch in backwards)

    backward = count(stage, warmup=False)
    is_last = stage == plan.num_stages - 1
    factor = 1.0 if is_last else count(stage + 1, warmup=False) / max(backward, 1)
    return PassCounts(backward, backward + count(stage, warmup=True), factor)


class RankPlan:
    """What one pipeline rank does, in order, and what it has to know of each action."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        self.actions = plan.ranks[rank]
        self.counts = [pass_counts(plan, self.stage(chunk)) for chunk in range(plan.num_chunks)]
        self._present = set(self.actions)
        self._last_backward = {
            action.chunk: action for action in self.actions if action.kind == Kind.BACKWARD
        }  # the last one of a chunk stays
        receives = [
            action for action in self.actions
            if action.kind.is_message and action.kind == CHANNEL_OF[action.kind].receive
        ]  # fmt: skip
        self.receives: dict[Edge, list[Action]] = {}
        """Messages that this rank receives, in order."""
        for action in receives:
            self.receives.setdefault(self.edge(action), []).append(action)
        self.answering = {self.peer(action) for action in receives}
        """Ranks from which messages come."""
        self.shown_by = self._sends_shown_by_receives()
        """For each receive, messages of this rank that must have arrived when it does and that none before it shows."""

    # -- What there is of a microbatch

    def has(self, action: Action, kind: Kind) -> bool:
        """Whether the microbatch of an action has one of `kind` on the same stage."""
        return with_kind(action, kind) in self._present

    @property
    def has_backwards(self) -> bool:
        return bool(self._last_backward)

    def is_last_backward(self, action: Action) -> bool:
        """Whether a chunk's backwards end with this one, so that its gradients are reduced."""
        return self._last_backward.get(action.chunk) == action

    def is_in_last_backward(self, exits: Action) -> bool:
        """Whether these exits are of the microbatch with which a chunk's backwards end."""
        return self.is_last_backward(with_kind(exits, Kind.BACKWARD))

    # -- Where it goes

    def stage(self, chunk: int) -> int:
        return chunk * self.plan.num_ranks + self.rank

    def is_last_stage(self, chunk: int) -> bool:
        return self.stage(chunk) == self.plan.num_stages - 1

    def peer(self, message: Action) -> int:
        """The other rank of a message."""
        return self._peer_stage(message) % self.plan.num_ranks

    def edge(self, message: Action) -> Edge:
        return Edge(CHANNEL_OF[message.kind].step > 0, self._peer_chunk(message) != message.chunk)

    def _peer_stage(self, message: Action) -> int:
        channel = CHANNEL_OF[message.kind]
        return self.stage(message.chunk) + (channel.step if message.kind == channel.send else -channel.step)

    def _peer_chunk(self, message: Action) -> int:
        return self._peer_stage(message) // self.plan.num_ranks

    def _sends_shown_by_receives(self) -> dict[Action, set[Action]]:
        """A message must have arrived if its sender had received it before it sent."""
        mine = {self._theirs(action): action for action in self.actions if action.kind.is_message}
        shown_by: dict[Action, set[Action]] = {}
        for peer in {(self.rank - 1) % self.plan.num_ranks, (self.rank + 1) % self.plan.num_ranks}:
            received: set[Action] = set()
            for action in self.plan.ranks[peer]:
                ours = mine.get((peer, action))
                if ours is None:
                    continue
                if ours.kind == CHANNEL_OF[ours.kind].send:
                    received.add(ours)
                else:
                    shown_by[ours], received = received, set()
        return shown_by

    def _theirs(self, message: Action) -> tuple[int, Action]:
        """(peer, the peer's half of a message)"""
        channel = CHANNEL_OF[message.kind]
        kind = channel.receive if message.kind == channel.send else channel.send
        return self.peer(message), Action(kind, message.microbatch, self._peer_chunk(message), message.is_partial)


def with_kind(action: Action, kind: Kind) -> Action:
    """Another action of the same microbatch on the same chunk."""
    return Action(kind, action.microbatch, action.chunk, action.is_partial)
