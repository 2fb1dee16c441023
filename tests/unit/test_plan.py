"""Plans as data: their text form and what they say of themselves."""

from __future__ import annotations

import pytest

from megatron.early_exit.schedules.plan import Action, Kind, Plan

TEXT = """# made up: 2 ranks, 2 chunks, 1 microbatch, 1 + 1 fill
F0 SF0 RF0.1 F0.1 SF0.1 F1p B1p
RF0 F0 SF0 RF0.1 F0.1 B0.1 SB0.1
"""


def test_text_form_round_trip() -> None:
    plan = Plan.parse(TEXT)
    assert str(plan) == TEXT
    assert Plan.parse(str(plan)) == plan
    assert plan.ranks[0][2] == Action(Kind.RECEIVE_FORWARD, 0, chunk=1)
    assert plan.ranks[0][5] == Action(Kind.FORWARD, 1, is_partial=True)


def test_what_a_plan_says_of_itself() -> None:
    plan = Plan.parse(TEXT)
    assert (plan.num_ranks, plan.num_stages, plan.num_fill) == (2, 4, 2)
    assert (list(plan.fill_warmup), list(plan.fill_cooldown)) == ([1], [2])
    assert plan.microbatches(0, Kind.FORWARD) == [0, 1]
    assert plan.microbatches(3, Kind.BACKWARD) == [0]  # stage 3: the second chunk of rank 1
    assert [str(action) for action in plan.actions_of(2)] == ["RF0.1", "F0.1", "SF0.1"]


@pytest.mark.parametrize("word", ["F", "f3", "F3.", "3F", "XS3", "F-1", "F3pp"])
def test_bad_actions(word: str) -> None:
    with pytest.raises(ValueError, match="no action"):
        Action.parse(word)


def test_bad_plans() -> None:
    with pytest.raises(ValueError, match="begins with a line"):
        Plan.parse("F0 B0\n")
    with pytest.raises(ValueError, match="of 2 ranks and has lines for 1"):
        Plan.parse("\n".join(TEXT.splitlines()[:2]))
    with pytest.raises(ValueError, match="rank 1: 'B' is no action"):
        Plan.parse(TEXT.replace("SB0.1\n", "B\n"))
