"""The simulation of certificates in small: it knows the true risks, certified points keep the promise, others break
it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import certificate_simulation as simulation
from benchmarks import risk_monitor_simulation as monitor_simulation
from benchmarks.certificate_exits import DECISIONS, MISLEADING, Population, decide, draw_population
from benchmarks.certificate_simulation import Case, Grid, goals, simulate
from megatron.early_exit.evaluation import certification
from megatron.early_exit.evaluation.statistics.learn_then_test import binomial_p_value
from megatron.early_exit.inference.engine.risk_monitor import RiskMonitor

ALPHA = 0.05


@pytest.fixture(scope="module")
def population() -> Population:
    return draw_population(20_000, ALPHA, correlation=0.2, seed=0)


def rows_of(population: Population, case: Case, repeats: int = 300) -> dict[str, dict]:
    grid = Grid.of(population, case.loss, case.alpha, simulation.GRIDS[case.grid])
    return {row["method"]: row for row in simulate(case, grid, repeats, seed=0)}


def test_the_population_is_as_asked_for(population: Population) -> None:
    threshold = population.threshold(ALPHA)
    assert population.errors(threshold).mean() / DECISIONS == pytest.approx(ALPHA, abs=1e-4)
    errs = population.decisions.highest_wrong_score >= threshold
    halves = errs[:, ::2].mean(1), errs[:, 1::2].mean(1)  # another way to the correlation within prompts
    assert np.cov(*halves)[0, 1] / (ALPHA * (1 - ALPHA)) == pytest.approx(0.2, abs=0.02)
    assert population.correlation(threshold) == pytest.approx(0.2, abs=0.02)
    assert population.risk(np.full(3, threshold)) == pytest.approx(population.errors(threshold).mean() / DECISIONS)
    of, thresholds = population.decisions, np.array([0.9, 0.95, 0.5])
    errs = sum(
        ((scores >= one) & wrong).astype(int)
        for scores, wrong, one in zip(of.scores, of.is_wrong, thresholds, strict=True)
    )
    assert population.risk(thresholds) == pytest.approx((errs > 0).mean())
    assert (population.errors(population.threshold_of_texts(0.1)) > 0).mean() == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ValueError, match="more than what misleads can give"):
        draw_population(10, 0.01, correlation=0.9, seed=0)


def test_exits_are_like_exits() -> None:
    """Their scores are correlated and tell right from wrong; deeper ones are more often right."""
    generator = np.random.default_rng(0)
    decisions = decide(generator.random(50_000) < MISLEADING, generator)
    assert np.corrcoef(decisions.scores)[np.triu_indices(3, 1)].min() > 0.5
    wrong = decisions.is_wrong.mean(1)
    assert 0.5 > wrong[0] > wrong[1] > wrong[2] > 0.1
    for scores, is_wrong in zip(decisions.scores, decisions.is_wrong, strict=True):
        assert scores[~is_wrong].mean() > scores[is_wrong].mean() + 0.1
    highest = decisions.highest_wrong_score
    one = int(np.argmax(highest))
    assert highest[one] == max(
        s for s, w in zip(decisions.scores[:, one], decisions.is_wrong[:, one], strict=True) if w
    )


def test_risks_of_the_grid_are_exact(population: Population) -> None:
    for loss in ("A-max", "text"):
        grid = Grid.of(population, loss, ALPHA, (0.5, 1.02))
        assert grid.risks[0] == pytest.approx(0.5 * ALPHA, rel=0.01)
        assert grid.risks[0] < ALPHA < grid.risks[1]


def test_certified_points_keep_the_promise_and_others_break_it(population: Population) -> None:
    rows = rows_of(population, Case("A-max", ALPHA, 0.2, "fine", 300))
    assert not rows["certified"]["is_rejected"]
    assert rows["certified"]["refused"] < 0.05
    assert rows["certified"]["mean_risk_over_alpha"] > 0.5  # it is of use too
    for name in ("naive", "pooled_tokens"):
        assert rows[name]["is_rejected"] and rows[name]["violation_rate"] > 0.1
        assert rows[name]["must_be_seen_to_fail"] and not rows[name]["is_right"]


def test_certified_texts_keep_the_promise(population: Population) -> None:
    rows = rows_of(population, Case("text", ALPHA, 0.2, "fine", 1000))
    assert list(rows) == ["certified_texts"]
    assert not rows["certified_texts"]["is_rejected"]
    assert rows["certified_texts"]["violation_rate"] > 0  # points above alpha are in reach


def test_off_by_one_breaks_the_promise(population: Population) -> None:
    rows = rows_of(population, Case("A-max", ALPHA, 0.2, "coarse", 1000), repeats=60)
    assert rows["first_failing"]["violation_rate"] > 0.5 > rows["certified"]["violation_rate"]


def test_the_program_keeps_the_promise(population: Population, monkeypatch) -> None:
    """And the simulation would see it if it did not: with all prompts pooled in its test, it does not."""
    case = Case("A-max", ALPHA, 0.2, "tuned", 500)
    row = simulation.simulate_program(population, case, 60, seed=0)
    assert not row["is_rejected"]
    assert row["refused"] < 0.1 and row["mean_risk_over_alpha"] > 0.5
    monkeypatch.setattr(certification, "p_value", lambda of_prompts, alpha, *_: binomial_p_value(
        round(of_prompts.sum() * DECISIONS), len(of_prompts) * DECISIONS, alpha
    ))  # fmt: skip
    assert simulation.simulate_program(population, case, 60, seed=0)["is_rejected"]


def test_goals_need_right_methods_to_pass_and_wrong_ones_to_fail() -> None:
    def row(method: str, loss: str, is_rejected: bool) -> dict:
        is_right = method.startswith("certified")
        return {"method": method, "loss": loss, "is_right": is_right, "must_be_seen_to_fail": not is_right,
                "is_rejected": is_rejected, "violation_rate": 0.1, "p_value": 0.5}  # fmt: skip

    rows = [row("certified", "A-max", True), row("certified_texts", "text", False), row("naive", "A-max", True)]
    rows += [row("first_failing", "A-max", True), row("first_failing", "A-max", False)]
    found = goals({"cases": rows, "power": [{"power": 0.8, "p_value": 1e-9}]})
    assert [goal["met"] for goal in found.values()] == [False, True, True, False, False]


def test_the_monitor_s_simulation_counts_audits(population: Population) -> None:
    generator = np.random.default_rng(0)
    assert monitor_simulation.audits_until_alarm(np.zeros(5), ALPHA, generator, 200) is None
    all_wrong = monitor_simulation.audits_until_alarm(np.ones(5), ALPHA, generator, 200)
    monitor = RiskMonitor(ALPHA, monitor_simulation.DELTA)
    assert [monitor.observe(1.0) for _ in range(all_wrong)].index(True) + 1 == all_wrong
    losses = population.errors(population.threshold(3 * ALPHA)) / DECISIONS
    assert all(monitor_simulation.audits_until_alarm(losses, ALPHA, generator, 2000) < 200 for _ in range(20))
    row = monitor_simulation.row_of([3, None, 5], 1000, risk_over_alpha=1.0)
    assert row == {"risk_over_alpha": 1.0, "without_alarm": 1 / 3, "median": 5, "mean_at_least": 336.0}
    assert monitor_simulation.row_of([3, None, None], 1000)["median"] is None
    verdicts = monitor_simulation.goals([{**row, "mean_at_least": 19.0}, {**row, "risk_over_alpha": 2.0}])
    assert [one["met"] for one in verdicts.values()] == [False, False]
