"""Thresholds with a guarantee: prompts are split, thresholds are lined up on one part, tested on another, and reported
on a third.

Fixed-sequence Learn-then-Test (Angelopoulos et al., arXiv:2110.01052): a line of threshold settings from safe to risky,
chosen without the data that test it. "The risk of this setting is above alpha" is tested for one after the other, as
long as it is rejected at level delta; the last rejected one is taken. Then the probability that its risk is above alpha
is at most delta. The unit of all of it is the prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.early_exit.evaluation.statistics.learn_then_test import betting_p_value, binomial_p_value, fixed_sequence
from megatron.early_exit.inference.certificates import Risk
from megatron.early_exit.inference.exit_records import PromptRecord

NEVER = math.inf
"""Threshold of an exit that is not taken."""

NAMED_GRID = (0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Thresholds for all exits alike, for risks that are not lined up on a tuning split."""

_NUM_POINTS = 64
# The tuning split's risk at the ends of the line, in parts of alpha.
_SAFEST, _RISKIEST = 1 / 32, 2.0
# Beyond this many exits not all subsets are tried.
_MOST_EXITS = 5


@dataclass(frozen=True)
class Split:
    """Numbers of prompts; every prompt is in one part."""

    tuning: np.ndarray
    calibration: np.ndarray
    free_running: np.ndarray
    """Empty without the second certificate."""
    test: np.ndarray

    @classmethod
    def draw(cls, num_prompts: int, seed: int, with_free_running: bool) -> Split:
        """At random: a fifth to tune, a fifth to test, the rest to calibrate, of which the second certificate, which
        needs about as many prompts, gets half."""
        order = np.random.default_rng(seed).permutation(num_prompts)
        fifth = num_prompts // 5
        tuning, test, rest = order[:fifth], order[fifth : 2 * fifth], order[2 * fifth :]
        half = len(rest) // 2 if with_free_running else 0
        return cls(np.sort(tuning), np.sort(rest[half:]), np.sort(rest[:half]), np.sort(test))

    @property
    def sizes(self) -> dict[str, int]:
        names = ("tuning", "calibration", "free_running", "test")
        return {name: len(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class ThresholdLine:
    """Settings from safe to risky."""

    thresholds: np.ndarray
    """[points, exits]; `NEVER`: not taken"""
    names: tuple[float, ...]
    """Of each point: the risk on the tuning split that it was chosen for, or the threshold of all exits."""

    @classmethod
    def tuned(cls, records: Sequence[PromptRecord], alpha: float, savings: Sequence[float]) -> ThresholdLine:
        """At each point some of the exits share a budget of wrong decisions, of the records' prompts on average, in
        even parts: each gets the smallest threshold with which its own are at most its part. Which exits share it is
        what saves most layers there: one that is often wrong would use up what others need. One that is never wrong
        needs no part. The budget grows from point to point. savings: for each exit, the share of the layers that a
        token saves that leaves there."""
        budgets = np.geomspace(_SAFEST * alpha, _RISKIEST * alpha, _NUM_POINTS)
        is_ever_wrong = np.any([one.is_wrong.any(0) for one in records], 0)
        options = []
        for subset in _subsets(np.flatnonzero(is_ever_wrong).tolist()):
            option = np.where(is_ever_wrong, NEVER, np.zeros((_NUM_POINTS, 1)))
            for index in subset:
                option[:, index] = _smallest_thresholds(records, index, budgets / len(subset))
            options.append(option)
        saved = [[layers_saved(records, point, savings) for point in option] for option in options]
        best = np.argmax(saved, 0)
        return cls(np.stack(options)[best, np.arange(_NUM_POINTS)], tuple(budgets.tolist()))

    @classmethod
    def named(cls, grid: Sequence[float], num_exits: int) -> ThresholdLine:
        """One threshold for all exits at each point, the highest first. Raises ValueError for one outside of 0 to 1."""
        if outside := [value for value in grid if not 0.0 <= value <= 1.0]:
            raise ValueError(f"--grid has {outside[0]}; thresholds lie between 0 and 1")
        ordered = sorted(set(grid), reverse=True)
        return cls(np.repeat(np.array(ordered)[:, None], num_exits, 1), tuple(ordered))

    def __len__(self) -> int:
        return len(self.thresholds)


def _subsets(exits: Sequence[int]) -> list[tuple[int, ...]]:
    """All of them, of many exits those of up to two, and all exits together, which come first."""
    sizes = range(1, len(exits) if len(exits) <= _MOST_EXITS else 3)
    smaller = [subset for size in sizes for subset in itertools.combinations(exits, size)]
    return [tuple(exits), *smaller]


def _smallest_thresholds(records: Sequence[PromptRecord], exit_index: int, budgets: np.ndarray) -> np.ndarray:
    """[budgets] for one exit."""
    scores = np.concatenate([one.scores[:, exit_index] for one in records])
    is_wrong = np.concatenate([one.is_wrong[:, exit_index] for one in records])
    weights = np.concatenate([np.full(len(one.tokens), 1 / (len(one.tokens) * len(records))) for one in records])
    values, place = np.unique(-scores[is_wrong], return_inverse=True)  # the highest score first
    costs = np.cumsum(np.bincount(place, weights[is_wrong], minlength=len(values)))
    # The first wrong score that is too much: the threshold is the next number above it.
    first_beyond = np.searchsorted(costs, budgets, side="right")
    beyond = np.append(-values, -NEVER)[first_beyond]
    thresholds = np.maximum(np.nextafter(beyond, NEVER), 0.0)
    return np.where(thresholds > 1.0, NEVER, thresholds)


def losses(records: Sequence[PromptRecord], thresholds: np.ndarray, risk: Risk) -> np.ndarray:
    """[prompts, points] in [0, 1]. thresholds: [points, exits]. A-max: share of decisions at which any exit that
    reaches its threshold is wrong: an upper bound for every choice of exits. B: 1 if there is such a decision, for one
    exit that the text differs."""
    result = np.empty((len(records), len(thresholds)))
    for row, one in enumerate(records):
        is_error = ((one.scores[None] >= thresholds[:, None]) & one.is_wrong[None]).any(2)  # [points, T]
        result[row] = is_error.any(1) if risk == "B" else is_error.mean(1)
    return result


def p_value(of_prompts: np.ndarray, alpha: float, risk: Risk, seed: int) -> float:
    """Of "the risk is above alpha". of_prompts: [prompts] losses."""
    if risk == "B":
        return binomial_p_value(int(of_prompts.sum()), len(of_prompts), alpha)
    return float(betting_p_value(of_prompts, alpha, seed))


@dataclass(frozen=True)
class LineTest:
    """What fixed-sequence testing found."""

    p_values: tuple[float, ...]
    """Of the points that were tested: the last one may have failed."""
    risks: tuple[float, ...]
    """Mean losses."""
    chosen: int | None
    """The last point that passed; None: the safest one failed."""


def run_line_test(
    losses_of: Callable[[int], np.ndarray], num_points: int, *, alpha: float, delta: float, risk: Risk, seed: int
) -> LineTest:
    """losses_of: [prompts] of a point; asked for one point after the other until one fails."""
    p_values, risks = [], []
    for point in range(num_points):
        of_prompts = losses_of(point)
        p_values.append(p_value(of_prompts, alpha, risk, seed))
        risks.append(float(of_prompts.mean()))
        if p_values[-1] > delta:
            break
    return LineTest(tuple(p_values), tuple(risks), fixed_sequence(p_values, delta))


def first_exits(record: PromptRecord, thresholds: np.ndarray) -> np.ndarray:
    """[T]: index of the exit that early exit would take; the number of exits where none reaches its threshold.

    thresholds: [exits]"""
    reaches = np.column_stack([record.scores >= thresholds, np.ones(len(record.tokens), bool)])
    first: np.ndarray = reaches.argmax(1)
    return first


def exit_shares(records: Sequence[PromptRecord], thresholds: np.ndarray) -> np.ndarray:
    """[exits + 1]: share of decisions along the full model's answers that each exit, and the final head, would give."""
    taken = np.concatenate([first_exits(one, thresholds) for one in records])
    return np.bincount(taken, minlength=len(thresholds) + 1) / len(taken)


def layers_saved(records: Sequence[PromptRecord], thresholds: np.ndarray, savings: Sequence[float]) -> float:
    """Share of the layers that do not run along the full model's answers. thresholds: [exits]; savings: as of
    `ThresholdLine.tuned`"""
    return float(exit_shares(records, thresholds)[:-1] @ np.asarray(savings))
