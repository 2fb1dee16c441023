"""Builders of plans: golden files, and properties of all plans against brute force."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.schedules.builders import (
    distilling_tuning,
    exits_that_fit,
    forward_only_tuning,
    interleaved,
    one_f_one_b,
    with_exits_in_bubbles,
)
from megatron.early_exit.schedules.fill import PassTimes, end_times, uniform_fill, with_filled_bubbles
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.plan_checks import validate
from tests.unit.brute_force_pipeline import Costs, iteration_time, most_in_flight
from tests.unit.brute_force_pipeline import end_times as brute_force_end_times

GOLDEN = Path(__file__).parent.parent / "fixtures" / "plans"
ROUNDING = 1e-5  # of iterations that take up to some hundred


# -- Golden files


GOLDEN_PLANS = {
    "1f1b_4_ranks": lambda: one_f_one_b(4, 6),
    "1f1b_fewer_microbatches": lambda: one_f_one_b(4, 2),
    "interleaved_2_ranks_2_chunks": lambda: interleaved(2, 2, 4),
    "interleaved_group_of_3": lambda: interleaved(2, 2, 5, microbatch_group_size=3),
    "exits_in_bubbles": lambda: with_exits_in_bubbles(one_f_one_b(4, 6), {1, 2}),
    "filled_bubbles": lambda: with_filled_bubbles(4, 6, {0, 1}),
    "filled_bubbles_exit_on_stage_0": lambda: with_filled_bubbles(4, 6, {0}, num_fill_cooldown=1),
    "tuning": lambda: forward_only_tuning(3, 2, {0, 2}),
    "distilling": lambda: distilling_tuning(3, 4, {0, 2}),
}


@pytest.mark.parametrize("name", GOLDEN_PLANS)
def test_golden_plans(name: str) -> None:
    assert str(GOLDEN_PLANS[name]()) == (GOLDEN / f"{name}.txt").read_text()


# -- Strategies


worlds = st.tuples(st.integers(1, 5), st.integers(1, 8))  # ranks, microbatches
ratios = st.sampled_from([0.4, 0.5, 1.0, 1.5, 2.0, 2.25, 3.0])


def stage_sets(num_stages: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, num_stages - 1), min_size=1)


@st.composite
def pass_times(draw: st.DrawFn, num_stages: int) -> PassTimes:
    several = lambda values: tuple(draw(st.lists(values, min_size=num_stages, max_size=num_stages)))
    communication = draw(st.sampled_from([0.0, 0.25, 1.0]))
    return PassTimes(
        several(st.sampled_from([1.0, 1.25, 2.0])), several(st.sampled_from([1.0, 2.0, 2.5])), communication
    )


def costs_of(times: PassTimes) -> Costs:
    return Costs(times.forward, times.backward, [0.0] * len(times.forward), times.communication)


def num_passes(plan: Plan, stage: int, kind: Kind, microbatches: range) -> int:
    return sum(microbatch in microbatches for microbatch in plan.microbatches(stage, kind))


# -- 1F1B and interleaving (the order itself is compared with core's in tests/distributed/test_plan_order.py)


@given(worlds, ratios)
@settings(max_examples=60, deadline=None)
def test_one_f_one_b(world: tuple[int, int], ratio: float) -> None:
    num_ranks, num_microbatches = world
    plan = one_f_one_b(num_ranks, num_microbatches)
    validate(plan)
    expected = (num_microbatches + num_ranks - 1) * (1 + ratio)
    assert iteration_time(plan, Costs.equal(num_ranks, ratio)) == pytest.approx(expected, abs=ROUNDING)
    for rank in range(num_ranks):
        assert most_in_flight(plan, rank) == min(num_ranks - rank, num_microbatches)


@st.composite
def interleaved_arguments(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Those that core accepts: ranks, chunks, microbatches, group size."""
    num_ranks, num_chunks = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    group_size = draw(st.integers(num_ranks, num_ranks + 2))
    rest = draw(st.sampled_from([0, *range(num_ranks, group_size)]))
    return num_ranks, num_chunks, group_size * draw(st.integers(1, 2)) + rest, group_size


