"""Tests of a promised risk: against scipy and a literal transcription of the formula, and their validity by
simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron.early_exit.evaluation.statistics.distributions import binomial_cdf, t_quantile
from megatron.early_exit.evaluation.statistics.learn_then_test import (
    betting_log_wealth,
    betting_p_value,
    binomial_p_value,
    fixed_sequence,
    least_prompts,
    missing_prompts,
    prompts_needed,
)


def beta_binomial(risk: float, correlation: float, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Losses of prompts with 64 decisions."""
    generator = np.random.default_rng(seed)
    strength = 1 / correlation - 1
    return generator.binomial(64, generator.beta(risk * strength, (1 - risk) * strength, shape)) / 64


@pytest.mark.parametrize(("successes", "trials", "probability"), [
    (0, 1, 0.5), (1, 1, 0.5), (0, 299, 0.01), (3, 800, 0.01), (12, 2000, 0.01), (0, 100_000, 0.001), (70, 100_000,
    0.001), (20_500, 100_000, 0.2), (19_500, 100_000, 0.2), (99_999, 100_000, 0.2), (3, 7, 0.0), (3, 7, 1.0), (6, 7,
    0.999),
])  # fmt: skip
def test_binomial_cdf_is_scipy_s(successes: int, trials: int, probability: float) -> None:
    expected = stats.binom.cdf(successes, trials, probability)
    with np.errstate(over="raise", invalid="raise"):
        assert binomial_cdf(successes, trials, probability) == pytest.approx(expected, rel=1e-8, abs=1e-300)


@given(st.integers(1, 3000), st.floats(0, 1, allow_subnormal=False), st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=200)
def test_binomial_cdf_is_scipy_s_everywhere(trials: int, share: float, probability: float) -> None:
    successes = math.floor(share * trials)
    expected = stats.binom.cdf(successes, trials, probability)
    assert binomial_cdf(successes, trials, probability) == pytest.approx(expected, rel=1e-8, abs=1e-200)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (2.0, 5), (2, 5.0), (0.3 * 10, 10)])
