"""Times, idle time and memory of plans: closed forms by hand, and a simulation in steps of time as the oracle."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.schedules.builders import (
    forward_only_tuning,
    interleaved,
    one_f_one_b,
    with_exits_in_bubbles,
)
from megatron.early_exit.schedules.fill import PassTimes, with_filled_bubbles
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.simulate import (
    DeadlockError,
    peak_activation_bytes,
    simulate,
    state_bytes,
)
from megatron.early_exit.schedules.stage_costs import StageCosts

EQUAL = StageCosts(forward_sec=1.0, backward_sec=2.0)


# Closed forms


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 1), (1, 5), (2, 3), (4, 2), (4, 4), (4, 9), (7, 12)])
def test_1f1b_takes_n_plus_p_minus_1_passes(num_ranks: int, num_microbatches: int) -> None:
    costs = [StageCosts(forward_sec=1.25, backward_sec=2.5)] * num_ranks
    timeline = simulate(one_f_one_b(num_ranks, num_microbatches), costs)
    assert timeline.iteration_sec == pytest.approx((num_microbatches + num_ranks - 1) * 3.75)
    for rank in range(num_ranks):
        assert timeline.idle_sec(rank) == pytest.approx((num_ranks - 1) * 3.75)
        assert timeline.idle_share(rank) == pytest.approx((num_ranks - 1) / (num_microbatches + num_ranks - 1))


def test_messages_lengthen_the_way_there_and_back() -> None:
    costs = [replace(EQUAL, communication_sec=0.5)] * 3
    assert simulate(one_f_one_b(3, 1), costs).iteration_sec == pytest.approx(3 * 3 + 4 * 0.5)


def test_exits_in_the_backward_and_in_idle_time() -> None:
    """Two stages, an exit of 0.5 on the first. Its passes end, with the exits in the backward, at 6.5 (B0), 10 (B1),
    13.5 (B2) and, when stage 1 has done F3 and B3 after F3's end at 11, at 14 + 2.5. With X0 and X1 in the wait for the
    first gradient and X2 and X3 in those for their own, they cost no time."""
    plan = one_f_one_b(2, 4)
    costs = [replace(EQUAL, exit_sec=0.5), EQUAL]
    assert simulate(plan, [EQUAL, EQUAL]).iteration_sec == 15
    assert simulate(plan, costs).iteration_sec == 16.5
    in_bubbles = simulate(with_exits_in_bubbles(plan, [0]), costs)
    assert in_bubbles.iteration_sec == 15
    by_text = {(timed.rank, str(timed.action)): timed for timed in in_bubbles.actions}
    assert by_text[0, "B0"].end_sec - by_text[0, "B0"].start_sec == 2.0
    assert by_text[0, "X0"].end_sec - by_text[0, "X0"].start_sec == 0.5
    in_backward = {(timed.rank, str(timed.action)): timed for timed in simulate(plan, costs).actions}[0, "B3"]
    assert (in_backward.end_sec - in_backward.start_sec, in_backward.exit_sec) == (2.5, 0.5)


def test_exits_hidden_by_a_slower_last_stage_cost_only_the_ways_end() -> None:
    head, exit_sec, num_microbatches = 0.75, 0.75, 6
    plain = [EQUAL, EQUAL, replace(EQUAL, forward_sec=1 + head)]
    costs = [EQUAL, replace(EQUAL, exit_sec=exit_sec), plain[2]]
    plan = one_f_one_b(3, num_microbatches)
    bottleneck = num_microbatches * (3 + head)
    assert simulate(plan, plain).iteration_sec == pytest.approx(2 + bottleneck + 4)
    assert simulate(plan, costs).iteration_sec == pytest.approx(2 + bottleneck + 4 + exit_sec)


def test_fill_takes_no_time_and_keeps_no_activations_without_a_backward() -> None:
    times = PassTimes.uniform(4)
    plan = with_filled_bubbles(4, 6, [0, 1], times)
    assert plan.num_fill_warmup == plan.num_fill_cooldown == 2
    costs = [replace(EQUAL, activation_bytes=10)] * 4
    assert simulate(plan, costs).iteration_sec == simulate(one_f_one_b(4, 6), costs).iteration_sec
    assert peak_activation_bytes(plan, costs) == peak_activation_bytes(one_f_one_b(4, 6), costs) == [40, 30, 20, 10]


def test_forward_only_tuning() -> None:
    costs = [StageCosts(1.0, 0.0, exit_sec=0.5, activation_bytes=10, exit_head_bytes=7, exit_gradient_bytes=3)] * 2
    plan = forward_only_tuning(2, 5, [0, 1])
    timeline = simulate(plan, costs)
    # The send comes before the exits of stage 0, so stage 1 runs without a pause once it has begun.
    assert timeline.iteration_sec == pytest.approx(1 + 5 * 1.5)
    assert peak_activation_bytes(plan, costs) == [7, 7]


def test_memory_by_hand() -> None:
    plan = Plan.parse(
        "# by hand: 2 ranks, 1 chunk, 3 microbatches, 0 + 0 fill\n"
        "F0 SF0 F1 SF1 X0 X1 RB0 B0 F2 SF2 RB1 B1 RB2 B2\n"
        "RF0 F0 B0 SB0 RF1 F1 B1 SB1 RF2 F2 B2 SB2\n"
    )
    first = StageCosts(
        1.0, 2.0, exit_sec=0.5, activation_bytes=100, exit_gradient_bytes=10, exit_head_bytes=7, recompute_bytes=2,
        state_bytes=1000,
    )  # fmt: skip
    last = StageCosts(1.0, 2.0, activation_bytes=100, final_head_bytes=50, state_bytes=500)
    # Two microbatches, two gradients, and the head at X1; after B0 100 + 10 are kept and F2 adds 100.
    assert peak_activation_bytes(plan, [first, last]) == [2 * 100 + 2 * 10 + 7, 150]
    assert state_bytes(plan, [first, last]) == [1000, 500]
    # Without X2, the exits of microbatch 2 run in its backward, with one microbatch kept.
    alone = replace(first, exit_head_bytes=500)
    assert peak_activation_bytes(plan, [alone, last])[0] == 220 + 500
    # Interleaved: both chunks of a rank count.
    costs = [replace(EQUAL, activation_bytes=1, state_bytes=stage) for stage in range(4)]
    plan = interleaved(2, 2, 4)
    # Rank 0 runs 2 x 1 + 2 forwards in the warmup and one more before its first backward; rank 1 two fewer.
    assert peak_activation_bytes(plan, costs) == [5, 3]
    assert state_bytes(plan, costs) == [0 + 2, 1 + 3]


def test_interleaving_divides_the_idle_time_by_the_chunks() -> None:
    half = StageCosts(forward_sec=0.5, backward_sec=1.0)
    timeline = simulate(interleaved(4, 2, 8), [half] * 8)
    assert timeline.iteration_sec == pytest.approx(8 * 3 + 3 * 3 / 2)


# Errors


def test_deadlock_names_the_waiting_actions() -> None:
    plan = Plan.parse(
        "# wrong: 2 ranks, 1 chunk, 2 microbatches, 0 + 0 fill\n"
        "F0 SF0 RB0 B0 F1 SF1 RB1 B1\n"
        "RF0 F0 RF1 F1 B0 SB0 B1 SB1\n"
    )
    with pytest.raises(DeadlockError) as caught:
        simulate(plan, [EQUAL, EQUAL])
    text = str(caught.value)
    assert "rank 0 at RB0 (action 2 of 8, counted from 0): needs SB0 of rank 1" in text
    assert "rank 1 at RF1 (action 2 of 8, counted from 0): needs SF1 of rank 0" in text
    assert [(rank, str(action)) for rank, _, action in caught.value.waiting] == [(0, "RB0"), (1, "RF1")]


def test_costs_are_of_every_stage() -> None:
    with pytest.raises(ValueError, match="costs of 2 stages are given for a plan of 4"):
        simulate(interleaved(2, 2, 2), [EQUAL] * 2)
    with pytest.raises(ValueError, match="forward_sec = -1"):
        StageCosts(-1, 1)
    with pytest.raises(ValueError, match="state_bytes = nan"):
        StageCosts(1, 1, state_bytes=float("nan"))


# The oracle: time in steps of 1, every rank looks at every step whether it can go on.


def stepped(plan: Plan, costs: list[StageCosts]) -> dict[tuple[int, str], tuple[int, int]]:
    """(rank, action) -> start and end. Costs are whole numbers. Fails if nothing happens for long."""
    sent: dict[tuple[Kind, int, int], int] = {}
    times: dict[tuple[int, str], tuple[int, int]] = {}
    position, free_at = [0] * plan.num_ranks, [0] * plan.num_ranks
    begun: dict[int, int] = {}
    limit = sum(len(actions) for actions in plan.ranks) * (1 + max(
        int(c.forward_sec + c.backward_sec + c.exit_sec + c.communication_sec) for c in costs
    ))  # fmt: skip
    for now in range(limit):
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(plan.ranks):
                if position[rank] == len(actions) or free_at[rank] > now:
                    continue
                action = actions[position[rank]]
                stage = action.chunk * plan.num_ranks + rank
                begun.setdefault(rank, now)
                duration = 0
                if action.kind == Kind.SEND_FORWARD:
                    sent[Kind.RECEIVE_FORWARD, stage + 1, action.microbatch] = now + int(costs[stage].communication_sec)
                elif action.kind == Kind.SEND_BACKWARD:
                    sent[Kind.RECEIVE_BACKWARD, stage - 1, action.microbatch] = now + int(
                        costs[stage].communication_sec
                    )
                elif action.kind.is_message:
                    if sent.get((action.kind, stage, action.microbatch), limit) > now:
                        continue
                elif action.kind == Kind.FORWARD:
                    duration = int(costs[stage].forward_sec)
                elif action.kind == Kind.EXIT:
                    duration = int(costs[stage].exit_sec)
                else:
                    duration = int(costs[stage].backward_sec)
                    if replace(action, kind=Kind.EXIT) not in actions[: position[rank]]:
                        duration += int(costs[stage].exit_sec)
                times[rank, str(action)] = (begun.pop(rank), now + duration)
                free_at[rank] = now + duration
                position[rank] += 1
                moved = True
        if all(position[rank] == len(actions) for rank, actions in enumerate(plan.ranks)):
            return times
    raise AssertionError("the oracle saw a deadlock")


def random_plan(seed: int, num_ranks: int, num_chunks: int, num_microbatches: int) -> Plan:
    """A plan in a random order that respects all dependencies, exits early or not, the last microbatch partial."""
    source = random.Random(seed)
    num_stages = num_ranks * num_chunks
    remaining: dict[tuple[int, int], list[tuple[Kind, int]]] = {}  # by (microbatch, direction): kinds with stages
    for microbatch in range(num_microbatches + 1):
        is_partial = microbatch == num_microbatches
        top = source.randrange(num_stages) if is_partial else num_stages - 1
        way = []
        for stage in range(top + 1):
            way += [(Kind.RECEIVE_FORWARD, stage)] * (stage > 0) + [(Kind.FORWARD, stage)]
            if stage < top:
                way.append((Kind.SEND_FORWARD, stage))
            if source.random() < 0.3:
                way.append((Kind.EXIT, stage))
        bottom = source.randrange(top + 1) if is_partial else 0
        for stage in range(top, bottom - 1, -1):
            way += [(Kind.RECEIVE_BACKWARD, stage)] * (stage < top) + [(Kind.BACKWARD, stage)]
            way += [(Kind.SEND_BACKWARD, stage)] * (stage > bottom)
        remaining[microbatch, 0] = way
    ranks: list[list[Action]] = [[] for _ in range(num_ranks)]
    while remaining:
        microbatch, _ = key = source.choice(list(remaining))
        kind, stage = remaining[key].pop(0)
        chunk, rank = divmod(stage, num_ranks)
        ranks[rank].append(Action(kind, microbatch, chunk, microbatch == num_microbatches))
        if not remaining[key]:
            del remaining[key]
    return Plan("random", tuple(map(tuple, ranks)), num_microbatches, 1, 0, num_chunks)


whole_costs = st.builds(
    StageCosts,
    forward_sec=st.integers(0, 5), backward_sec=st.integers(0, 7), exit_sec=st.integers(0, 3),
    communication_sec=st.integers(0, 4),
)  # fmt: skip


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_times_equal_the_oracle(data: st.DataObject) -> None:
    num_ranks, num_chunks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    plan = random_plan(data.draw(st.integers(0, 10**6)), num_ranks, num_chunks, data.draw(st.integers(1, 5)))
    costs = data.draw(st.lists(whole_costs, min_size=plan.num_stages, max_size=plan.num_stages))
    timeline = simulate(plan, costs)
    assert {(t.rank, str(t.action)): (t.start_sec, t.end_sec) for t in timeline.actions} == stepped(plan, costs)
    busy = [timeline.iteration_sec - timeline.idle_sec(rank) for rank in range(num_ranks)]
    for rank in range(num_ranks):
        assert 0 <= timeline.idle_sec(rank) <= timeline.iteration_sec
        passes = [t for t in timeline.of_rank(rank) if not t.action.kind.is_message]
        assert busy[rank] == sum(t.end_sec - t.start_sec for t in passes)


@given(st.integers(1, 5), st.integers(1, 9), st.booleans(), st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_builders_plans_equal_the_oracle(
    num_ranks: int, num_microbatches: int, is_filled: bool, in_bubbles: bool, data: st.DataObject
) -> None:
    exits = data.draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
    costs = [
        replace(data.draw(whole_costs), exit_sec=2 if stage in exits else 0, forward_sec=1 + stage % 2)
        for stage in range(num_ranks)
    ]
    plan = (
        with_filled_bubbles(num_ranks, num_microbatches, exits)
        if is_filled
        else one_f_one_b(num_ranks, num_microbatches)
    )
    plan = with_exits_in_bubbles(plan, exits) if in_bubbles else plan
    timeline = simulate(plan, costs)
    assert {(t.rank, str(t.action)): (t.start_sec, t.end_sec) for t in timeline.actions} == stepped(plan, costs)
