"""`benchmarks/pipeline_inference` with real processes: two stages, short passes."""

from __future__ import annotations

from benchmarks.pipeline_inference.compare import summarise
from benchmarks.pipeline_inference.measure import Setup, measure


def test_two_stages_that_sleep() -> None:
    setup = Setup(
        num_stages=2, alpha=0.02, beta=0.0002, head=0.0, shares=(0.8, 0.2), acceptance=0.9, seconds=0.6,
        num_requests=(1, 2), rounds=1,
    )  # fmt: skip
    rows = measure(setup)  # which compares the tokens of all modes with those of full passes
    assert len(rows) == 6 * 2
    by_case = {(row["case"], row["requests"]): row for row in summarise(rows)}
    # 1.2 stages a token instead of 2; the machine may be busy, so much less than 1.67 is asked for.
    assert by_case["early_exit", 1]["over_full"] > 1.2
    assert by_case["across_stages", 1]["over_full"] > 1.2
    assert by_case["full", 1]["over_formula"] > 0.5
    costs = rows[0]["costs"]
    assert 0 <= costs["turn"] < 0.05
    assert 0 <= costs["hop"] < 0.05
