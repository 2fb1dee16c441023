"""Which exits are worth evaluating: it costs a head, and pays only if tokens leave there often enough."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.params import ExitScore
from megatron.early_exit.inference.protocol import ExitThreshold, WorkerDescription

# A plan must promise this share of the full model's time, so that errors of its figures do not cost more than it wins.
_MIN_GAIN = 0.03
# Beyond this many exits not all subsets are tried.
_MAX_EXITS = 10


def select_exits(
    scores: np.ndarray,
    thresholds: Sequence[float],
    depths: Sequence[int],
    num_layers: int,
    costs: StepCosts,
    num_requests: int = 1,
    score: ExitScore = "head",
    all_or_none: bool = False,
) -> tuple[int, ...]:
    """Indices of the exits to evaluate, or none if the full model is as fast.

    scores: [decisions, exits], from records; thresholds, depths: of each exit, in the order of layers; num_requests:
    rows that decode together; score: what `scores` are. All subsets are tried on the recorded decisions: cheap, and
    right however the scores of different exits depend on each other. all_or_none: all exits are the only subset."""
    exits = range(len(depths))
    if not depths:  # a certificate may leave out all exits that a request names
        return ()
    if len(depths) > _MAX_EXITS:
        raise ValueError(f"{len(depths)} exits are too many to plan; name up to {_MAX_EXITS} of them")
    would_leave = scores >= np.asarray(thresholds, dtype=scores.dtype)  # [tokens, exits]
    seconds = lambda enabled: step_seconds(enabled, would_leave, depths, num_layers, costs, num_requests, score)
    sizes = [len(depths)] if all_or_none else range(1, len(depths) + 1)
    best = min(itertools.chain.from_iterable(itertools.combinations(exits, size) for size in sizes), key=seconds)
    gain = 1.0 - seconds(best) / seconds(())
    return best if gain >= _MIN_GAIN else ()


def step_seconds(
    enabled: Sequence[int],
    would_leave: np.ndarray,
    depths: Sequence[int],
    num_layers: int,
    costs: StepCosts,
    num_requests: int = 1,
    score: ExitScore = "head",
) -> float:
    """Expected time of one step in which `num_requests` rows decode and may leave at the exits `enabled`.

    Rows that left run later, together with the next row of their request that goes on: over time every layer sees as
    many rows as without exits, but in fewer runs. With a share q of tokens going past an exit, a step runs the layers
    behind it with probability 1 - (1 - q)^n, and then with n / that many rows."""
    seconds, depth, goes_on = costs.batch(num_requests), 0, 1.0
    staying = np.ones(len(would_leave), dtype=bool)
    for index in (*enabled, None):
        runs = 1.0 - (1.0 - goes_on) ** num_requests
        if runs <= 0.0:
            return seconds
        until = num_layers if index is None else depths[index]
        evaluated = num_requests * goes_on / runs  # rows that have not left, in a step in which there are some
        calls = evaluated * (1.0 - _share_beside_equals(goes_on))
        seconds += (until - depth) * runs * costs.layer(num_requests / runs, evaluated, calls)
        if index is None:
            return seconds + runs * costs.final_head(evaluated)
        seconds += runs * (costs.probe(evaluated) if score == "probe" else costs.approximate_head(evaluated))
        leaves = staying & would_leave[:, index]
        if score == "probe" or costs.has_approximate_heads:
            # The exit's own head gives the token.
            left = num_requests * leaves.mean()
            seconds += min(left, 1.0) * costs.exit_head(max(left, 1.0))
        staying &= ~leaves
        depth, goes_on = until, staying.mean()
        # Where some go on, the batch changes if others leave, or if rows join that left in an earlier step.
        changes = 1.0 - (1.0 - leaves.mean()) ** num_requests
        seconds += (1.0 - (1.0 - goes_on) ** num_requests) * changes * costs.batch(num_requests * goes_on)
    return seconds


def _share_beside_equals(goes_on: float) -> float:
    """How often the slot behind one that goes on does so too, with as many rows: these attend in one call. With k rows
    there is one that goes on and k - 1 that left before it, of which a share `goes_on` (1 - `goes_on`)^(k - 1) has."""
    return goes_on * goes_on / (2.0 - goes_on)


_Question = tuple[tuple[ExitThreshold, ...], int, StepCosts, bool]
"""Candidates, number of requests, costs, whether it is all or none."""


class ExitSelector:
    """Selects exits by what was recorded of them; selections that were made are kept."""

    def __init__(self, model: WorkerDescription, scores: Mapping[ExitScore, np.ndarray]) -> None:
        """scores: [decisions, exits that tokens may leave at] of each kind, from records"""
        self._model, self._scores = model, scores
        leaving = (index for index, one in enumerate(model.exits) if one.may_leave)
        self._columns = {index: column for column, index in enumerate(leaving)}
        self._selected: dict[_Question, tuple[ExitThreshold, ...]] = {}

    def select(
        self,
        candidates: tuple[ExitThreshold, ...],
        num_requests: int,
        costs: StepCosts,
        all_or_none: bool = False,
    ) -> tuple[ExitThreshold, ...]:
        """Those of `candidates`, of one kind of score, that pay when so many requests run, possibly none. The model is
        calibrated (`RequestChecks`)."""
        if not candidates:
            return ()
        score = candidates[0].score
        assert score in self._scores, "a request that plans exits was not checked"
        key = (candidates, num_requests, costs, all_or_none)
        if key not in self._selected:
            indices = select_exits(
                self._scores[score][:, [self._columns[one.exit] for one in candidates]],
                [one.threshold for one in candidates],
                [self._model.exits[one.exit].depth for one in candidates],
                self._model.num_layers,
                costs,
                num_requests,
                score,
                all_or_none,
            )
            self._selected[key] = tuple(candidates[index] for index in indices)
        return self._selected[key]