@given(interleaved_arguments())
@settings(max_examples=40, deadline=None)
def test_interleaved(arguments: tuple[int, int, int, int]) -> None:
    plan = interleaved(*arguments)
    validate(plan)
    num_ranks, num_chunks, num_microbatches, _ = arguments
    # Fewer idle forwards and backwards than 1F1B: chunks are parts of its stages.
    longest = (num_microbatches + num_ranks - 1) * 3.0
    part = Costs([1.0 / num_chunks] * plan.num_stages, [2.0 / num_chunks] * plan.num_stages, [0.0] * plan.num_stages)
    assert iteration_time(plan, part) <= longest + ROUNDING


@pytest.mark.parametrize("arguments, message", [
    ((1, 2, 4), "at least 2 ranks and 2 chunks a rank, not 1 and 2"),
    ((2, 1, 4), "at least 2 ranks and 2 chunks a rank, not 2 and 1"),
    ((4, 2, 3), "group size 4 must lie between the number of ranks, 4, and the number of microbatches, 3"),
    ((2, 2, 4, 1), "group size 1 must lie between"),
    ((4, 2, 9, 4), "leave a last group of 1, fewer than the 4 ranks"),
    ((2, 2, 0), "num_microbatches = 0"),
])  # fmt: skip
def test_interleaved_refuses_what_core_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interleaved(*arguments)


# -- Exits in idle time


@given(worlds, st.data())
@settings(max_examples=60, deadline=None)
def test_exits_right_before_their_receive_are_never_slower(world: tuple[int, int], data: st.DataObject) -> None:
    num_ranks, num_microbatches = world
    exit_stages = data.draw(stage_sets(num_ranks))
    times = data.draw(pass_times(num_ranks))
    plain = one_f_one_b(num_ranks, num_microbatches)
    plan = with_exits_in_bubbles(plain, exit_stages, [1] * num_ranks)
    validate(plan, exit_stages)
    exit_time = [1.5 * (stage in exit_stages) for stage in range(num_ranks)]
    costs = Costs(times.forward, times.backward, exit_time, times.communication)
    assert iteration_time(plan, costs) <= iteration_time(plain, costs) + ROUNDING


@given(worlds, st.sampled_from([0.25, 0.5, 0.75, 1.0, 2.0]), st.data())
@settings(max_examples=60, deadline=None)
def test_exits_that_fit_delay_no_first_backward(
    world: tuple[int, int], exit_backward_ratio: float, data: st.DataObject
) -> None:
    num_ranks, num_microbatches = world
    exit_stages = data.draw(stage_sets(num_ranks))
    counts = exits_that_fit(num_ranks, exit_backward_ratio)
    plain = one_f_one_b(num_ranks, num_microbatches)
    plan = with_exits_in_bubbles(plain, exit_stages, counts)
    lazy = with_exits_in_bubbles(plain, exit_stages, [1] * num_ranks)
    backward = 2.0
    exit_time = [exit_backward_ratio * backward * (stage in exit_stages) for stage in range(num_ranks)]
    costs = Costs([1.0] * num_ranks, [backward] * num_ranks, exit_time)
    assert first_backward_ends(plan, costs) <= [end + ROUNDING for end in first_backward_ends(lazy, costs)]
    assert iteration_time(plan, costs) <= iteration_time(plain, costs) + ROUNDING


def first_backward_ends(plan: Plan, costs: Costs) -> list[float]:
    ends = brute_force_end_times(plan, costs)
    return [ends[rank][actions.index(Action(Kind.BACKWARD, 0))] for rank, actions in enumerate(plan.ranks)]


