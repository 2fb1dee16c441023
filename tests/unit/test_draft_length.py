"""The length of drafts, by numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.draft_length import DraftLength, DraftWindow

SAME = (1.0,) * len(ROW_COUNTS)
COSTS = StepCosts(SAME, SAME, SAME, SAME)


def test_costs_where_only_tokens_are_needed() -> None:
    saved = (0.5, 0.25, 0.0, 0.0, 0.0)
    costs = replace(COSTS, exit_saved_seconds=saved, final_saved_seconds=(2.0, *saved[1:]))
    both = costs.for_tokens(of_exits=True, of_final=True)
    assert both.approximate_seconds == (0.5, 0.75, 1.0, 1.0, 1.0)
    assert both.final_head_seconds == (0.0, 0.75, 1.0, 1.0, 1.0)  # never less than nothing
    assert (both.layer_seconds, both.exit_head_seconds) == (SAME, SAME)
    assert costs.for_tokens(of_exits=False, of_final=False) == costs
    approximate = replace(costs, has_approximate_heads=True).for_tokens(of_exits=True, of_final=False)
    assert approximate.approximate_seconds == approximate.final_head_seconds == SAME


def length(costs: StepCosts = COSTS, fixed: int | None = None) -> DraftLength:
    return DraftLength(fixed, longest=10, exit_depth=2, num_layers=12, costs=costs)


def test_a_fixed_length_stays() -> None:
    one = length(fixed=3)
    one.observe(3, 0)
    assert one.next() == 3


def test_drafts_grow_with_acceptance_and_vanish_without() -> None:
    good, bad = length(), length()
    for _ in range(30):
        good.observe(4, 4)
        bad.observe(4, 0)
    assert good.acceptance > 0.9 > 0.2 > bad.acceptance
    assert good.next() >= 5
    assert bad.next() == 0


def test_the_length_promises_most_tokens_in_a_second() -> None:
    # At the first estimate, 0.7: k drafts give (1 - 0.7^(k+1)) / 0.3 tokens and cost 2 (k + 1) + k + 10 + 1.
    rates = [sum(0.7**i for i in range(k + 1)) / (2 * (k + 1) + k + 11) for k in range(11)]
    assert length().next() == rates.index(max(rates)) == 2


def test_costly_rows_and_batches_shorten_drafts() -> None:
    rising = tuple(float(rows) for rows in ROW_COUNTS)
    assert length(replace(COSTS, layer_seconds=rising)).next() == 0
    assert length(replace(COSTS, batch_seconds=30.0)).next() == 0


def test_drafts_that_pay_for_one_request_may_not_pay_for_many() -> None:
    one = length(replace(COSTS, layer_seconds=(1.0, 1.0, 1.0, 4.0, 8.0)))
    assert one.next(1) > 0
    assert one.next(8) == 0


def test_drafting_is_tried_again_after_a_while() -> None:
    one = length()
    for _ in range(30):
        one.observe(4, 0)
    tries = 0
    while one.next() == 0:
        tries += 1
        assert tries < 1000
    assert tries > 10


def window(beta: float, num_requests: int, num_stages: int = 4, fixed: int | None = None) -> int:
    """Where a layer takes 1 + beta n for n rows."""
    layers = tuple(1 + beta * rows for rows in ROW_COUNTS)
    return DraftWindow(fixed, num_stages, replace(COSTS, layer_seconds=layers)).next(num_requests)


def test_the_window_follows_load_and_costs() -> None:
    assert [window(0.0, requests) for requests in (1, 4, 16, 100)] == [4, 4, 4, 4]  # rows cost nothing
    # As many rows a stage as cost what the weights cost, ten: 40 in all.
    assert [window(0.1, requests) for requests in (1, 8, 10, 16, 40, 100)] == [4, 4, 4, 2, 1, 1]
    # Rows cost much: what keeps all stages busy, and no more.
    assert [window(10.0, requests) for requests in (1, 2, 3, 4, 16)] == [4, 2, 2, 1, 1]
    assert [window(0.1, requests, fixed=5) for requests in (1, 100)] == [6, 6]


def test_rows_that_cost_what_the_weights_cost() -> None:
    assert replace(COSTS, layer_seconds=tuple(3 + 0.5 * rows for rows in ROW_COUNTS)).balanced_rows == 6.0
    assert COSTS.balanced_rows == float("inf")
    assert replace(COSTS, layer_seconds=tuple(2.0 * rows for rows in ROW_COUNTS)).balanced_rows == 0.0
