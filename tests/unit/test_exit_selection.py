"""Which exits are enabled, by costs worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.exit_selection import select_exits, step_seconds


def costs(
    layer: float = 1.0,
    approximate: float = 0.0,
    head: float = 0.0,
    per_row: float = 0.0,
    has_approximate_heads: bool = False,
) -> StepCosts:
    rising = lambda cost: tuple(cost * (1 + per_row * (rows - 1)) for rows in ROW_COUNTS)
    return StepCosts(
        rising(layer), rising(approximate), rising(head), rising(head), has_approximate_heads=has_approximate_heads
    )


# Of ten tokens five are confident at the first exit, and three more at the second.
CONFIDENCES = np.array([[0.9, 0.9]] * 5 + [[0.1, 0.9]] * 3 + [[0.1, 0.1]] * 2)
LEAVES = CONFIDENCES >= 0.5


def test_expected_time_of_one_request() -> None:
    # Ten layers for all tokens; with the exit after layer 2, eight of them for half of the tokens.
    assert step_seconds((), LEAVES, (2, 6), 10, costs(head=4.0)) == pytest.approx(14.0)
    enabled = step_seconds((0,), LEAVES, (2, 6), 10, costs(approximate=3.0, head=4.0))
    assert enabled == pytest.approx(2 + 3 + 0.5 * (8 + 4))
    both = step_seconds((0, 1), LEAVES, (2, 6), 10, costs(approximate=3.0, head=4.0))
    assert both == pytest.approx(2 + 3 + 0.5 * (4 + 3) + 0.2 * (4 + 4))


def test_batches_are_set_up_anew_where_rows_leave() -> None:
    some = replace(costs(), batch_seconds=2.0)
    assert step_seconds((), LEAVES, (2, 6), 10, some) == pytest.approx(2 + 10)
    # A row that goes on (half of them) takes along those that left before it (half of the time).
    assert step_seconds((0,), LEAVES, (2, 6), 10, some) == pytest.approx(2 + 2 + 0.5 * 0.5 * 2 + 0.5 * 8)


def test_rows_that_waited_are_paid_for() -> None:
    # Every run behind the exit serves two rows: the one that waited and the one that goes on.
    enabled = step_seconds((0,), LEAVES, (2, 6), 10, costs(per_row=1.0))
    assert enabled == pytest.approx(2 * 1 + 0.5 * 8 * 2)


def test_an_approximate_head_is_followed_by_the_exits_own_head() -> None:
    enabled = step_seconds((0,), LEAVES, (2, 6), 10, costs(approximate=1.0, head=4.0, has_approximate_heads=True))
    assert enabled == pytest.approx(2 + 1 + 0.5 * 4 + 0.5 * (8 + 4))


def test_many_requests_seldom_leave_together() -> None:
    one, many = (step_seconds((0,), LEAVES, (2, 6), 10, costs(), n) for n in (1, 8))
    assert one == pytest.approx(2 + 0.5 * 8)
    assert many == pytest.approx(2 + (1 - 0.5**8) * 8)


@pytest.mark.parametrize(
    ("settings", "num_requests", "expected"),
    [
        ({}, 1, (0, 1)),  # evaluating is free
        (
            {"approximate": 3.0},
            1,
            (0,),
        ),  # 2 + 3 + 0.5 * 8 = 9.0; the second alone 6 + 3 + 0.2 * 4; both 2 + 3 + 3.5 + 0.8
        ({"approximate": 4.5}, 1, ()),  # more than is won
        ({"approximate": 3.0}, 8, ()),  # somebody always goes on
        ({"per_row": 1.0}, 1, ()),  # rows that wait cost as much later
        ({"approximate": 1.0, "head": 0.0}, 1, (0, 1)),
    ],
)
def test_choice(settings: dict, num_requests: int, expected: tuple[int, ...]) -> None:
    assert select_exits(CONFIDENCES, (0.5, 0.5), (2, 6), 10, costs(**settings), num_requests) == expected


def test_exits_that_pay_for_one_request_do_not_where_rows_are_not_free() -> None:
    """Rows that left are computed later, in slots and calls of attention of their own: reads of weights are saved, and
    these cost little beside many rows."""
    growing = costs(approximate=1.0, head=1.0, per_row=0.5)
    attending = replace(costs(approximate=1.0, head=1.0), slot_seconds=0.2, call_seconds=1.5)
    for some in (growing, attending):
        chosen = [select_exits(CONFIDENCES, (0.5, 0.5), (2, 6), 10, some, n) for n in (1, 16, 32)]
        assert chosen == [(0, 1), (), ()]
    # Half of eight slots go on, with one row or more; behind one in six of them the next one has as many.
    free = replace(costs(), call_seconds=1.0)
    runs = 1 - 0.5**8
    evaluated = 8 * 0.5 / runs
    expected = 2 + 8 * runs * (1 + evaluated * (1 - 0.25 / 1.5) - 1)
    assert step_seconds((0,), LEAVES, (2, 6), 10, free, 8) == pytest.approx(expected)


def test_thresholds_belong_to_their_exits() -> None:
    assert select_exits(CONFIDENCES, (0.95, 0.5), (2, 6), 10, costs()) == (1,)
    assert select_exits(CONFIDENCES, (1.0, 1.0), (2, 6), 10, costs(approximate=0.1)) == ()


def test_no_exits_to_choose_from() -> None:
    assert select_exits(np.zeros((3, 0)), (), (), 10, costs()) == ()


def test_too_many_exits_are_refused() -> None:
    with pytest.raises(ValueError, match="11 exits are too many"):
        select_exits(np.zeros((3, 11)), (0.5,) * 11, range(1, 12), 12, costs())


def test_interpolated_costs() -> None:
    some = StepCosts((1.0, 2.0, 4.0, 8.0, 16.0, 24.0), (0.0,) * 6, (0.0,) * 6, (0.0,) * 6)
    assert [some.layer(rows) for rows in (0.5, 1, 1.5, 3, 16, 32, 48)] == [1.0, 1.0, 1.5, 3.0, 16.0, 24.0, 32.0]
    # What is measured is not above 0 for sure, and rows never give time back.
    assert replace(some, layer_seconds=(1.0,) * 5 + (0.5,)).layer(99) == 0.5
    some = replace(some, slot_seconds=0.5, call_seconds=0.25, batch_seconds=2.0, row_seconds=0.1)
    assert some.layer(8, slots=4, calls=3) == 8.0 + 3 * 0.5 + 2 * 0.25 and some.layer(8, 0.5, 0.2) == 8.0
    assert (some.batch(1), some.batch(5)) == (2.0, 2.4)