def test_where_exits_go() -> None:
    plan = with_exits_in_bubbles(one_f_one_b(4, 5), {0, 3}, [2, 1, 1, 1])
    assert " ".join(map(str, plan.ranks[0])) == (
        "F0 SF0 F1 SF1 F2 SF2 F3 SF3 X0 X1 RB0 B0 F4 SF4 RB1 B1 X2 RB2 B2 X3 RB3 B3 X4 RB4 B4"
    )
    assert not plan.microbatches(3, Kind.EXIT)  # the last stage waits for no gradient
    assert not plan.microbatches(1, Kind.EXIT)  # no exit there
    none_early = with_exits_in_bubbles(one_f_one_b(4, 5), {0}, [0] * 4)
    assert "X0 RB0" in str(none_early)  # its own receive follows: never slower than in the backward


def test_exits_beside_fill() -> None:
    plan = with_exits_in_bubbles(with_filled_bubbles(4, 6, {0, 1}), {0, 1})
    validate(plan, {0, 1})
    assert plan.microbatches(0, Kind.EXIT) == [0, 1, 2, 3, 4, 5]  # but not of fill
    assert "B6p F3 SF3 X0 RB0 B0" in str(plan)  # one before the first backward: fill uses its time


@given(interleaved_arguments(), st.data())
@settings(max_examples=40, deadline=None)
def test_exits_in_bubbles_of_interleaved_plans(arguments: tuple[int, int, int, int], data: st.DataObject) -> None:
    plain = interleaved(*arguments)
    exit_stages = data.draw(stage_sets(plain.num_stages))
    validate(with_exits_in_bubbles(plain, exit_stages), exit_stages)
    none_early = with_exits_in_bubbles(plain, exit_stages, [0] * plain.num_ranks)
    exit_time = [1.0 * (stage in exit_stages) for stage in range(plain.num_stages)]
    costs = Costs([1.0] * plain.num_stages, [2.0] * plain.num_stages, exit_time)
    assert iteration_time(none_early, costs) <= iteration_time(plain, costs) + ROUNDING


def test_bad_arguments_of_exits_in_bubbles() -> None:
    with pytest.raises(ValueError, match="exits on stage 4: the plan's stages are 0 to 3"):
        with_exits_in_bubbles(one_f_one_b(4, 4), {4})
    with pytest.raises(ValueError, match="2 counts of early exits are given for 4 ranks"):
        with_exits_in_bubbles(one_f_one_b(4, 4), {1}, [1, 1])
    with pytest.raises(ValueError, match="exit_backward_ratio = 0"):
        exits_that_fit(4, 0)
    assert exits_that_fit(4, 0.5) == (6, 4, 2, 1)
    assert exits_that_fit(4, 0.1) == (30, 20, 10, 1)


# -- Filled bubbles


@given(st.integers(2, 6), st.integers(0, 4), ratios)
@settings(max_examples=60, deadline=None)
def test_fill_of_equal_stages_is_the_formulas(num_ranks: int, more: int, ratio: float) -> None:
    num_microbatches = num_ranks + more
    plan = with_filled_bubbles(num_ranks, num_microbatches, range(num_ranks), PassTimes.uniform(num_ranks, ratio))
    assert plan.num_fill_warmup == plan.num_fill_cooldown == uniform_fill(num_ranks, ratio)
    for stage in range(num_ranks):
        from_below = uniform_fill(num_ranks - stage, ratio)  # floor((P - 1 - p) r / (1 + r))
        from_above = uniform_fill(stage + 1, ratio)  # floor(p r / (1 + r))
        assert num_passes(plan, stage, Kind.FORWARD, plan.fill_warmup) == from_below
        assert num_passes(plan, stage, Kind.BACKWARD, plan.fill_warmup) == from_below
        assert num_passes(plan, stage, Kind.FORWARD, plan.fill_cooldown) == plan.num_fill_cooldown
        assert num_passes(plan, stage, Kind.BACKWARD, plan.fill_cooldown) == from_above


