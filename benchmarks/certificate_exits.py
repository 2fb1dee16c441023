"""Exits of no model: scores and mistakes in a population of prompts, whose risk at every threshold is known exactly.

A decision is hard by chance: exits are less sure of it and more often wrong, all of them together. A few are
misleading: exits are wrong and sure all the same, as with a fact that small models believe. How many of a prompt's
decisions mislead is the prompt's, beta-distributed, so mistakes come in clusters; how much so is set by the wanted
correlation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.early_exit.evaluation.statistics.distributions import bisect

DECISIONS = 64
"""Of each prompt."""

MISLEADING = 0.03
"""Share of decisions."""

SURENESS = (1.0, 1.6, 2.2)
WRONGNESS = (-1.2, -1.8, -2.4)
"""Of each exit, from the first to the deepest: its score, and how often it is wrong, at medium difficulty (in
logits)."""


@dataclass(frozen=True)
class Decisions:
    """What the exits make of them; all arrays [exits, ...]."""

    scores: np.ndarray
    is_wrong: np.ndarray

    @cached_property
    def highest_wrong_score(self) -> np.ndarray:
        """[...]: some exit errs if the threshold is not above it; -1: none is wrong."""
        return np.where(self.is_wrong, self.scores, -1.0).max(0)


def decide(is_misleading: np.ndarray, generator: np.random.Generator) -> Decisions:
    """Of decisions [...], independent but for what misleads."""
    shape = is_misleading.shape
    difficulty = generator.standard_normal(shape, dtype=np.float32)
    scores, is_wrong = [], []
    for sureness, wrongness in zip(SURENESS, WRONGNESS, strict=True):
        noise = generator.standard_normal(shape, dtype=np.float32)
        scores.append(_logistic(sureness - 2 * difficulty + 0.5 * noise + 2 * is_misleading))
        is_wrong.append(
            generator.random(shape, dtype=np.float32) < _logistic(wrongness + 2 * difficulty + 5 * is_misleading)
        )
    return Decisions(np.stack(scores), np.stack(is_wrong))


def _logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


@dataclass(frozen=True)
class Population:
    """Prompts that are drawn from with replacement, as often as there are calibrations. A threshold is that of all
    exits, unless there are several."""

    decisions: Decisions
    """[exits, prompts, DECISIONS]"""

    def risk(self, thresholds: np.ndarray) -> float:
        """Share of all decisions that err. thresholds: [exits]"""
        num_can_err = np.count_nonzero(self.decisions.highest_wrong_score >= thresholds.min())
        errs = (self._wrong_scores[:, :num_can_err] >= thresholds[:, None]).any(0)
        return float(errs.sum() / self.decisions.highest_wrong_score.size)

    @cached_property
    def _wrong_scores(self) -> np.ndarray:
        """[exits, all decisions]: -1 where an exit is right; decisions with the highest ones first."""
        order = np.argsort(-self.decisions.highest_wrong_score, axis=None)
        of_exits = np.where(self.decisions.is_wrong, self.decisions.scores, -1.0)
        return of_exits.reshape(len(of_exits), -1)[:, order]

    def threshold(self, risk: float) -> float:
        """With which this share of all decisions errs."""
        return _threshold(self.decisions.highest_wrong_score, risk)

    def threshold_of_texts(self, risk: float) -> float:
        """With which this share of prompts has a decision that errs."""
        return _threshold(self.decisions.highest_wrong_score.max(1), risk)

    def errors(self, threshold: float) -> np.ndarray:
        """[prompts]: how many decisions err."""
        return (self.decisions.highest_wrong_score >= threshold).sum(1)

    def correlation(self, threshold: float) -> float:
        """Of errors in two decisions of one prompt."""
        shares = self.errors(threshold) / DECISIONS
        mean = shares.mean()
        # Var(share) = mean (1 - mean) (1 + (T - 1) correlation) / T
        return float((shares.var() / (mean * (1 - mean)) * DECISIONS - 1) / (DECISIONS - 1))


def _threshold(highest_wrong_scores: np.ndarray, risk: float) -> float:
    return float(np.quantile(highest_wrong_scores, 1 - risk, method="higher"))


def draw_population(num_prompts: int, risk: float, correlation: float, seed: int) -> Population:
    """Prompts with this `correlation` of errors at the threshold with this `risk`.

    Raises ValueError if it would take more than all of a prompt's decisions to mislead together."""
    generator = np.random.default_rng(seed)
    spread = _spread(risk, correlation, generator)
    strength = 1 / spread - 1
    shares = generator.beta(MISLEADING * strength, (1 - MISLEADING) * strength, (num_prompts, 1))
    parts = [
        decide(generator.random((len(part), DECISIONS)) < part, generator)
        for part in np.array_split(shares, max(1, num_prompts // 10_000))
    ]
    join = lambda name: np.concatenate([getattr(part, name) for part in parts], axis=1)
    return Population(Decisions(join("scores"), join("is_wrong")))


def _spread(risk: float, correlation: float, generator: np.random.Generator) -> float:
    """Correlation of what misleads in a prompt, for the one of errors: with error chances a and b of decisions that
    mislead and of others, the latter is Var(share) (a - b)^2 / (risk (1 - risk))."""
    kinds = [decide(np.full(400_000, kind), generator).highest_wrong_score for kind in (True, False)]
    errs = lambda threshold: [float((kind >= threshold).mean()) for kind in kinds]
    overall = lambda chances: MISLEADING * chances[0] + (1 - MISLEADING) * chances[1]
    a, b = errs(bisect(lambda threshold: overall(errs(threshold)) <= risk, 0.0, 1.0))
    spread = correlation * risk * (1 - risk) / ((a - b) ** 2 * MISLEADING * (1 - MISLEADING))
    if spread >= 1:
        raise ValueError(f"a correlation of {correlation} at a risk of {risk} is more than what misleads can give")
    return spread
