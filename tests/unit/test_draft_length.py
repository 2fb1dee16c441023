"""What drafts promise, by numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.draft_acceptance import Acceptance, Source
from megatron.early_exit.inference.engine.draft_length import DraftRates, DraftWindow, StepLoad
from megatron.early_exit.inference.protocol import ExitDescription

SAME = (1.0,) * len(ROW_COUNTS)
COSTS = StepCosts(SAME, SAME, SAME, SAME)
EXIT = ExitDescription(2, 2, False)


def test_costs_where_only_tokens_are_needed() -> None:
    saved = (0.5, 0.25, 0.0, 0.0, 0.0, 0.0)
    costs = replace(COSTS, exit_saved_seconds=saved, final_saved_seconds=(2.0, *saved[1:]))
    both = costs.for_tokens(of_drafts=True, of_probed=False, of_final=True)
    assert both.approximate_seconds == (0.5, 0.75, 1.0, 1.0, 1.0, 1.0)
    assert both.final_head_seconds == (0.0, 0.75, 1.0, 1.0, 1.0, 1.0)  # never less than nothing
    assert (both.layer_seconds, both.exit_head_seconds) == (SAME, SAME)
    assert costs.for_tokens(of_drafts=False, of_probed=False, of_final=False) == costs
    probed = costs.for_tokens(of_drafts=False, of_probed=True, of_final=False)
    assert probed == replace(costs, exit_head_seconds=both.approximate_seconds)
    approximate = replace(costs, has_approximate_heads=True).for_tokens(of_drafts=True, of_probed=False, of_final=False)
    assert approximate.approximate_seconds == approximate.final_head_seconds == SAME


def test_drafts_of_an_exit_by_hand() -> None:
    # At the first estimate, 0.7: k drafts give (1 - 0.7^(k+1)) / 0.3 tokens and cost 2 (k + 1) + k + 10 + 1.
    expected = Acceptance(Source("exit", 0)).expected_tokens(10)
    assert expected == pytest.approx([(1 - 0.7 ** (k + 1)) / 0.3 for k in range(11)])
    rates = DraftRates(COSTS, 12).of_exit(EXIT, expected, StepLoad())
    assert rates == pytest.approx([expected[k] / (2 * (k + 1) + k + 11) for k in range(11)])
    # A block is one more layer in every row.
    with_block = DraftRates(COSTS, 12).of_exit(ExitDescription(2, 2, True), expected, StepLoad())
    assert with_block == pytest.approx([expected[k] / (3 * (k + 1) + k + 11) for k in range(11)])


def test_every_row_of_a_draft_costs_a_full_step_where_others_run_one() -> None:
    rates = DraftRates(COSTS, 12)
    (_, one) = rates.of_exit(EXIT, [1.0, 1.7], StepLoad(num_requests=3, num_drafting=2))
    # Two drafting requests and a plain one, which gets a token in each of the two steps.
    assert one == pytest.approx((2 * 1.7 + 2) / ((2 + 1 + 10 + 1) + 13))


def test_known_drafts_cost_what_their_rows_add() -> None:
    rising = tuple(float(rows) for rows in ROW_COUNTS)
    rates = DraftRates(replace(COSTS, layer_seconds=rising), 12)
    load = StepLoad(num_requests=3, extra_rows=1, extra_tokens=0.5)
    assert rates.of_rows([1.0, 1.6], load) == pytest.approx([3.5 / (12 * 4 + 1), 4.1 / (12 * 5 + 1)])


def test_slots_and_split_calls_of_attention_are_paid_for() -> None:
    costs = replace(COSTS, slot_seconds=0.5, call_seconds=0.25, batch_seconds=3.0, row_seconds=0.125)
    rates = DraftRates(costs, 12)
    assert rates.step_seconds(1) == rates.step_seconds(1, 0, 1) == 12 + 1 + 3
    # Eight slots; one with more rows than its neighbours makes three calls, many make eight.
    assert rates.step_seconds(8) == 12 * (1 + 7 * 0.5) + 1 + (3 + 7 * 0.125)
    assert rates.step_seconds(8, 3, 1) == 12 * (1 + 7 * 0.5 + 2 * 0.25) + 1 + (3 + 10 * 0.125)
    assert rates.step_seconds(8, 9, 5) == 12 * (1 + 7 * 0.5 + 7 * 0.25) + 1 + (3 + 16 * 0.125)
    load = StepLoad(num_requests=8, extra_rows=3, extra_tokens=2.0, num_longer=1)
    assert rates.of_rows([1.0, 1.5], load) == [10 / rates.step_seconds(8, 3, 1), 10.5 / rates.step_seconds(8, 4, 2)]
    # An exit's two drafts leave their batches, and join that of the verification, in which lengths may differ.
    both = StepLoad(num_requests=8, num_drafting=8)
    draft, set_up = 2 * (1 + 7 * 0.5) + 1, 3 + 7 * 0.125
    verify = 2 * (1 + 7 * 0.5) + 10 * (1 + 7 * 0.5 + 7 * 0.25) + 1 + (3 + 23 * 0.125)
    assert rates.round_seconds(EXIT, 2, both) == pytest.approx(2 * (draft + 2 * set_up) + verify + set_up)
    assert rates.round_seconds(EXIT, 0, both) == pytest.approx(rates.step_seconds(8))


COST = st.floats(0.1, 9.0)


@given(
    st.lists(st.tuples(COST, COST, COST), min_size=len(ROW_COUNTS), max_size=len(ROW_COUNTS)),
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.integers(1, 10), st.booleans(),
)  # fmt: skip
def test_drafts_accepted_less_often_than_the_bound_pay_at_no_length(
    seconds: list[tuple[float, float, float]], drafting: int, plain: int, extra: int, longest: int, has_block: bool
) -> None:
    """Against all lengths, where all tokens behind the first are accepted; and somewhat above it some length does."""
    layers, exits, final = (tuple(values) for values in zip(*seconds, strict=True))
    rates = DraftRates(StepCosts(layers, exits, exits, final), 12)
    load = StepLoad(drafting + plain, drafting, extra_rows=extra, extra_tokens=0.6 * extra)
    tokens = lambda chance: [1.0 + chance * length for length in range(longest + 1)]
    least = rates.least_of_rows(longest, load)
    below, above = (rates.of_rows(tokens(least + by), load) for by in (-1e-6, 1e-6))
    assert max(below) == below[0] and max(above) > above[0]
    load, one = StepLoad(drafting + plain, drafting), ExitDescription(2, 2, has_block)
    least, nothing = rates.least_of_exit(one, longest, load), rates.of_rows([1.0], load)[0]
    pays = lambda chance: (
        max(rates.of_exit(one, [sum(chance**i for i in range(n + 1)) for n in range(longest + 1)], load)[1:]) > nothing
    )
    assert least == 0.0 or not pays(least - 2e-3)
    assert least == 1.0 or pays(least + 2e-3)


def test_matches_are_learned_by_place() -> None:
    acceptance = Acceptance(Source("ngram", 2))
    for _ in range(200):
        acceptance.observe(1, 0)
        acceptance.observe(4, 3)
    assert 0.45 < acceptance.first.value < 0.55 and 0.6 < acceptance.later.value < 0.72
    one, _, three, *_ = [after - before for before, after in zip(*[acceptance.expected_tokens(4)[i:] for i in (0, 1)])]
    assert three == pytest.approx(one * acceptance.later.value**2)


def test_a_request_starts_from_what_all_have_seen() -> None:
    of_all = Acceptance(Source("exit", 1))
    for _ in range(100):
        Acceptance(of_all.source, of_all).observe(1, 0)
    new = Acceptance(of_all.source, of_all)
    assert new.first.value == of_all.first.value < 0.1
    for _ in range(8):
        new.observe(1, 1)
    assert new.first.value > 0.6 > of_all.first.value


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
