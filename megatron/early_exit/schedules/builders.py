"""Builders of pipeline plans: 1F1B, interleaved 1F1B, exits in idle time, and tuning, which has no backward.

A plan that fills bubbles with further microbatches is in `fill.py`. Nothing here knows of process groups or tensors.
Sends are asynchronous and receives block, here as in the runtime: where core sends and receives in one call, the plan
has the sends first, then the receives, and in each the forward direction before the backward one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from megatron.early_exit.schedules.messages import with_messages
from megatron.early_exit.schedules.plan import Action, Kind, Plan


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Plan:
    """1F1B: passes and messages in the order of core's `forward_backward_pipelining_without_interleaving`."""
    _require_positive(num_ranks=num_ranks, num_microbatches=num_microbatches)
    passes = [one_f_one_b_passes(num_ranks, stage, num_microbatches) for stage in range(num_ranks)]
    return Plan("1F1B", with_messages(passes), num_microbatches)


def one_f_one_b_passes(num_ranks: int, stage: int, num_microbatches: int) -> list[Action]:
    """Forwards and backwards of one stage, in order."""
    num_warmup = min(num_ranks - 1 - stage, num_microbatches)
    forwards = [Action(Kind.FORWARD, microbatch) for microbatch in range(num_microbatches)]
    backwards = [Action(Kind.BACKWARD, microbatch) for microbatch in range(num_microbatches)]
    steady = [action for pair in zip(forwards[num_warmup:], backwards) for action in pair]
    return forwards[:num_warmup] + steady + backwards[num_microbatches - num_warmup :]


def tuning_plan(num_ranks: int, num_microbatches: int, exit_stages: Collection[int], *, distils: bool) -> Plan:
    """The plan of tuning exits: towards the text alone, or towards the final head."""
    build = distilling_tuning if distils else forward_only_tuning
    return build(num_ranks, num_microbatches, exit_stages)


def forward_only_tuning(num_ranks: int, num_microbatches: int, exit_stages: Collection[int]) -> Plan:
    """EE-Tuning (arXiv:2402.00518): stages pass hidden states on and train their exits; there is no backward.

    The send comes before the exits, since the next stage waits for it. Stages after the last exit do not exist, so the
    last stage must own one.
    """
    _require_positive(num_ranks=num_ranks, num_microbatches=num_microbatches)
    _require_stages(exit_stages, num_ranks)
    if num_ranks - 1 not in exit_stages:
        raise ValueError(
            f"stage {num_ranks - 1}, the last, has no exit (exits on stages {sorted(exit_stages)}): tuning runs the "
            f"stages up to the last exit only; use {max(exit_stages, default=-1) + 1} stages"
        )
    passes = [[Action(Kind.FORWARD, microbatch) for microbatch in range(num_microbatches)]] * num_ranks
    ranks = []
    for stage, actions in enumerate(with_messages(passes)):
        ends = Kind.FORWARD if stage == num_ranks - 1 else Kind.SEND_FORWARD  # of what the stage does with a microbatch
        ordered = []
        for action in actions:
            ordered.append(action)
            if action.kind == ends and stage in exit_stages:
                ordered.append(replace(action, kind=Kind.EXIT))
        ranks.append(tuple(ordered))
    return Plan("forward-only tuning", tuple(ranks), num_microbatches)


def distilling_tuning(num_ranks: int, num_microbatches: int, exit_stages: Collection[int]) -> Plan:
    """EE-Tuning towards the final head: what it reads travels back from the last stage, stage after stage, to the first
    one with exits, and a microbatch's exits run when it has come.

    The order is that of 1F1B with "pass on the teacher's states, then run the exits" in place of a backward, so a stage
    holds the exits' inputs of as many microbatches as there are stages from it to the last.
    """
    _require_positive(num_ranks=num_ranks, num_microbatches=num_microbatches)
    _require_stages(exit_stages, num_ranks)
    first, last = min(exit_stages), num_ranks - 1
    ranks = []
    for stage in range(num_ranks):
        forward = [Kind.RECEIVE_FORWARD] * (stage > 0) + [Kind.FORWARD] + [Kind.SEND_FORWARD] * (stage < last)
        exits = [Kind.RECEIVE_TEACHER] * (stage < last) + [Kind.SEND_TEACHER] * (stage > first)
        exits += [Kind.EXIT] * (stage in exit_stages)
        if stage < first:
            exits = []
        ranks.append(tuple(
            Action(kind, action.microbatch)
            for action in one_f_one_b_passes(num_ranks, stage, num_microbatches)
            for kind in (forward if action.kind == Kind.FORWARD else exits)
        ))  # fmt: skip
    return Plan("distilling tuning", tuple(ranks), num_microbatches)


# -- Exits in idle time


