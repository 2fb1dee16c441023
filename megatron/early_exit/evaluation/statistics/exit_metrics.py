"""Metrics of exits: how well a score tells right decisions from wrong ones.

scores: [decisions] in [0, 1], such as the largest probability. correct: [decisions], true where the exit's choice is
right (for exits: where it agrees with the final head). Every function raises ValueError for no decisions, for shapes
that differ and for NaN.

Sources: Guo et al., On calibration of modern neural networks, arXiv:1706.04599 (reliability, ECE); Geifman and
El-Yaniv, Selective classification for deep neural networks, arXiv:1705.08500 (coverage and risk).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class ReliabilityBin:
    """Decisions with scores in one part of [0, 1]."""

    score: float
    """Mean."""
    correct: float
    """Share."""
    count: int


class CoverageRisk(NamedTuple):
    """What taking all decisions with a score of at least `threshold` covers and costs."""

    threshold: float
    coverage: float
    """Share of decisions that are taken."""
    risk: float
    """Share of the taken ones that are wrong."""
    oracle_risk: float
    """The same if scores put all right decisions before all wrong ones: the least possible at this coverage."""


def reliability(scores: Any, correct: Any, bins: int = 15) -> list[ReliabilityBin]:
    """Bins of equal width, (0, 1 / bins] and so on; 0 is in the first, empty ones are left out."""
    scores, correct = _checked(scores, correct)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores lie in [0, 1], not from {scores.min()} to {scores.max()}")
    if bins < 1:
        raise ValueError(f"{bins} bins are too few; take at least 1")
    inner_edges = np.arange(1, bins) / bins
    bin_of = np.searchsorted(inner_edges, scores, side="left")
    counts = np.bincount(bin_of, minlength=bins)
    score_sums = np.bincount(bin_of, scores, bins)
    correct_sums = np.bincount(bin_of, correct, bins)
    return [
        ReliabilityBin(float(score_sums[i] / counts[i]), float(correct_sums[i] / counts[i]), int(counts[i]))
        for i in np.flatnonzero(counts)
    ]


def expected_calibration_error(scores: Any, correct: Any, bins: int = 15) -> float:
    """Mean over decisions of |mean score - share correct| of their bin."""
    parts = reliability(scores, correct, bins)
    return sum(part.count * abs(part.score - part.correct) for part in parts) / sum(part.count for part in parts)


def leaving_share(scores: Any, correct: Any, alpha: float) -> float:
    """Largest share of decisions that reach a threshold with which the wrong ones among them are at most a share
    `alpha` of all decisions."""
    scores, correct = _checked(scores, correct)
    order = np.argsort(-scores, kind="stable")
    is_last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores all are taken, or none
    num_wrong = np.cumsum(~correct[order])
    fits = np.flatnonzero(is_last & (num_wrong <= alpha * len(scores)))
    return float(fits[-1] + 1) / len(scores) if fits.size else 0.0


def auroc(scores: Any, correct: Any) -> float | None:
    """Probability that a right decision has a higher score than a wrong one, ties counted half; None without both
    kinds.

    Scores may be any finite numbers."""
    scores, correct = _checked(scores, correct)
    num_right = int(correct.sum())
    num_wrong = len(correct) - num_right
    if not num_right or not num_wrong:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of equal scores: their mean, counted from 1
    return float((ranks[place][correct].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def coverage_risk(scores: Any, correct: Any, num_points: int = 200) -> list[CoverageRisk]:
    """The curve from the highest threshold to the lowest: a point for each distinct score, of at most `num_points`
    about equally many decisions apart. Its last point covers everything."""
    scores, correct = _checked(scores, correct)
    if num_points < 1:
        raise ValueError(f"a curve of {num_points} points is none")
    order = np.argsort(-scores, kind="stable")
    scores, wrong = scores[order], np.cumsum(~correct[order])
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)  # the last of each distinct score
    if len(ends) > num_points:
        wanted = np.arange(1, num_points + 1) * len(scores) / num_points - 1
        ends = np.unique(ends[np.searchsorted(ends, np.floor(wanted))])
    num_right = int(correct.sum())
    return [
        CoverageRisk(
            threshold=float(scores[end]),
            coverage=float((end + 1) / len(scores)),
            risk=float(wrong[end] / (end + 1)),
            oracle_risk=float(max(0, end + 1 - num_right) / (end + 1)),
        )
        for end in ends.tolist()
    ]


def perplexity(log_probs: Any) -> float:
    """exp(-mean) of the tokens' log-probabilities (nats); infinite if a token had none. Raises ValueError without
    tokens and for values that are no log-probabilities."""
    log_probs = np.asarray(log_probs, dtype=float)
    if not log_probs.size:
        raise ValueError("no tokens have no perplexity")
    if not (log_probs <= 1e-6).all():  # rounding may leave a probability of 1 a bit above it
        raise ValueError(f"log-probabilities are at most 0, not {log_probs.max()}")
    with np.errstate(over="ignore"):
        return float(np.exp(-log_probs.mean()))


def _checked(scores: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, correct = np.asarray(scores, dtype=float), np.asarray(correct)
    if scores.ndim != 1 or scores.shape != correct.shape:
        raise ValueError(
            f"scores and correct must be lists of one length, not {list(scores.shape)} and {list(correct.shape)}"
        )
    if not len(scores):
        raise ValueError("no decisions have no metric")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite numbers")
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct must be true or false for every decision")
    return scores, correct.astype(bool)
