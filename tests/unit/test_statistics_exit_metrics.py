"""Metrics of exits: against scikit-learn, other ways to the same numbers, and curves by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from megatron.early_exit.evaluation.statistics.exit_metrics import (
    auroc,
    coverage_risk,
    expected_calibration_error,
    perplexity,
    reliability,
)

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.random(5000)
CORRECT = GENERATOR.random(5000) < SCORES**2
DECISIONS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.6, 0.99, 1.0]), st.booleans()), min_size=1)


def calibration_error_in_a_loop(scores, correct, bins: int) -> float:
    total = 0.0
    for index in range(bins):
        inside = [
            (score, right)
            for score, right in zip(scores, correct, strict=True)
            if index / bins < score <= (index + 1) / bins or (index == 0 and score == 0)
        ]
        total += abs(sum(score - right for score, right in inside))
    return total / len(scores)


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_calibration_error_is_that_of_a_loop(bins: int) -> None:
    expected = calibration_error_in_a_loop(SCORES, CORRECT, bins)
    assert expected > 0.1
    assert expected_calibration_error(SCORES, CORRECT, bins) == pytest.approx(expected)


@given(DECISIONS, st.sampled_from([1, 3, 10, 15]))
@settings(deadline=None, max_examples=100)
def test_calibration_error_of_scores_on_edges(decisions: list[tuple[float, bool]], bins: int) -> None:
    scores, correct = zip(*decisions, strict=True)
    expected = calibration_error_in_a_loop(scores, correct, bins)
    assert expected_calibration_error(scores, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_reliability_by_hand() -> None:
    bins = reliability([0.0, 0.2, 0.25, 0.9, 1.0], [False, True, False, True, True], bins=5)
    assert [part.count for part in bins] == [2, 1, 2]  # 0.2 belongs to the first bin; two are empty
    assert [part.score for part in bins] == pytest.approx([0.1, 0.25, 0.95])
    assert [part.correct for part in bins] == [0.5, 0.0, 1.0]


@given(DECISIONS)
@settings(deadline=None, max_examples=100)
def test_auroc_is_scikit_learn_s(decisions: list[tuple[float, bool]]) -> None:
    scores, correct = zip(*decisions, strict=True)
    if len(set(correct)) == 1:
        assert auroc(scores, correct) is None
    else:
        assert auroc(scores, correct) == pytest.approx(roc_auc_score(correct, scores), abs=1e-12)


def test_auroc_of_many_decisions_and_any_scores() -> None:
    assert auroc(SCORES, CORRECT) == pytest.approx(roc_auc_score(CORRECT, SCORES))
    assert auroc(100 * SCORES - 7, CORRECT) == pytest.approx(auroc(SCORES, CORRECT))


def test_coverage_and_risk_by_hand() -> None:
    curve = coverage_risk([0.9, 0.5, 0.9, 0.7, 0.2], [True, False, False, True, True])
    assert [point.threshold for point in curve] == [0.9, 0.7, 0.5, 0.2]
    assert [point.coverage for point in curve] == pytest.approx([2 / 5, 3 / 5, 4 / 5, 1])
    assert [point.risk for point in curve] == pytest.approx([1 / 2, 1 / 3, 2 / 4, 2 / 5])
    assert [point.oracle_risk for point in curve] == pytest.approx([0, 0, 1 / 4, 2 / 5])  # three are right


@pytest.mark.parametrize("num_points", [1, 2, 7, 200, 10_000])
def test_points_of_the_curve_are_what_taking_these_decisions_costs(num_points: int) -> None:
    curve = coverage_risk(SCORES, CORRECT, num_points)
    assert len(curve) == min(num_points, len(SCORES))
    for point in curve[:: max(1, len(curve) // 50)]:
        taken = point.threshold <= SCORES
        assert point.coverage == taken.mean()
        assert point.risk == pytest.approx((~CORRECT[taken]).mean())
        best = np.sort(~CORRECT)[: taken.sum()]
        assert point.oracle_risk == pytest.approx(best.mean())
    assert curve[-1].coverage == 1
    gaps = np.diff([0.0] + [point.coverage for point in curve])
    assert gaps.max() <= 1 / num_points + 2 / len(SCORES)


def test_a_thinned_curve_of_tied_scores_covers_everything() -> None:
    curve = coverage_risk(np.repeat([1.0, 0.9, 0.1], [997, 2, 1]), np.arange(1000) % 2 == 0, num_points=2)
    assert [point.coverage for point in curve] == [0.997, 1.0]


def test_perplexity() -> None:
    assert perplexity(np.log([0.5, 0.125])) == pytest.approx(4.0)
    assert perplexity([0.0, -math.inf]) == math.inf
    assert perplexity([-5000.0]) == math.inf
    for values in ([], [math.nan], [0.1]):
        with pytest.raises(ValueError, match="perplexity|log-probabilities"):
            perplexity(values)


@pytest.mark.parametrize(("scores", "correct", "message"), [
    ([], [], "no decisions"), ([0.1], [True, False], "one length"), ([math.nan], [True], "finite"),
    ([[0.1]], [[True]], "lists"), ([0.5], [0.5], "true or false"), ([0.5], [math.nan], "true or false"),
])  # fmt: skip
def test_what_are_no_decisions_is_refused(scores, correct, message: str) -> None:
    for metric in (auroc, coverage_risk, reliability, expected_calibration_error):
        with pytest.raises(ValueError, match=message):
            metric(scores, correct)


def test_calibration_is_of_probabilities() -> None:
    for score in (-0.1, 1.1):
        with pytest.raises(ValueError, match="scores lie in"):
            reliability([score], [True])
    with pytest.raises(ValueError, match="0 bins"):
        reliability([0.5], [True], bins=0)
    with pytest.raises(ValueError, match="0 points"):
        coverage_risk([0.5], [True], num_points=0)
