"""Monitor of a promised risk in live traffic: raises an alarm when audited losses say that the promise is broken.

Knows nothing of exits and requests: each audited request brings a loss in [0, 1].
"""

from __future__ import annotations

WINDOW = 200
"""Losses over which what the monitor has learned of mean and variance fades."""

PRIOR_LOSSES = 20
"""As many losses the first idea of mean (alpha) and variance (alpha / 8) is worth."""

LEAST_EXCESS = 0.5
"""The monitor never bets on a risk of less than (1 + this) alpha: it stays awake while all goes well."""

HIGHEST_BET = 0.5
"""Share of the evidence that a loss of 0 may take."""


class RiskMonitor:
    """CUSUM of evidence against "the expected loss of a request is at most `alpha`, whatever came before".

    M_t = max(M_{t-1}, 1) (1 + nu_t (L_t - alpha)). The bet nu_t depends on earlier losses alone, so while the promise
    holds each factor is at most 1 on average. Where losses speak for the promise M starts anew at 1: traffic drifts,
    and a good year must not hide a bad day. At M >= 1 / delta an alarm is raised, and M starts anew.

    While the promise holds, false alarms are at least 1 / delta losses apart on average: M_t - t never grows on
    average, as max(M, 1) <= M + 1. That bound is for the worst losses with a risk of just alpha; where it is lower,
    false alarms become rarer exponentially. Source: Shin, Ramdas and Rinaldo, E-detectors, arXiv:2203.03532.

    Raises ValueError unless alpha and delta lie between 0 and 1."""

    def __init__(self, alpha: float, delta: float = 0.05) -> None:
        for name, value in (("alpha", alpha), ("delta", delta)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be above 0 and below 1, not {value}")
        self.alpha = alpha
        self.delta = delta
        self.evidence = 1.0
        """M of the last loss."""
        self.num_losses = 0
        self.num_alarms = 0
        self._sum = 0.0
        self._recent_mean = alpha
        self._recent_variance = alpha / 8

    @property
    def mean_loss(self) -> float:
        """Of all losses so far; 0 before the first."""
        return self._sum / self.num_losses if self.num_losses else 0.0

    def observe(self, loss: float) -> bool:
        """Take the loss of the next audited request; true if it raises an alarm. Raises ValueError outside [0, 1] and
        for NaN, and then changes nothing."""
        if not 0 <= loss <= 1:
            raise ValueError(f"a loss lies in [0, 1], not {loss}")
        evidence = max(self.evidence, 1.0) * (1 + self._bet() * (loss - self.alpha))
        is_alarm = evidence >= 1 / self.delta
        self.evidence = 1.0 if is_alarm else evidence
        self.num_alarms += is_alarm
        self._learn(loss)
        return is_alarm

    def _bet(self) -> float:
        """About the one under which evidence grows fastest at the excess that is expected."""
        excess = max(self._recent_mean - self.alpha, LEAST_EXCESS * self.alpha)
        return min(excess / (self._recent_variance + excess**2), HIGHEST_BET / self.alpha)

    def _learn(self, loss: float) -> None:
        self.num_losses += 1
        self._sum += loss
        weight = max(1 / WINDOW, 1 / (self.num_losses + PRIOR_LOSSES))
        deviation = loss - self._recent_mean
        self._recent_mean += weight * deviation
        self._recent_variance = (1 - weight) * (self._recent_variance + weight * deviation**2)