def with_exits_in_bubbles(
    plan: Plan, exit_stages: Collection[int], before_first_backward: Sequence[int] | None = None
) -> Plan:
    """Move the work of exits out of backwards, into the time in which a stage waits for the gradient from above.

    exit_stages: stages that own exits. before_first_backward: for each rank how many microbatches' exits run before its
    first backward, where 1F1B leaves stage p idle for (P - 1 - p) backwards; see `exits_that_fit`. By default those of
    all microbatches that were forwarded, or of one where fill microbatches use this time. All other exits run right
    before the receive of their own microbatch's gradient. In 1F1B that is never later than in the backward, whatever
    the costs, and keeps one gradient buffer for a short time (with several chunks on a rank it can be later).

    So do those of a chunk's last backward, since gradients are synchronised from there on. Left in the backward: exits
    of microbatches that fill bubbles, on the last stage (which waits for no gradient), and with several chunks on a
    rank those whose gradient is received long before it is used. The result depends on nothing but the arguments, so it
    is the same on all ranks of a tensor-parallel group.
    """
    _require_stages(exit_stages, plan.num_stages)
    if before_first_backward is not None and len(before_first_backward) != plan.num_ranks:
        raise ValueError(f"{len(before_first_backward)} counts of early exits are given for {plan.num_ranks} ranks")
    ranks = []
    for rank, actions in enumerate(plan.ranks):
        if before_first_backward is None:
            filled = any(action.microbatch in plan.fill_warmup for action in actions)
            most = 1 if filled else len(actions)
        else:
            most = before_first_backward[rank]
        chunks = {chunk for chunk in range(plan.num_chunks) if chunk * plan.num_ranks + rank in exit_stages}
        ranks.append(_with_exits_in_bubbles(actions, chunks, most))
    return replace(plan, name=f"{plan.name}, exits in bubbles", ranks=tuple(ranks))


def exits_that_fit(num_ranks: int, exit_backward_ratio: float) -> tuple[int, ...]:
    """Number of microbatches, for each rank of 1F1B, whose exits fit before the first backward at no cost.

    exit_backward_ratio: time of a microbatch's exits over that of a stage's backward without them. At least one: the
    exits of the first microbatch have to run before its backward is complete, so running them while its gradient is
    awaited is never slower.
    """
    if exit_backward_ratio <= 0:
        raise ValueError(f"exit_backward_ratio = {exit_backward_ratio}: must be above 0")
    # A hair's breadth, so that 3 exits of 0.1 fit in 0.3.
    return tuple(max(1, int((num_ranks - 1 - rank) / exit_backward_ratio + 1e-9)) for rank in range(num_ranks))


def _with_exits_in_bubbles(
    actions: Sequence[Action], chunks: Collection[int], before_first_backward: int
) -> tuple[Action, ...]:
    """One rank's actions. chunks: those that own exits."""
    last_backwards = {action.chunk: action for action in actions if action.kind == Kind.BACKWARD}
    receives = [
        index
        for index, action in enumerate(actions)
        if action.kind == Kind.RECEIVE_BACKWARD and action.chunk in chunks and not action.is_partial
    ]
    first = next((i for i, a in enumerate(actions) if a.kind == Kind.RECEIVE_BACKWARD and not a.is_partial), None)
    backward_of = lambda receive: replace(actions[receive], kind=Kind.BACKWARD)
    exit_of = lambda receive: replace(actions[receive], kind=Kind.EXIT)

    def may_be_first(receive: int) -> bool:
        is_forwarded = replace(actions[receive], kind=Kind.FORWARD) in actions[:first]
        return is_forwarded and backward_of(receive) != last_backwards[actions[receive].chunk]

    # In the order in which their gradients come.
    early = [receive for receive in receives if may_be_first(receive)][:before_first_backward]
    exits_at: dict[int | None, list[Action]] = {first: [exit_of(receive) for receive in early]}
    for receive in receives:
        if receive not in early and _next_pass(actions, receive) == backward_of(receive):
            exits_at.setdefault(receive, []).append(exit_of(receive))
    return tuple(a for i, action in enumerate(actions) for a in (*exits_at.get(i, ()), action))


def _next_pass(actions: Sequence[Action], index: int) -> Action | None:
    return next((action for action in actions[index:] if not action.kind.is_message), None)


# -- Interleaved 1F1B