@given(worlds, st.data())
@settings(max_examples=80, deadline=None)
def test_fill_costs_no_time_and_no_memory(world: tuple[int, int], data: st.DataObject) -> None:
    num_ranks, num_microbatches = world
    exit_stages = data.draw(stage_sets(num_ranks))
    times = data.draw(st.one_of(pass_times(num_ranks), ratios.map(lambda r: PassTimes.uniform(num_ranks, r))))
    plan = with_filled_bubbles(num_ranks, num_microbatches, exit_stages, times)
    validate(plan, exit_stages)
    assert max(plan.num_fill_warmup, plan.num_fill_cooldown) <= num_ranks - 1
    plain, costs = one_f_one_b(num_ranks, num_microbatches), costs_of(times)
    assert iteration_time(plan, costs) <= iteration_time(plain, costs) + ROUNDING
    warmup_only = with_filled_bubbles(num_ranks, num_microbatches, exit_stages, times, num_fill_cooldown=0)
    for filled_end, plain_end in zip(first_backward_ends(warmup_only, costs), first_backward_ends(plain, costs)):
        assert filled_end <= plain_end + ROUNDING
    for rank in range(num_ranks):
        assert most_in_flight(plan, rank) <= num_ranks - rank
        # What is not fill is 1F1B, untouched.
        regular = tuple(action for action in plan.ranks[rank] if not action.is_partial)
        assert regular == plain.ranks[rank]


@given(worlds, st.data())
@settings(max_examples=60, deadline=None)
def test_given_numbers_up_to_the_largest(world: tuple[int, int], data: st.DataObject) -> None:
    num_ranks, num_microbatches = world
    times = data.draw(pass_times(num_ranks))
    build = lambda warmup, cooldown: with_filled_bubbles(num_ranks, num_microbatches, {0}, times, warmup, cooldown)
    largest = build(None, 0).num_fill_warmup
    for number in range(largest + 1):
        plan = build(number, 0)
        assert (plan.num_fill_warmup, plan.num_fill_cooldown) == (number, 0)
    with pytest.raises(ValueError, match=f"--num-fill-warmup-microbatches {largest + 1}: .* Use at most {largest}$"):
        build(largest + 1, None)
    largest = build(0, None).num_fill_cooldown
    assert build(0, largest).num_fill_cooldown == largest
    with pytest.raises(ValueError, match=f"--num-fill-cooldown-microbatches {largest + 3}: .* Use at most {largest}$"):
        build(0, largest + 3)


def test_warmup_fill_ends_at_the_last_exit_that_it_reaches() -> None:
    plan = with_filled_bubbles(8, 16, {1, 3, 7})
    reached = [plan.fill_warmup[0] in plan.microbatches(stage, Kind.FORWARD) for stage in range(8)]
    assert reached == [True] * 4 + [False] * 4  # could go up to stage 5
    assert with_filled_bubbles(8, 16, {6, 7}).num_fill_warmup == 0  # no fill gets as far as stage 6
    with pytest.raises(ValueError, match=r"0 fit before .* stages up to one with an exit \(6, 7\)"):
        with_filled_bubbles(8, 16, {6, 7}, num_fill_warmup=1)


def test_fill_without_exits() -> None:
    for number in (None, 2):
        with pytest.raises(ValueError, match="the model has no exits; add exits, or use 0"):
            with_filled_bubbles(4, 8, (), num_fill_warmup=number)
    assert with_filled_bubbles(4, 8, (), num_fill_warmup=0).num_fill_cooldown == 2  # these train the final loss


