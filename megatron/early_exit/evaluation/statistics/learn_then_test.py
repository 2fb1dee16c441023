"""Learn then Test: the riskiest point of a grid whose risk is at most alpha, with probability 1 - delta.

The unit is the prompt: prompts are drawn independently, their tokens are not, so that a test over pooled tokens
promises too much. A *loss* lies in [0, 1] for each prompt, the *risk* is its mean over all prompts that could be
drawn. The grid goes from safe to risky and is chosen before the losses are seen; each point's null hypothesis is "the
risk exceeds alpha".

Sources: Angelopoulos, Bates, Candès, Jordan and Lei, Learn then Test, arXiv:2110.01052 (tests in a fixed sequence);
Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, arXiv:2010.09686.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron.early_exit.evaluation.statistics.distributions import binomial_cdf, whole_number

PRIOR_LOSSES = 20
"""Losses that the betting test pretends to have seen before the first: mean alpha / 2, variance alpha / 8. They bend
the first bets only; the test is valid whatever they are. With so optimistic ones, bets are the highest while all
losses are 0, so that no prompt is wasted (299 at alpha .01 and delta .05)."""

HIGHEST_BET = 0.999
"""Share of the wealth that a loss of 1 may take."""

SIMULATED_CALIBRATIONS = 400
MOST_PROMPTS = 50_000
"""Of `prompts_needed`."""


def binomial_p_value(num_losses: int, n: int, alpha: float) -> float:
    """P(Bin(n, alpha) <= num_losses): p-value of "the risk exceeds alpha" if each loss is 0 or 1.

    num_losses: how many of the `n` losses are 1; a count, never a rounded product. Raises ValueError for impossible
    ones."""
    _require_probability("alpha", alpha)
    if whole_number("n", n) < 1:
        raise ValueError("no losses: a test needs at least one prompt")
    return binomial_cdf(num_losses, n, alpha)


def betting_p_value(losses: Any, alpha: float, seed: int) -> Any:
    """p-value of "the risk exceeds alpha" for losses in [0, 1]: 1 / the greatest wealth of a gambler who bets that it
    does not.

    losses: [prompts], or [..., prompts] for several points of a grid (then an array [...]). Prompts are taken in an
    order drawn from `seed`, which must be chosen before the losses are seen. Raises ValueError without losses, for
    NaN and for losses outside [0, 1]."""
    _require_probability("alpha", alpha)
    losses = _checked(losses)
    order = np.random.default_rng(seed).permutation(losses.shape[-1])
    log_wealth = betting_log_wealth(losses[..., order], alpha).max(-1)
    p_values = np.exp(-np.maximum(log_wealth, 0.0))  # 0: before the first bet
    return float(p_values) if losses.ndim == 1 else p_values


def betting_log_wealth(losses: np.ndarray, alpha: float) -> np.ndarray:
    """Logarithm of prod_{i <= t} (1 + nu_i (alpha - L_i)) for every t; [..., prompts] as `losses`, in their order.

    nu_i = clip((alpha - mu) / (var + (alpha - mu)^2), 0, .999 / (1 - alpha)) with the mean and variance of the losses
    before i and of `PRIOR_LOSSES`."""
    seen = PRIOR_LOSSES + np.arange(losses.shape[-1])
    mean = (PRIOR_LOSSES * alpha / 2 + _sum_before(losses)) / seen
    square = (PRIOR_LOSSES * (alpha / 8 + (alpha / 2) ** 2) + _sum_before(losses**2)) / seen
    variance = np.maximum(square - mean**2, 0.0)
    gap = np.maximum(alpha - mean, 0.0)
    # The variance stays above 0: PRIOR_LOSSES have one.
    bets = np.minimum(gap / (variance + gap**2), HIGHEST_BET / (1.0 - alpha))
    log_wealth: np.ndarray = np.cumsum(np.log1p(bets * (alpha - losses)), axis=-1)
    return log_wealth


def _sum_before(values: np.ndarray) -> np.ndarray:
    before: np.ndarray = np.cumsum(values, axis=-1) - values
    return before


def fixed_sequence(p_values: Sequence[float] | np.ndarray, delta: float) -> int | None:
    """Index of the last accepted point of a grid: its points are accepted from the first on, up to the first whose
    p-value exceeds `delta`, which is not accepted. None if that is the first.

    No correction for the number of points is due, as none is tested after a failure. Raises ValueError for an empty
    grid and for values that are no p-values."""
    _require_probability("delta", delta)
    p_values = np.asarray(p_values, dtype=float)
    if p_values.ndim != 1 or not len(p_values):
        raise ValueError(f"p-values of a grid are a list with at least one, not of shape {p_values.shape}")
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p-values lie in [0, 1]: {p_values.tolist()}")
    num_accepted = int(np.logical_and.accumulate(p_values <= delta).sum())
    return num_accepted - 1 if num_accepted else None


def least_prompts(alpha: float, delta: float) -> int:
    """Prompts below which no test can succeed, even if all losses are 0: the least n with (1 - alpha)^n <= delta.

    Betting needs up to 1 in 1,000 more (`HIGHEST_BET`), which makes a difference above some 1,000 only."""
    _require_probability("alpha", alpha)
    _require_probability("delta", delta)
    n = max(1, math.floor(math.log(delta) / math.log1p(-alpha)) - 1)
    while binomial_p_value(0, n, alpha) > delta:  # as the test has it, to the last bit
        n += 1
    return n


def missing_prompts(n: int, alpha: float, delta: float) -> int:
    """How many more than `n` prompts it takes to reach `least_prompts`; 0 if there are enough."""
    return max(0, least_prompts(alpha, delta) - n)


def prompts_needed(
    alpha: float,
    delta: float,
    risk_ratio: float,
    power: float = 0.9,
    *,
    correlation: float = 0.05,
    decisions: int = 64,
    seed: int = 0,
) -> int | None:
    """Prompts with which `betting_p_value` succeeds with probability `power`: an estimate to about 5%, from 400
    simulated calibrations. None if that takes more than 50,000 or cannot be, as with a risk of alpha and beyond.

    risk_ratio: true risk / alpha. The simulated loss of a prompt is the share of its `decisions` that are wrong,
    beta-binomial with the `correlation` of two decisions of one prompt."""
    for name, value in (("alpha", alpha), ("delta", delta), ("power", power), ("correlation", correlation)):
        _require_probability(name, value)
    if risk_ratio >= 1:
        return None
    generator = np.random.default_rng(seed)
    risk, strength = alpha * risk_ratio, 1 / correlation - 1

    def draw(prompts: int) -> np.ndarray:
        if risk <= 0:
            return np.zeros(prompts)
        shares = generator.beta(risk * strength, (1 - risk) * strength, prompts)
        return generator.binomial(decisions, shares) / decisions

    failures_allowed = SIMULATED_CALIBRATIONS - math.ceil(power * SIMULATED_CALIBRATIONS)
    needed: list[int] = []
    for number in range(1, SIMULATED_CALIBRATIONS + 1):
        prompts = _prompts_until_success(draw, alpha, delta)
        if prompts is not None:
            needed.append(prompts)
        elif number - len(needed) > failures_allowed:
            return None
    return sorted(needed)[SIMULATED_CALIBRATIONS - failures_allowed - 1]


def _prompts_until_success(draw: Callable[[int], np.ndarray], alpha: float, delta: float) -> int | None:
    losses = draw(2 * least_prompts(alpha, delta))
    while True:
        is_success = betting_log_wealth(losses, alpha) >= -math.log(delta)
        if is_success.any():
            return int(is_success.argmax()) + 1
        if len(losses) >= MOST_PROMPTS:
            return None
        losses = np.concatenate([losses, draw(min(len(losses), MOST_PROMPTS - len(losses)))])


def _checked(given: Any) -> np.ndarray:
    losses: np.ndarray = np.asarray(given, dtype=float)
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError("no losses: a test needs at least one prompt")
    if not ((losses >= 0) & (losses <= 1)).all():  # also false for NaN
        raise ValueError(f"losses lie in [0, 1], not from {losses.min()} to {losses.max()}")
    return losses


def _require_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be above 0 and below 1, not {value}")