def interleaved(
    num_ranks: int, num_chunks: int, num_microbatches: int, microbatch_group_size: int | None = None
) -> Plan:
    """Interleaved 1F1B: the order of core's `forward_backward_pipelining_with_interleaving`, messages not overlapped.

    microbatch_group_size: microbatches that pass through one chunk before the rank turns to the next chunk (core's
    `microbatch_group_size_per_vp_stage`), by default the number of ranks. Raises ValueError for what core refuses.
    """
    group_size = num_ranks if microbatch_group_size is None else microbatch_group_size
    _require_positive(num_ranks=num_ranks, num_microbatches=num_microbatches, microbatch_group_size=group_size)
    if num_ranks < 2 or num_chunks < 2:
        raise ValueError(
            f"interleaving needs at least 2 ranks and 2 chunks a rank, not {num_ranks} and {num_chunks}; use 1F1B"
        )
    if not num_ranks <= group_size <= num_microbatches:
        raise ValueError(
            f"the microbatch group size {group_size} must lie between the number of ranks, {num_ranks}, and the number "
            f"of microbatches, {num_microbatches}"
        )
    if 0 < num_microbatches % group_size < num_ranks:
        raise ValueError(
            f"{num_microbatches} microbatches in groups of {group_size} leave a last group of "
            f"{num_microbatches % group_size}, fewer than the {num_ranks} ranks: let the number of microbatches be a "
            f"multiple of the group size, or the rest at least {num_ranks}"
        )
    order = _interleaved_order(num_microbatches, num_chunks, group_size)
    ranks = tuple(_interleaved_rank(order, rank, num_ranks, num_chunks, group_size) for rank in range(num_ranks))
    return Plan("interleaved 1F1B", ranks, num_microbatches, num_chunks=num_chunks)


_Turn = tuple[int, int]  # microbatch, chunk


def _interleaved_order(num_microbatches: int, num_chunks: int, group_size: int) -> list[_Turn]:
    """The order in which a rank runs its forwards: group by group, in each group chunk by chunk.

    Backwards have the same order with the chunks counted from the last.
    """
    return [
        (microbatch, chunk)
        for start in range(0, num_microbatches, group_size)
        for chunk in range(num_chunks)
        for microbatch in range(start, min(start + group_size, num_microbatches))
    ]


def _interleaved_rank(
    order: list[_Turn], rank: int, num_ranks: int, num_chunks: int, group_size: int
) -> tuple[Action, ...]:
    is_first, is_last = rank == 0, rank == num_ranks - 1
    num_turns, last_chunk = len(order), num_chunks - 1
    num_warmup = min(num_turns, (num_ranks - 1 - rank) * 2 + last_chunk * group_size)
    actions: list[Action] = []

    def forward(turn: int) -> None:
        actions.append(Action(Kind.FORWARD, *order[turn]))

    def backward(turn: int) -> None:
        actions.append(Action(Kind.BACKWARD, order[turn][0], last_chunk - order[turn][1]))

    def send_forward(turn: int) -> None:
        microbatch, chunk = order[turn]
        if not (is_last and chunk == last_chunk):
            actions.append(Action(Kind.SEND_FORWARD, microbatch, chunk))

    def send_backward(turn: int) -> None:
        microbatch, chunk = order[turn][0], last_chunk - order[turn][1]
        if not (is_first and chunk == 0):
            actions.append(Action(Kind.SEND_BACKWARD, microbatch, chunk))

    def received_after(turn: int, from_same_chunk: bool) -> _Turn | None:
        """What the neighbour sends while this rank runs `turn`; chunks counted in the order of the direction."""
        if from_same_chunk:
            return order[turn + 1] if turn + 1 < num_turns else None
        # From the other end of the pipeline, which is num_ranks - 1 turns behind; its last chunk sends nothing.
        if turn < num_ranks - 1 or turn == num_turns - 1:
            return None
        microbatch, chunk = order[turn - (num_ranks - 1)]
        return (microbatch, chunk + 1) if chunk < last_chunk else None

    def receive_forward(turn: int) -> None:
        received = received_after(turn, from_same_chunk=not is_first)
        if received is not None:
            actions.append(Action(Kind.RECEIVE_FORWARD, *received))

    def receive_backward(turn: int) -> None:
        received = received_after(turn, from_same_chunk=not is_last)
        if received is not None:
            actions.append(Action(Kind.RECEIVE_BACKWARD, received[0], last_chunk - received[1]))

    def receive_first_backward() -> None:
        if not is_last:
            actions.append(Action(Kind.RECEIVE_BACKWARD, 0, last_chunk))

    # Warmup.
    if not is_first:
        actions.append(Action(Kind.RECEIVE_FORWARD, 0, 0))
    for turn in range(num_warmup):
        forward(turn)
        send_forward(turn)
        receive_forward(turn)
    receive_first_backward()
    # Steady state: one forward, one backward.
    for turn in range(num_turns - num_warmup):
        forward(turn + num_warmup)
        backward(turn)
        send_forward(turn + num_warmup)
        send_backward(turn)
        receive_forward(turn + num_warmup)
        receive_backward(turn)
    # Cooldown.
    for turn in range(num_turns - num_warmup, num_turns):
        backward(turn)
        send_backward(turn)
        receive_backward(turn)
    return tuple(actions)


# -- Arguments


def _require_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} = {count}: must be at least 1")


def _require_stages(stages: Collection[int], num_stages: int) -> None:
    for stage in sorted(stages):
        if not 0 <= stage < num_stages:
            raise ValueError(f"exits on stage {stage}: the plan's stages are 0 to {num_stages - 1}")