def test_impossible_counts_are_refused(successes: float, trials: float) -> None:
    with pytest.raises(ValueError, match="impossible|whole number"):
        binomial_p_value(successes, trials, 0.1)


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.95, 0.975, 0.995, 0.9995])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 29, 1000])
def test_t_quantile_is_scipy_s(probability: float, freedom: int) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_t_quantiles_that_do_not_exist_are_refused(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(probability, freedom)


def literal_betting_p_value(losses: list[float], alpha: float) -> float:
    """The formula, one loss after the other, with the losses that are pretended written out: ten of each of two values
    with mean alpha / 2 and variance alpha / 8."""
    spread = math.sqrt(alpha / 8)
    seen = [alpha / 2 - spread] * 10 + [alpha / 2 + spread] * 10
    wealth = best = 1.0
    for loss in losses:
        mean = sum(seen) / len(seen)
        variance = sum((value - mean) ** 2 for value in seen) / len(seen)
        bet = (alpha - mean) / (variance + (alpha - mean) ** 2)
        wealth *= 1 + min(max(bet, 0.0), 0.999 / (1 - alpha)) * (alpha - loss)
        best = max(best, wealth)
        seen.append(loss)
    return 1 / best


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("risk_ratio", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("n", [1, 2, 33, 400])
def test_betting_p_value_is_the_formula(alpha: float, risk_ratio: float, n: int) -> None:
    generator = random.Random(n)
    losses = [generator.choice([0.0, 0.0, 0.0, generator.random()]) * 8 * alpha * risk_ratio for _ in range(n)]
    losses = [min(1.0, loss) for loss in losses]
    order = np.random.default_rng(5).permutation(n)
    expected = literal_betting_p_value([losses[i] for i in order], alpha)
    assert betting_p_value(losses, alpha, seed=5) == pytest.approx(expected, rel=1e-9)


def test_betting_takes_all_points_of_a_grid_at_once() -> None:
    losses = beta_binomial(0.008, 0.05, (2, 3, 200))
    together = betting_p_value(losses, 0.01, seed=3)
    assert together.shape == (2, 3)
    assert together[1, 2] == betting_p_value(losses[1, 2], 0.01, seed=3)


def test_the_order_of_prompts_is_the_seed_s() -> None:
    losses = np.sort(beta_binomial(0.005, 0.2, (300,)))
    assert betting_p_value(losses, 0.01, 1) == betting_p_value(losses, 0.01, 1)
    assert len({betting_p_value(losses, 0.01, seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("losses", [[], [[]], [0.1, math.nan], [0.1, -0.01], [0.1, 1.01], 0.5, [math.inf]])
def test_what_is_no_loss_is_refused(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="losses"):
        betting_p_value(losses, 0.1, seed=0)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_what_is_no_risk_is_refused(alpha: float) -> None:
    for test in (lambda: betting_p_value([0.1], alpha, 0), lambda: binomial_p_value(0, 3, alpha),
                 lambda: least_prompts(alpha, 0.05)):  # fmt: skip
        with pytest.raises(ValueError, match="alpha must be above 0"):
            test()


@given(st.lists(st.sampled_from([0.0, 1 / 64, 0.3, 1.0]), min_size=1, max_size=80), st.floats(0.001, 0.2))
@settings(deadline=None, max_examples=100)
def test_p_values_lie_in_the_unit_interval(losses: list[float], alpha: float) -> None:
    assert 0 < betting_p_value(losses, alpha, seed=0) <= 1
    assert np.isfinite(betting_log_wealth(np.array(losses), alpha)).all()


def test_large_samples_do_not_overflow() -> None:
    assert betting_p_value(np.zeros(100_000), 0.2, 0) == 0.0
    assert betting_p_value(np.ones(100_000), 0.001, 0) == 1.0
    only_once = betting_log_wealth(np.ones(100_000), 0.001)  # nobody bets against what has been seen
    assert only_once.min() == only_once.max() == pytest.approx(math.log(0.001))


@pytest.mark.parametrize("law", ["beta_binomial", "binary", "two_values"])
def test_betting_is_valid_at_a_risk_of_just_alpha(law: str) -> None:
    """P(p <= delta) <= delta; a one-sided test at level .001 does not reject that."""
    alpha, repeats, n = 0.05, 4000, 300
    generator = np.random.default_rng(8)
    losses = {
        "beta_binomial": lambda: beta_binomial(alpha, 0.2, (repeats, n), seed=8),
        "binary": lambda: (generator.random((repeats, n)) < alpha).astype(float),
        "two_values": lambda: np.where(generator.random((repeats, n)) < 0.5, alpha - 0.04, alpha + 0.04),
    }[law]()
    p_values = betting_p_value(losses, alpha, seed=0)
    for delta in (0.02, 0.05, 0.2):
        false_successes = int((p_values <= delta).sum())
        assert stats.binomtest(false_successes, repeats, delta, alternative="greater").pvalue > 0.001
    assert (p_values <= 0.2).any()  # or the simulation shows nothing


def test_a_fixed_sequence_ends_at_the_first_failure() -> None:
    assert fixed_sequence([0.01, 0.05, 0.06, 0.001], 0.05) == 1
    assert fixed_sequence([0.06, 0.001], 0.05) is None
    assert fixed_sequence(np.array([0.0, 0.0]), 0.05) == 1


@pytest.mark.parametrize("p_values", [[], [0.1, math.nan], [-0.1], [1.1], [[0.1]]])
def test_what_is_no_p_value_is_refused(p_values: list[float]) -> None:
    with pytest.raises(ValueError, match="p-values"):
        fixed_sequence(p_values, 0.05)


@pytest.mark.parametrize(("alpha", "delta", "expected"), [
    (0.01, 0.05, 299), (0.02, 0.05, 149), (0.05, 0.05, 59), (0.1, 0.81, 2), (0.1, 0.729, 3), (0.5, 0.25, 2), (0.5,
    0.5, 1), (0.5, 0.9, 1), (0.001, 0.05, 2995), (1 - 0.99, 0.05, 299),
])  # fmt: skip
def test_least_prompts(alpha: float, delta: float, expected: int) -> None:
    assert least_prompts(alpha, delta) == expected
    assert missing_prompts(0, alpha, delta) == expected
    assert missing_prompts(expected - 1, alpha, delta) == 1
    assert missing_prompts(expected + 7, alpha, delta) == 0


@pytest.mark.parametrize(("alpha", "least"), [(0.01, 299), (0.02, 149), (0.05, 59)])
def test_without_losses_the_least_number_suffices(alpha: float, least: int) -> None:
    assert betting_p_value(np.zeros(least), alpha, 0) <= 0.05 < betting_p_value(np.zeros(least - 1), alpha, 0)
    assert binomial_p_value(0, least, alpha) <= 0.05 < binomial_p_value(0, least - 1, alpha)
    assert prompts_needed(alpha, 0.05, 0.0) == least


@pytest.mark.parametrize(("alpha", "risk_ratio", "promised"), [
    (0.01, 0.25, 500), (0.01, 0.5, 800), (0.02, 0.5, 400), (0.05, 0.25, 100), (0.05, 0.5, 150), (0.05, 0.75, 400),
])  # fmt: skip
def test_prompts_needed_have_the_power_that_is_said(alpha: float, risk_ratio: float, promised: int) -> None:
    """Against p-values of other draws, and within the numbers that users are told."""
    needed = prompts_needed(alpha, 0.05, risk_ratio)
    assert needed <= promised
    p_values = betting_p_value(beta_binomial(alpha * risk_ratio, 0.05, (1000, needed), seed=9), alpha, seed=0)
    assert (p_values <= 0.05).mean() == pytest.approx(0.9, abs=0.05)


def test_hopeless_promises_need_no_number_of_prompts() -> None:
    assert prompts_needed(0.01, 0.05, 1.0) is None
    assert prompts_needed(0.2, 0.05, 0.999, power=0.99) is None
