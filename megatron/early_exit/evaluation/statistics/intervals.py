"""Intervals and tests of what a report compares. The unit is the prompt, or the round of a timing: never the token.

Sources: Efron and Tibshirani, An introduction to the bootstrap (percentiles); Clopper and Pearson, Biometrika 26
(1934); McNemar, Psychometrika 12 (1947), in its exact form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from megatron.early_exit.evaluation.statistics.distributions import binomial_cdf, bisect, t_quantile, whole_number


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


def bootstrap(
    values: Any,
    statistic: Callable[[np.ndarray], float] = np.mean,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of `statistic` over resampled prompts.

    values: [prompts], or [prompts, k] for a statistic of several columns such as `ratio_of_sums`; `statistic` gets the
    same with other prompts. Raises ValueError for less than two prompts, for NaN and where the statistic is none."""
    values = _checked(values)
    _require_confidence(confidence)
    generator = np.random.default_rng(seed)
    found = np.array([
        statistic(values[generator.integers(len(values), size=len(values))]) for _ in range(num_resamples)
    ], dtype=float)  # fmt: skip
    if not np.isfinite(found).all():
        raise ValueError("the statistic is not finite for some of the resampled prompts")
    tail = (1 - confidence) / 2
    return Interval(*(float(end) for end in np.quantile(found, [tail, 1 - tail])))


def loss_interval(losses: Any, seed: int) -> Interval:
    """Of the mean of losses in [0, 1] of prompts: by `bootstrap`. If all are 0, or all are 1, no resample differs; then
    Clopper and Pearson's, of the share of prompts that are like these, which the other losses cannot make wider."""
    losses = _checked(losses)
    if not losses.any() or (losses == 1).all():
        return clopper_pearson(int(losses.sum()), len(losses))
    return bootstrap(losses, seed=seed)


def ratio_of_sums(values: np.ndarray) -> float:
    """Sum of the first column over that of the second, of values [prompts, 2]: such as tokens that agree and tokens."""
    numerator, denominator = values.sum(0)
    return float(numerator / denominator) if denominator else math.nan


def paired_bootstrap(a: Any, b: Any, num_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Interval:
    """`bootstrap` of the mean difference a - b; a, b: [prompts], of the same prompts in the same order."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    _require_pairs(a, b)
    return bootstrap(a - b, np.mean, num_resamples, seed, confidence)


def speed_ratio(seconds: Any, baseline_seconds: Any, confidence: float = 0.95) -> tuple[float, Interval]:
    """How many times as fast as the baseline, and its interval: above 1 is faster. Geometric mean over rounds;
    Student's t over their logarithms.

    seconds, baseline_seconds: [rounds], measured in turn; or [rounds, prompts], of which a round's mean logarithm is
    one observation, since what slows a round down hits all of its prompts. Raises ValueError for less than two
    rounds."""
    seconds, baseline_seconds = np.asarray(seconds, dtype=float), np.asarray(baseline_seconds, dtype=float)
    _require_pairs(seconds, baseline_seconds)
    _require_confidence(confidence)
    if seconds.ndim == 0 or len(seconds) < 2:
        raise ValueError(
            f"{seconds.shape[0] if seconds.ndim else 1} pairs of times have no interval; measure at least 2"
        )
    if not ((seconds > 0) & (baseline_seconds > 0) & np.isfinite(seconds) & np.isfinite(baseline_seconds)).all():
        raise ValueError("seconds must be above 0 and finite")
    rounds = (np.log(baseline_seconds) - np.log(seconds)).reshape(len(seconds), -1).mean(1)
    mean = float(rounds.mean())
    margin = t_quantile((1 + confidence) / 2, len(rounds) - 1) * float(rounds.std(ddof=1)) / math.sqrt(len(rounds))
    return math.exp(mean), Interval(math.exp(mean - margin), math.exp(mean + margin))


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a probability, from independent trials. Raises ValueError for impossible counts."""
    successes, trials = whole_number("successes", successes), whole_number("trials", trials)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials have no interval")
    _require_confidence(confidence)
    tail = (1 - confidence) / 2
    # The distribution function falls as the probability grows.
    low = bisect(lambda p: 1 - binomial_cdf(successes - 1, trials, p) >= tail, 0.0, 1.0) if successes else 0.0
    high = bisect(lambda p: binomial_cdf(successes, trials, p) <= tail, 0.0, 1.0) if successes < trials else 1.0
    return Interval(low, high)


def mcnemar(a_right_b_wrong: int, a_wrong_b_right: int) -> float:
    """Two-sided exact p-value of "a and b are right equally often", from the items on which they differ.

    1 if there are none. Raises ValueError for counts that are negative or no whole numbers."""
    differing = whole_number("count", a_right_b_wrong) + whole_number("count", a_wrong_b_right)
    return min(1.0, 2 * binomial_cdf(min(a_right_b_wrong, a_wrong_b_right), differing, 0.5))


def _checked(given: Any) -> np.ndarray:
    values: np.ndarray = np.asarray(given, dtype=float)
    if values.ndim == 0 or len(values) < 2:
        raise ValueError(f"{values.shape[0] if values.ndim else 1} prompts have no interval; take at least 2")
    if not np.isfinite(values).all():
        raise ValueError("values of prompts must be finite numbers")
    return values


def _require_pairs(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"pairs need the same shape on both sides, not {list(a.shape)} and {list(b.shape)}")


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, not {confidence}")
