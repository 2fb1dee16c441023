"""Messages of a plan: from which stage to which they go, and put beside the passes that make and need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron.early_exit.schedules.plan import Action, Kind

MESSAGE_AFTER = {Kind.FORWARD: Kind.SEND_FORWARD, Kind.BACKWARD: Kind.SEND_BACKWARD}
"""The message that carries away what a pass returned."""
MESSAGE_BEFORE = {Kind.FORWARD: Kind.RECEIVE_FORWARD, Kind.BACKWARD: Kind.RECEIVE_BACKWARD}
"""The message that brings what a pass takes."""
STEP = {Kind.FORWARD: 1, Kind.BACKWARD: -1}
"""From a pass's stage to the stage that continues with what it returned."""


class Channel(NamedTuple):
    """Both halves of one kind of message, and the step from the sender's stage to the receiver's."""

    send: Kind
    receive: Kind
    step: int


CHANNELS = (
    Channel(Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD, 1),
    Channel(Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD, -1),
    Channel(Kind.SEND_TEACHER, Kind.RECEIVE_TEACHER, -1),
)
CHANNEL_OF = {half: channel for channel in CHANNELS for half in (channel.send, channel.receive)}


def with_messages(passes_of_stages: Sequence[Sequence[Action]]) -> tuple[tuple[Action, ...], ...]:
    """Put each receive right before the pass that needs it and each send right after the pass that makes it.

    passes_of_stages: for each stage its forwards and backwards in order; one stage a rank. A message is there if both
    of its ends are: a microbatch that does not go on to the next stage is not sent.
    """
    passes = [{(action.kind, action.microbatch) for action in actions} for actions in passes_of_stages]

    def has(stage: int, action: Action) -> bool:
        return 0 <= stage < len(passes) and (action.kind, action.microbatch) in passes[stage]

    ranks = []
    for stage, actions in enumerate(passes_of_stages):
        ordered = []
        for action in actions:
            if has(stage - STEP[action.kind], action):
                ordered.append(_message(MESSAGE_BEFORE, action))
            ordered.append(action)
            if has(stage + STEP[action.kind], action):
                ordered.append(_message(MESSAGE_AFTER, action))
        ranks.append(tuple(ordered))
    return tuple(ranks)


def _message(kinds: dict[Kind, Kind], action: Action) -> Action:
    return Action(kinds[action.kind], action.microbatch, action.chunk, action.is_partial)