@pytest.mark.parametrize("changes, message", [
    ({"num_ranks": 0}, "num_ranks = 0: must be at least 1"),
    ({"num_fill_cooldown": -1}, "num_fill_cooldown = -1: must be at least 0"),
    ({"exit_stages": {4}}, "exits on stage 4: the plan's stages are 0 to 3"),
    ({"times": PassTimes.uniform(3)}, "times of 3 stages are given for 4 ranks"),
], ids=str)  # fmt: skip
def test_bad_arguments_of_fill(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        with_filled_bubbles(**{"num_ranks": 4, "num_microbatches": 8, "exit_stages": {0}} | changes)


def test_bad_times() -> None:
    with pytest.raises(ValueError, match="times of 1 forwards and 2 backwards"):
        PassTimes((1.0,), (1.0, 2.0))
    with pytest.raises(ValueError, match="must be above 0"):
        PassTimes((0.0,), (1.0,))


@given(worlds, st.data())
@settings(max_examples=60, deadline=None)
def test_timing_of_passes_equals_brute_force(world: tuple[int, int], data: st.DataObject) -> None:
    num_ranks, num_microbatches = world
    times = data.draw(pass_times(num_ranks))
    plan = one_f_one_b(num_ranks, num_microbatches)
    passes = [[action for action in actions if not action.kind.is_message] for actions in plan.ranks]
    ends, reverse = end_times(passes, times), end_times(passes, times, reverse=True)
    expected = brute_force_end_times(plan, costs_of(times))
    for rank, actions in enumerate(plan.ranks):
        for action, end in zip(actions, expected[rank]):
            if not action.kind.is_message:
                assert ends[rank, action.kind, action.microbatch] == pytest.approx(end, abs=ROUNDING)
    assert max(reverse.values()) == pytest.approx(max(ends.values()))


# -- Tuning


@given(worlds, st.data())
@settings(max_examples=60, deadline=None)
def test_tuning(world: tuple[int, int], data: st.DataObject) -> None:
    num_ranks, num_microbatches = world
    exit_stages = data.draw(stage_sets(num_ranks)) | {num_ranks - 1}
    plan = forward_only_tuning(num_ranks, num_microbatches, exit_stages)
    validate(plan, exit_stages)
    kinds = {action.kind for actions in plan.ranks for action in actions}
    assert kinds <= {Kind.FORWARD, Kind.EXIT, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD}
    # The slowest stage is never idle once it has begun: exits do not hold up the next stage.
    costs = Costs.equal(num_ranks, exit=0.5)
    per_microbatch = [1.0 + 0.5 * (stage in exit_stages) for stage in range(num_ranks)]
    expected = (num_ranks - 1) + num_microbatches * max(per_microbatch)
    assert iteration_time(plan, costs) == pytest.approx(expected, abs=ROUNDING)


@given(worlds, st.data())
@settings(max_examples=60, deadline=None)
def test_distilling(world: tuple[int, int], data: st.DataObject) -> None:
    """Waiting for the final head costs no time, and a stage holds few microbatches meanwhile."""
    num_ranks, num_microbatches = world
    exit_stages = data.draw(stage_sets(num_ranks).filter(bool))
    plan = distilling_tuning(num_ranks, num_microbatches, exit_stages)
    validate(plan, exit_stages)
    plain = forward_only_tuning(num_ranks, num_microbatches, exit_stages | {num_ranks - 1})
    costs = Costs.equal(num_ranks, exit=0.5)
    assert iteration_time(plan, costs) <= iteration_time(plain, costs) + ROUNDING
    for stage, actions in enumerate(plan.ranks):
        waiting = most = 0
        for action in actions:
            waiting += (action.kind == Kind.FORWARD) - (action.kind == Kind.EXIT)
            most = max(most, waiting)
        assert stage not in exit_stages or most <= num_ranks - stage
    # Nothing comes back to a stage before the first exit.
    kinds = {action.kind for actions in plan.ranks[: min(exit_stages)] for action in actions}
    assert kinds <= {Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD}


def test_tuning_has_no_stage_after_the_last_exit() -> None:
    with pytest.raises(ValueError, match=r"stage 3, the last, has no exit \(exits on stages \[0, 1\]\).*use 2 stages"):
        forward_only_tuning(4, 2, {0, 1})
