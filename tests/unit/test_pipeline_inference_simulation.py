"""Formulas of pipeline inference against numbers worked out by hand, and the event simulation against the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.pipeline_inference.formulas import (
    Costs,
    drafted_token,
    exit_throughput,
    exit_token,
    full_token,
    speculation_speedup,
    speculation_token,
    tensor_parallel,
)
from benchmarks.pipeline_inference.simulation import Setting, simulate

COSTS = Costs(alpha=10.0, beta=0.2, head=0.5, hop=0.3, turn=0.6)
SHARES = (0.6, 0.2, 0.1, 0.1)


def test_tokens_by_hand() -> None:
    # A pass of one row takes 10.2; four of them, one head, three hops and the turn.
    assert full_token(COSTS, 4) == pytest.approx(4 * 10.2 + 0.5 + 3 * 0.3 + 0.6)
    # 16 requests in four groups of 4 rows.
    assert full_token(COSTS, 4, 16) == pytest.approx(4 * 10.8 + 0.5 + 3 * 0.3 + 0.6)
    stages = 0.6 * 1 + 0.2 * 2 + 0.1 * 3 + 0.1 * 4
    assert exit_token(COSTS, SHARES) == pytest.approx(stages * 10.7 + (stages - 1) * 0.3 + 0.6)
    assert exit_throughput(COSTS, SHARES, 2) == pytest.approx(2 / exit_token(COSTS, SHARES))
    compute_bound = replace(COSTS, beta=10.0)
    assert exit_throughput(compute_bound, SHARES, 50) == pytest.approx(50 / (10 + 500 + 0.5))


def test_speculation_by_hand() -> None:
    assert speculation_speedup(4, 0.8) == pytest.approx(2.5)
    assert speculation_speedup(8, 0.94) == pytest.approx(5.63, abs=0.01)
    bare = Costs(1.0, 0.0)
    for num_stages, acceptance in ((2, 0.5), (4, 0.8), (8, 0.94)):
        speedup = full_token(bare, num_stages) / speculation_token(bare, num_stages, acceptance)
        assert speedup == pytest.approx(speculation_speedup(num_stages, acceptance))
    assert speculation_token(bare, 4, 1.0, window=2) == 2.0  # two rows in the time of four stages
    assert speculation_token(COSTS, 4, 0.8, window=1) == full_token(COSTS, 4)


def test_drafts_by_hand() -> None:
    # Three drafts of a stage each; one row on stage 0, then four rows on three stages; 1 + .5 + .25 + .125 tokens.
    time = 3 * (10.2 + 0.5 + 0.6) + 10.2 + 0.3 + 3 * 10.8 + 2 * 0.3 + 0.5 + 0.6
    assert drafted_token(COSTS, 4, 0.5, 3) == pytest.approx(time / 1.875)


def test_tensor_parallel_ranks_do_what_all_stages_do() -> None:
    costs = tensor_parallel(COSTS, 4, collectives=0.2)
    assert costs.token(1) == pytest.approx(10 * 1.8 + 0.2 + 0.5 / 4 + 0.6)
    assert tensor_parallel(COSTS, 4, collectives=0.0).alpha == COSTS.alpha


@pytest.mark.parametrize("num_stages", (2, 4, 8))
@pytest.mark.parametrize("num_requests", (1, 4, 16))
def test_full_passes_take_what_the_formula_says(num_stages: int, num_requests: int) -> None:
    outcome = simulate(Setting("full", num_stages, num_requests, COSTS))
    assert outcome.tokens_per_time * full_token(COSTS, num_stages, num_requests) / num_requests == pytest.approx(
        1, rel=0.04
    )
    groups = min(num_requests, num_stages)
    assert outcome.rows_per_pass == pytest.approx([num_requests / groups] * num_stages, rel=0.05)
    assert outcome.shares == (*[0.0] * (num_stages - 1), 1.0)


def test_early_exits_of_one_request() -> None:
    outcome = simulate(Setting("early_exit", 4, 1, COSTS, shares=SHARES), 2000)
    assert outcome.shares == pytest.approx(SHARES, abs=0.03)
    assert 1 / outcome.tokens_per_time == pytest.approx(exit_token(COSTS, outcome.shares), rel=0.02)
    assert outcome.tokens_per_time * full_token(COSTS, 4) > 2.2


@pytest.mark.parametrize("num_requests", (2, 4, 16, 64))
def test_early_exits_stay_below_both_bounds(num_requests: int) -> None:
    outcome = simulate(Setting("early_exit", 4, num_requests, COSTS, shares=SHARES), 200)
    assert outcome.tokens_per_time <= 1.02 * exit_throughput(COSTS, outcome.shares, num_requests)


def test_exits_bring_nothing_where_rows_are_what_costs() -> None:
    compute_bound = Costs(alpha=0.01, beta=1.0)
    full = simulate(Setting("full", 4, 64, compute_bound), 100)
    exits = simulate(Setting("early_exit", 4, 64, compute_bound, shares=SHARES), 100)
    assert exits.tokens_per_time / full.tokens_per_time == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("num_stages", "acceptance"), ((2, 0.8), (4, 0.8), (8, 0.8), (8, 0.94)))
def test_speculation_reaches_its_formula(num_stages: int, acceptance: float) -> None:
    for costs in (Costs(1.0, 0.0), COSTS):
        outcome = simulate(Setting("across_stages", num_stages, 1, costs, acceptance=acceptance), 1500)
        assert outcome.acceptance == pytest.approx(acceptance, abs=0.02)
        expected = speculation_token(costs, num_stages, outcome.acceptance)
        assert 1 / outcome.tokens_per_time == pytest.approx(expected, rel=0.05)


def test_wrong_drafts_cost_no_more_than_waiting() -> None:
    outcome = simulate(Setting("across_stages", 4, 1, COSTS, acceptance=0.0), 200)
    assert outcome.acceptance == 0
    # The exit is evaluated besides, and the row of a wrong draft may be running when the right one comes.
    assert 1 / outcome.tokens_per_time < 1.05 * COSTS.token(4, num_heads=2)


def test_drafts_that_are_verified_together() -> None:
    outcome = simulate(Setting("draft_then_verify", 4, 1, COSTS, acceptance=0.7, draft_length=3), 1500)
    assert 1 / outcome.tokens_per_time == pytest.approx(drafted_token(COSTS, 4, outcome.acceptance, 3), rel=0.05)
    assert outcome.rows_per_pass == pytest.approx([1, 4, 4, 4])


def test_without_a_cap_all_requests_run_in_one_pass() -> None:
    capped, uncapped = (simulate(Setting("full", 4, 16, Costs(1.0, 0.02), cap=cap)) for cap in (None, 0))
    assert max(uncapped.rows_per_pass) == 16
    assert max(uncapped.busy) < 0.3
    assert min(capped.busy) > 0.9


def test_a_pause_lets_rows_that_come_back_join_those_that_lie_there() -> None:
    eager, pausing = (
        simulate(Setting("early_exit", 4, 4, COSTS, shares=SHARES, pause=pause)) for pause in (0.0, 1.1 * COSTS.turn)
    )
    assert pausing.rows_per_pass[0] > 1.2 * eager.rows_per_pass[0]
    assert pausing.tokens_per_time > 1.1 * eager.tokens_per_time


def test_rows_that_need_credit_wait_and_tokens_do_not() -> None:
    free, bounded = (
        simulate(Setting("early_exit", 4, 1, COSTS, shares=SHARES, fill_credit=credit)) for credit in (64, 0)
    )
    # They travel with the next row that goes on.
    assert bounded.tokens_per_time == pytest.approx(free.tokens_per_time, rel=0.05)
    assert bounded.rows_per_pass[3] > 1.5 * free.rows_per_pass[3]
