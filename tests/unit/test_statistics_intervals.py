"""Intervals and tests of reports: against scipy, by hand, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron.early_exit.evaluation.statistics.intervals import (
    bootstrap,
    clopper_pearson,
    loss_interval,
    mcnemar,
    paired_bootstrap,
    ratio_of_sums,
    speed_ratio,
)

VALUES = np.random.default_rng(0).gamma(2.0, size=60)
OTHERS = VALUES + np.random.default_rng(1).normal(0.3, 0.2, size=60)


@pytest.mark.parametrize("statistic", [np.mean, np.median])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_bootstrap_is_scipy_s(statistic, confidence: float) -> None:
    found = bootstrap(VALUES, statistic, confidence=confidence)
    expected = stats.bootstrap(
        (VALUES,), statistic, n_resamples=20_000, confidence_level=confidence, method="percentile", rng=3
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.03 * VALUES.std())
    assert found == bootstrap(VALUES, statistic, confidence=confidence)  # its seed is given
    if statistic is np.mean:  # medians are few
        assert found != bootstrap(VALUES, statistic, confidence=confidence, seed=1)


def test_losses_that_are_all_alike_have_an_interval() -> None:
    """Of 100 prompts without a loss, 3.6% may have one; a bootstrap would say that none has."""
    assert loss_interval(np.zeros(100), seed=0) == pytest.approx((0, 1 - 0.025**0.01))
    assert loss_interval(np.ones(100), seed=0) == pytest.approx((0.025**0.01, 1))
    losses = np.repeat([0.0, 0.25, 1.0], [80, 15, 5])
    assert loss_interval(losses, seed=3) == bootstrap(losses, seed=3)


def test_bootstrap_of_a_ratio_resamples_whole_prompts() -> None:
    """Prompts of 1 and of 100 tokens: the mean of shares and the share of all tokens differ."""
    pairs = np.array([[1.0, 1.0]] * 10 + [[50.0, 100.0]] * 10)
    assert ratio_of_sums(pairs) == pytest.approx(510 / 1010)
    low, high = bootstrap(pairs, ratio_of_sums)
    expected = stats.bootstrap(
        (pairs[:, 0], pairs[:, 1]), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, n_resamples=20_000,
        method="percentile", rng=3,
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.002)


def test_pairs_have_a_narrower_interval_than_their_sides() -> None:
    low, high = paired_bootstrap(OTHERS, VALUES)
    assert (low, high) == bootstrap(OTHERS - VALUES)
    one_side = bootstrap(VALUES)
    assert 0 < low < 0.3 < high < low + 0.5 * (one_side.high - one_side.low)


@pytest.mark.parametrize(("values", "message"), [
    ([], "0 prompts"), ([1.0], "1 prompts"), (3.0, "1 prompts"), ([1.0, math.nan], "finite"),
    ([[1.0, 0.0]] * 3, "not finite"),
])  # fmt: skip
def test_what_has_no_interval_is_refused(values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(values, ratio_of_sums if np.ndim(values) == 2 else np.mean, num_resamples=10)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_what_is_no_confidence_is_refused(confidence: float) -> None:
    for interval in (lambda: bootstrap(VALUES, confidence=confidence), lambda: clopper_pearson(1, 3, confidence),
                     lambda: speed_ratio(VALUES, OTHERS, confidence)):  # fmt: skip
        with pytest.raises(ValueError, match="confidence must be"):
            interval()


def test_speed_ratio_is_scipy_s_t_interval_of_logarithms() -> None:
    logs = np.log(OTHERS / VALUES)
    ratio, interval = speed_ratio(VALUES, OTHERS)
    expected = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert math.log(ratio) == pytest.approx(logs.mean())
    assert np.log(interval) == pytest.approx([expected.low, expected.high])
    assert ratio > 1  # fewer seconds than the baseline


def test_prompts_of_one_round_are_no_independent_observations() -> None:
    """All prompts of a round are as slow as the machine was then: a thousand of them say no more than one."""
    of_rounds = np.array([1.0, 1.2, 0.9, 1.1])
    ratio, interval = speed_ratio(of_rounds, np.ones(4))
    of_prompts = np.repeat(of_rounds[:, None], 1000, axis=1)
    many_ratio, many_interval = speed_ratio(of_prompts, np.ones((4, 1000)))
    assert many_ratio == pytest.approx(ratio)
    assert many_interval == pytest.approx(interval)


@pytest.mark.parametrize(("seconds", "baseline", "message"), [
    ([1.0], [1.0], "1 pairs"), ([], [], "0 pairs"), ([1.0, 2.0], [1.0], "same shape"),
    ([1.0, 0.0], [1.0, 1.0], "above 0"), ([1.0, math.nan], [1.0, 1.0], "above 0"),
    ([1.0, 1.0], [1.0, math.inf], "above 0"),
])  # fmt: skip
def test_times_without_a_ratio_are_refused(seconds: list[float], baseline: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speed_ratio(seconds, baseline)


@pytest.mark.parametrize(("successes", "trials"), [
    (0, 1), (1, 1), (0, 1000), (1000, 1000), (1, 1000), (999, 1000), (37, 61), (50_123, 100_000), (3, 100_000), (0,
    100_000),
])  # fmt: skip
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_clopper_pearson_is_scipy_s(successes: int, trials: int, confidence: float) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert clopper_pearson(successes, trials, confidence) == pytest.approx((expected.low, expected.high), rel=1e-7)


@given(st.integers(1, 500), st.data())
@settings(deadline=None, max_examples=60)
def test_clopper_pearson_is_made_of_quantiles_of_beta(trials: int, data) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = clopper_pearson(successes, trials)
    assert low == pytest.approx(stats.beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0)
    assert high == pytest.approx(
        stats.beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    )


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3), (1.0, 3), (1, 3.0)])
def test_counts_without_an_interval_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="no interval|whole number"):
        clopper_pearson(successes, trials)


@given(st.integers(0, 200), st.integers(0, 200))
@settings(deadline=None, max_examples=60)
def test_mcnemar_is_scipy_s_binomial_test(one: int, other: int) -> None:
    expected = stats.binomtest(one, one + other).pvalue if one + other else 1.0
    assert mcnemar(one, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", [(-1, 3), (3, -1), (1.5, 2), (3, -3)])
def test_mcnemar_refuses_impossible_counts(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="impossible|whole number"):
        mcnemar(*counts)
