"""The validator accepts what builders make and refuses what differs from it, naming the place."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.early_exit.schedules.builders import (
    distilling_tuning,
    forward_only_tuning,
    interleaved,
    one_f_one_b,
    with_exits_in_bubbles,
)
from megatron.early_exit.schedules.fill import with_filled_bubbles
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.plan_checks import validate
from tests.unit.brute_force_pipeline import Costs, NeverEndsError, end_times

# -- By hand

PLAN = """# by hand: 2 ranks, 1 chunk, 3 microbatches, 0 + 0 fill
F0 SF0 F1 SF1 X0 RB0 B0 F2 SF2 RB1 B1 RB2 B2
RF0 F0 B0 SB0 RF1 F1 B1 SB1 RF2 F2 B2 SB2
"""
FILLED = str(with_filled_bubbles(4, 6, {0, 1}))
CHUNKS = str(interleaved(2, 2, 2))
TUNING = str(forward_only_tuning(3, 2, {0, 2}))
DISTILLING = """# by hand: 3 ranks, 1 chunk, 2 microbatches, 0 + 0 fill
F0 SF0 F1 SF1
RF0 F0 SF0 RF1 F1 SF1 RT0 X0 RT1 X1
RF0 F0 ST0 RF1 F1 ST1
"""


@pytest.mark.parametrize("text, exit_stages", [(PLAN, {0}), (FILLED, {0, 1}), (CHUNKS, ()), (TUNING, {0, 2}),
                                               (DISTILLING, {1})])  # fmt: skip
def test_valid(text: str, exit_stages: set[int]) -> None:
    validate(Plan.parse(text), exit_stages)


@pytest.mark.parametrize("text, old, new, exit_stages, message", [
    # What there is.
    (PLAN, "F2 SF2 RB1", "F2 SF2 F2 RB1", {0}, "rank 0, action 9 (F2): was there before, as action 7"),
    (PLAN, "F2 SF2", "F2.1 SF2", {0}, "rank 0, action 7 (F2.1): chunk 1 of a plan of 1 chunk"),
    (PLAN, "F2 SF2", "F3p SF2", {0}, "rank 0, action 7 (F3p): microbatch 3 of a plan of 3 microbatches"),
    (PLAN, "F2 SF2", "F2p SF2", {0}, "rank 0, action 7 (F2p): marked as partial, but only microbatches from 3"),
    (FILLED, "F7p", "F7", {0, 1}, "rank 0, action 4 (F7): not marked as partial, but only microbatches from 6"),
    # Passes.
    (PLAN, "F2 SF2 RB1", "SF2 RB1", {0}, "rank 0: F2 is missing: every microbatch runs forward on each stage"),
    (PLAN, "B1 SB1", "SB1", {0}, "rank 1: B1 is missing: every microbatch runs backward on each stage"),
    (CHUNKS, " B0.1 SB0.1 RB1.1", " SB0.1 RB1.1", (), "rank 0: B0.1 is missing: every microbatch runs backward"),
    # Exits.
    (PLAN, "F2 SF2 RB1", "F2 SF2 X1 X1 RB1", {0}, "rank 0, action 10 (X1): was there before, as action 9"),
    (PLAN, "B2 SB2", "X2 B2 SB2", {0}, "rank 1, action 10 (X2): stage 1 has no exit"),
    (PLAN, "RB1 B1", "X2 RB1 B1", {0}, "rank 0, action 9 (X2): gradients are synchronised from the exits of the "
     "stage's last backward on, so these must come after B1, which is action 11"),
    (PLAN, "X0 RB0 B0", "RB0 B0 X0", {0}, "rank 0, action 5 (B0): must come after X0, which is action 6"),
    (PLAN, "F1 SF1 X0", "X1 F1 SF1 X0", {0}, "rank 0, action 2 (X1): must come after F1, which is action 3"),
    (FILLED, "F7p", "F7p X7p", {0, 1}, "rank 0, action 5 (X7p): exits of a microbatch that fills a bubble run in its"),
    (PLAN, "X0", "X0", {5}, "exits on stage 5: the stages of by hand are 0 to 1"),
    # Messages.
    (PLAN, "F1 SF1", "F1", {0}, "rank 0: SF1 is missing: stage 1 needs what F1 of stage 0 returns"),
    (PLAN, "RF1 F1", "F1", {0}, "rank 1: RF1 is missing: stage 1 needs what F1 of stage 0 returns"),
    (PLAN, "B1 SB1", "B1", {0}, "rank 1: SB1 is missing: stage 0 needs what B1 of stage 1 returns"),
    (PLAN, "RB1 B1", "B1", {0}, "rank 0: RB1 is missing: stage 0 needs what B1 of stage 1 returns"),
    (PLAN, "RF1 F1 B1", "RF1 F1 SF1 B1", {0}, "rank 1, action 6 (SF1): no stage goes on with what it sends"),
    (PLAN, "F1 SF1 X0", "RF1 F1 SF1 X0", {0}, "rank 0, action 2 (RF1): no stage makes what it waits for"),
    (PLAN, "F0 SF0 F1 SF1", "F0 F1 SF1 SF0", {0},
     "rank 1, action 0 (RF0): messages of rank 0 arrive in the order in which they were sent, and this one is SF1 "
     "(action 2 there)"),
    # Order on a stage.
    (PLAN, "F1 SF1", "SF1 F1", {0}, "rank 0, action 2 (SF1): must come after F1, which is action 3"),
    (PLAN, "RF1 F1", "F1 RF1", {0}, "rank 1, action 4 (F1): must come after RF1, which is action 5"),
    (PLAN, "F1 B1 SB1", "B1 F1 SB1", {0}, "rank 1, action 5 (B1): must come after F1, which is action 6"),
    (PLAN, "B1 SB1", "SB1 B1", {0}, "rank 1, action 6 (SB1): must come after B1, which is action 7"),
    (PLAN, "RB1 B1", "B1 RB1", {0}, "rank 0, action 9 (B1): must come after RB1, which is action 10"),
    # Fill.
    (FILLED, "F7p F1 SF1 B7p", "F1 SF1 B7p", {0, 1}, "F7p is missing on all ranks"),
    (FILLED, " RB6p B6p", " RB6p", {0, 1}, "rank 0: B6p is missing: a warmup fill runs backward through all stages"),
    (FILLED, "F0 SF0 F6p SF6p", "F0 SF0 SF6p", {0, 1},
     "rank 0: F6p is missing: stage 1 runs it forward, so all stages before have to"),
    (FILLED, "F7p", "F7p", {0}, "rank 1, action 4 (F6p): the warmup fill ends here, but stage 1 has no exit"),
    (FILLED, "F9p SF9p RB4 B4 RB5 B5\nRF0", "RB4 B4 RB5 B5\nRF0", {0, 1},
     "rank 0: F9p is missing: a cooldown fill runs forward on each stage"),
    (FILLED, "B9p\n", "\n", {0, 1}, "B9p is missing on all ranks"),
    (FILLED, "F8p B8p SB8p", "F8p", {0, 1}, "rank 3: B8p is missing: stage 2 runs it backward, so all stages after"),
    # Tuning.
    (TUNING, "SF0 X0", "SF0", {0, 2}, "rank 0: X0 is missing: without a backward, exits need a step of their own"),
    (TUNING, "X0 F1", "X0 B0 F1", {0, 2}, "rank 1: B0 is missing: every microbatch runs backward on each stage"),
    (TUNING, "X0 F1", "X0 F1", {0, 1, 2}, "rank 1: X0 is missing"),
    (TUNING, "X0 F1", "X0 F1", (), "nothing runs backward, and there are no exits to tune"),
    # Distillation.
    (DISTILLING, "RT1 X1", "X1", {1}, "rank 1: RT1 is missing: what the final head reads of it has to come to stage 1"),
    (DISTILLING, "F1 ST1", "F1", {1}, "rank 2: ST1 is missing: what the final head reads of it has to come to stage 1"),
    (DISTILLING, "RT0 X0", "RT0 ST0 X0", {1}, "rank 1, action 7 (ST0): no stage makes it, or none needs it"),
    (DISTILLING, "RT0 X0", "X0 RT0", {1}, "rank 1, action 6 (X0): must come after RT0, which is action 7"),
    (DISTILLING, "F0 ST0", "ST0 F0", {1}, "rank 2, action 1 (ST0): must come after F0, which is action 2"),
    (DISTILLING, "F0 ST0 RF1 F1 ST1", "F0 RF1 F1 ST1 ST0", {1}, "messages of rank 2 arrive in the order in which they"),
    (DISTILLING, "RF0 F0 SF0 RF1", "RT0 RF0 F0 SF0 RF1", {1}, "rank 1, action 7 (RT0): was there before"),
    (PLAN, "B0 SB0", "ST0 B0 SB0", {0}, "rank 1, action 2 (ST0): exits follow the final head only where nothing runs"),
])  # fmt: skip
def test_refused_with_the_place(text: str, old: str, new: str, exit_stages: set[int], message: str) -> None:
    assert old in text
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(Plan.parse(text.replace(old, new, 1)), exit_stages)


def test_deadlock() -> None:
    # Rank 0 wants a gradient before it has sent what rank 1 needs for it.
    plan = Plan.parse(
        "# stuck: 2 ranks, 1 chunk, 1 microbatch, 0 + 0 fill\n"
        "F0 RB0 SF0 B0\n"
        "RF0 F0 B0 SB0\n"
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        validate(plan)
    assert "rank 0 at RB0 (action 1 of 4" in str(error.value) and "rank 1 at RF0" in str(error.value)


def test_plans_of_no_ranks_or_microbatches() -> None:
    with pytest.raises(ValueError, match="num_ranks = 0"):
        validate(Plan("empty", (), 1))
    with pytest.raises(ValueError, match="num_microbatches = 0"):
        validate(Plan("empty", ((),), 0))


# -- Mutations of random plans


@st.composite
def built_plans(draw: st.DrawFn) -> tuple[Plan, set[int]]:
    """(a builder's plan, stages with exits)."""
    num_ranks, num_microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    name = draw(st.sampled_from(["1F1B", "exits", "filled", "filled, exits", "interleaved", "tuning", "distilling"]))
    if name == "interleaved":
        num_ranks = draw(st.integers(2, 3))
        plan = interleaved(num_ranks, 2, num_ranks * draw(st.integers(1, 2)))
    else:
        plan = one_f_one_b(num_ranks, num_microbatches)
    exit_stages = draw(st.sets(st.integers(0, plan.num_stages - 1), min_size=1))
    if name == "tuning":
        plan = forward_only_tuning(max(exit_stages) + 1, num_microbatches, exit_stages)
    if name == "distilling":
        plan = distilling_tuning(num_ranks, num_microbatches, exit_stages)
    if name.startswith("filled"):
        plan = with_filled_bubbles(num_ranks, num_microbatches, exit_stages)
    if name.endswith("exits") or (name == "interleaved" and draw(st.booleans())):
        plan = with_exits_in_bubbles(plan, exit_stages)
    return plan, exit_stages


def with_rank(plan: Plan, rank: int, actions: list[Action]) -> Plan:
    return replace(plan, ranks=(*plan.ranks[:rank], tuple(actions), *plan.ranks[rank + 1 :]))


def draw_place(data: st.DataObject, plan: Plan) -> tuple[int, int]:
    rank = data.draw(st.integers(0, plan.num_ranks - 1))
    return rank, data.draw(st.integers(0, len(plan.ranks[rank]) - 1))


def refusal(plan: Plan, exit_stages: set[int]) -> str:
    with pytest.raises(ValueError) as error:
        validate(plan, exit_stages)
    return str(error.value)


@given(built_plans())
@settings(max_examples=100, deadline=None)
def test_builders_plans_are_valid(built: tuple[Plan, set[int]]) -> None:
    plan, exit_stages = built
    validate(plan, exit_stages)
    validate(Plan.parse(str(plan)), exit_stages)


@given(built_plans(), st.data())
@settings(max_examples=150, deadline=None)
def test_dropped_actions(built: tuple[Plan, set[int]], data: st.DataObject) -> None:
    plan, exit_stages = built
    rank, index = draw_place(data, plan)
    actions = list(plan.ranks[rank])
    dropped = actions.pop(index)
    mutated = with_rank(plan, rank, actions)
    if dropped.kind == Kind.EXIT and "tuning" not in plan.name:
        validate(mutated, exit_stages)  # it runs in the backward then
        return
    message = refusal(mutated, exit_stages)
    if not dropped.is_partial and any(a.kind == Kind.BACKWARD for actions in mutated.ranks for a in actions):
        assert f"rank {rank}: {dropped} is missing" in message
    else:  # where a fill turns round depends on its passes
        assert f"{dropped.microbatch}" in message or "nothing runs backward" in message


@given(built_plans(), st.data())
@settings(max_examples=100, deadline=None)
def test_repeated_actions(built: tuple[Plan, set[int]], data: st.DataObject) -> None:
    plan, exit_stages = built
    rank, index = draw_place(data, plan)
    actions = list(plan.ranks[rank])
    place = data.draw(st.integers(index + 1, len(actions)))
    actions.insert(place, actions[index])
    message = refusal(with_rank(plan, rank, actions), exit_stages)
    assert f"rank {rank}, action {place} ({actions[index]}): was there before, as action {index}" in message


@given(built_plans(), st.data())
@settings(max_examples=100, deadline=None)
def test_changed_microbatches(built: tuple[Plan, set[int]], data: st.DataObject) -> None:
    plan, exit_stages = built
    rank, index = draw_place(data, plan)
    actions = list(plan.ranks[rank])
    total = plan.num_microbatches + plan.num_fill
    other = data.draw(st.integers(0, total).filter(lambda number: number != actions[index].microbatch))
    if actions[index].kind == Kind.EXIT and other < plan.num_microbatches:
        return  # another microbatch's exit may run there just as well
    actions[index] = replace(actions[index], microbatch=other, is_partial=other >= plan.num_microbatches)
    message = refusal(with_rank(plan, rank, actions), exit_stages)
    assert f"rank {rank}" in message or f"{other}" in message


@given(built_plans(), st.data())
@settings(max_examples=150, deadline=None)
def test_changed_kinds_and_chunks(built: tuple[Plan, set[int]], data: st.DataObject) -> None:
    plan, exit_stages = built
    rank, index = draw_place(data, plan)
    actions = list(plan.ranks[rank])
    kind, chunk = data.draw(st.sampled_from(Kind)), data.draw(st.integers(0, plan.num_chunks))
    assume((kind, chunk) != (actions[index].kind, actions[index].chunk))
    assume(actions[index].kind != Kind.EXIT)  # may be moved to another chunk
    actions[index] = replace(actions[index], kind=kind, chunk=chunk)
    # One stage, one microbatch, X in place of B: that is tuning.
    assume(any(action.kind == Kind.BACKWARD for action in actions) or plan.num_ranks > 1)
    assert "rank" in refusal(with_rank(plan, rank, actions), exit_stages)


@given(built_plans(), st.data())
@settings(max_examples=100, deadline=None)
def test_actions_on_another_rank(built: tuple[Plan, set[int]], data: st.DataObject) -> None:
    plan, exit_stages = built
    assume(plan.num_ranks > 1)
    rank, index = draw_place(data, plan)
    assume(plan.ranks[rank][index].kind != Kind.EXIT)
    actions = list(plan.ranks[rank])
    moved = actions.pop(index)
    other = data.draw(st.integers(0, plan.num_ranks - 1).filter(lambda r: r != rank))
    there = list(plan.ranks[other])
    there.insert(data.draw(st.integers(0, len(there))), moved)
    refusal(with_rank(with_rank(plan, rank, actions), other, there), exit_stages)


@given(built_plans(), st.data())
@settings(max_examples=200, deadline=None)
def test_swapped_actions(built: tuple[Plan, set[int]], data: st.DataObject) -> None:
    """Any two actions of a rank exchanged: refused exactly where an independent reading of the rules says so."""
    plan, exit_stages = built
    rank, first = draw_place(data, plan)
    assume(first + 1 < len(plan.ranks[rank]))
    second = data.draw(st.integers(first + 1, len(plan.ranks[rank]) - 1))
    actions = list(plan.ranks[rank])
    actions[first], actions[second] = actions[second], actions[first]
    mutated = with_rank(plan, rank, actions)
    if is_in_order(mutated):
        validate(mutated, exit_stages)
    else:
        assert re.search(r"rank \d", refusal(mutated, exit_stages))


def is_in_order(plan: Plan) -> bool:
    """Of a plan that has all actions: does each find what it needs when it is run, message by message?"""
    channels: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (kind of send, sender): [(stage, microbatch)]
    done: set[tuple[int, str, int]] = set()
    left = [list(actions) for actions in plan.ranks]

    def is_possible(rank: int, action: Action) -> bool:
        stage, microbatch = action.chunk * plan.num_ranks + rank, action.microbatch
        has = lambda kind: (stage, kind, microbatch) in done
        exists = lambda kind: any(a.kind == kind and a.microbatch == microbatch for a in plan.actions_of(stage))
        match str(action.kind):
            case "F":
                return has("RF") or not exists("RF")
            case "B":
                return has("F") and all(has(kind) or not exists(kind) for kind in ("RB", "X"))
            case "SF":
                return has("F")
            case "X":
                # With those of the last backward the synchronisation of gradients begins: all others must be there.
                backwards = plan.microbatches(stage, Kind.BACKWARD)
                is_last = backwards and backwards[-1] == microbatch
                follows = has("RT") or not exists("RT")
                return (
                    has("F")
                    and follows
                    and (not is_last or all((stage, "B", other) in done for other in backwards[:-1]))
                )
            case "SB":
                return has("B")
            case "ST":
                return has("RT") if exists("RT") else has("F")
            case "RF":
                queue = channels.get(("SF", (rank - 1) % plan.num_ranks), [])
                return queue[:1] == [(stage - 1, microbatch)]
            case "RT":
                queue = channels.get(("ST", (rank + 1) % plan.num_ranks), [])
                return queue[:1] == [(stage + 1, microbatch)]
            case "RB":
                queue = channels.get(("SB", (rank + 1) % plan.num_ranks), [])
                return queue[:1] == [(stage + 1, microbatch)]

    while any(left):
        ready = [rank for rank, actions in enumerate(left) if actions and is_possible(rank, actions[0])]
        if not ready:
            return False
        rank = ready[0]
        action = left[rank].pop(0)
        stage = action.chunk * plan.num_ranks + rank
        done.add((stage, str(action.kind), action.microbatch))
        if action.kind in ("SF", "SB", "ST"):
            channels.setdefault((str(action.kind), rank), []).append((stage, action.microbatch))
        if action.kind in ("RF", "RB", "RT"):
            sender = (rank - 1 if action.kind == "RF" else rank + 1) % plan.num_ranks
            channels["S" + action.kind[1], sender].pop(0)
    return True


@given(built_plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_valid_plans_come_to_an_end(built: tuple[Plan, set[int]], data: st.DataObject) -> None:
    """Brute force agrees, also after a swap: what the validator lets through never waits forever."""
    plan, exit_stages = built
    rank, index = draw_place(data, plan)
    assume(index + 1 < len(plan.ranks[rank]))
    actions = list(plan.ranks[rank])
    actions[index], actions[index + 1] = actions[index + 1], actions[index]
    mutated = with_rank(plan, rank, actions)
    costs = Costs.equal(plan.num_stages, exit=0.5, communication=0.5)
    try:
        validate(mutated, exit_stages)
    except ValueError:
        mutated = plan
    try:
        end_times(mutated, costs)
    except NeverEndsError as error:
        raise AssertionError(f"a valid plan waits forever: {error}\n{mutated}") from error
