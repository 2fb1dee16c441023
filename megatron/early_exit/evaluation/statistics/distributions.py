"""Distribution functions of the binomial and of Student's t: exact sums, no tables. Quantiles are found by
bisection."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(Bin(trials, probability) <= successes), to about ten digits.

    Raises ValueError unless 0 <= successes <= trials, both whole numbers, and 0 <= probability <= 1."""
    successes, trials = whole_number("successes", successes), whole_number("trials", trials)
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials are impossible")
    if not 0 <= probability <= 1:
        raise ValueError(f"{probability} is no probability")
    if successes == trials or probability == 0:
        return 1.0
    if probability == 1:
        return 0.0
    # The tail beyond the mode is summed, whose terms fall: no overflow, and no difference of two large numbers.
    if successes < (trials + 1) * probability:
        return _lower_tail(successes, trials, probability)
    return 1.0 - _lower_tail(trials - successes - 1, trials, 1.0 - probability)


def _lower_tail(successes: int, trials: int, probability: float) -> float:
    odds = probability / (1.0 - probability)
    counts = np.arange(successes, 0, -1)
    ratios = counts / ((trials - counts + 1) * odds)  # of the term of count - 1 to that of count
    return min(1.0, math.exp(_log_term(successes, trials, probability)) * float(1.0 + np.cumprod(ratios).sum()))


def _log_term(successes: int, trials: int, probability: float) -> float:
    log_choices = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    return log_choices + successes * math.log(probability) + (trials - successes) * math.log1p(-probability)


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's distribution with `freedom` degrees (1 or more), for probabilities from 0.5 to below 1.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile at probability {probability} with {freedom} degrees of freedom")
    angle = bisect(lambda angle: _t_mass(angle, freedom) >= 2 * probability - 1, 0.0, math.pi / 2)
    return math.sqrt(freedom) * math.tan(angle)


def _t_mass(angle: float, freedom: int) -> float:
    """P(|t| <= sqrt(freedom) * tan(angle))"""
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = freedom % 2
    steps = np.arange(2 if is_odd else 1, freedom - 1, 2)
    series = 1.0 + float(np.cumprod(steps / (steps + 1) * cosine**2).sum())
    if not is_odd:
        return sine * series
    return 2 / math.pi * (angle + (sine * cosine * series if freedom > 1 else 0.0))


def bisect(is_beyond: Callable[[float], bool], low: float, high: float) -> float:
    """Where `is_beyond` turns from false to true between low and high, to the last digits of a float."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return high


def whole_number(name: str, value: int) -> int:
    """Raises ValueError for anything that is not an integer, also for floats that look like one: counts are counted."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
