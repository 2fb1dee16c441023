"""What a layer and a head cost, by the number of rows; measured by a worker (`worker/cost_measurement.py`)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.inference.protocol import WorkerDescription

ROW_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class StepCosts:
    """Seconds, each measured for `ROW_COUNTS` rows of one slot. Exits: of the first; zeros if the model has none."""

    layer_seconds: tuple[float, ...]
    approximate_seconds: tuple[float, ...]
    """What is evaluated for every row: the approximate head if there is one, else the exit's own."""
    exit_head_seconds: tuple[float, ...]
    final_head_seconds: tuple[float, ...]
    batch_seconds: float = 0.0
    """To set up a batch of rows: once a step, and again where rows leave."""
    has_approximate_heads: bool = False
    """Whether the exit's own head is needed as well when a token leaves."""
    probe_seconds: tuple[float, ...] = (0.0,) * len(ROW_COUNTS)
    """Of the exit's probe, behind which a row that leaves needs the exit's own head."""
    exit_saved_seconds: tuple[float, ...] = (0.0,) * len(ROW_COUNTS)
    """Of the exit's own head, what its certified form saves where nothing but tokens is needed."""
    final_saved_seconds: tuple[float, ...] = (0.0,) * len(ROW_COUNTS)
    """Of the final head."""

    @property
    def balanced_rows(self) -> float:
        """Rows that a layer computes in the time in which it reads its weights: alpha / beta, if n rows take it
        alpha + beta n. Infinite if rows take no time that was seen."""
        first, last = self.layer_seconds[0], self.layer_seconds[-1]
        of_row = (last - first) / (ROW_COUNTS[-1] - ROW_COUNTS[0])
        return max(first - of_row, 0.0) / of_row if of_row > 0 else math.inf

    def for_tokens(self, *, of_drafts: bool, of_probed: bool, of_final: bool) -> StepCosts:
        """The same where exits that draft, exits behind probes, or the final head need to give nothing but greedy
        tokens."""
        less = lambda seconds, saved, applies: tuple(
            max(one - one_saved, 0.0) if applies else one for one, one_saved in zip(seconds, saved, strict=True)
        )
        return replace(
            self,
            approximate_seconds=less(
                self.approximate_seconds, self.exit_saved_seconds, of_drafts and not self.has_approximate_heads
            ),
            exit_head_seconds=less(self.exit_head_seconds, self.exit_saved_seconds, of_probed),
            final_head_seconds=less(self.final_head_seconds, self.final_saved_seconds, of_final),
        )

    def layer(self, rows: float) -> float:
        return _interpolate(self.layer_seconds, rows)

    def approximate_head(self, rows: float) -> float:
        return _interpolate(self.approximate_seconds, rows)

    def exit_head(self, rows: float) -> float:
        return _interpolate(self.exit_head_seconds, rows)

    def probe(self, rows: float) -> float:
        return _interpolate(self.probe_seconds, rows)

    def final_head(self, rows: float) -> float:
        return _interpolate(self.final_head_seconds, rows)


def _interpolate(seconds: tuple[float, ...], rows: float) -> float:
    """Between the measured row counts, and proportional beyond the last."""
    if rows <= ROW_COUNTS[0]:
        return seconds[0]
    if rows >= ROW_COUNTS[-1]:
        return seconds[-1] * rows / ROW_COUNTS[-1]
    above = bisect_left(ROW_COUNTS, rows)
    if ROW_COUNTS[above] == rows:
        return seconds[above]
    low, high = ROW_COUNTS[above - 1], ROW_COUNTS[above]
    share = (rows - low) / (high - low)
    return seconds[above - 1] * (1 - share) + seconds[above] * share


def merged_costs(stages: Sequence[StepCosts], layers_per_stage: Sequence[int]) -> StepCosts:
    """Costs of a model from those of its stages, which have zeros for what they do not have."""
    num_layers = sum(layers_per_stage)
    layers = [
        sum(count * seconds for count, seconds in zip(layers_per_stage, of_stages, strict=True)) / num_layers
        for of_stages in zip(*(one.layer_seconds for one in stages), strict=True)
    ]
    first = lambda name: next(filter(any, (getattr(one, name) for one in stages)), (0.0,) * len(ROW_COUNTS))
    return StepCosts(
        tuple(layers),
        first("approximate_seconds"),
        first("exit_head_seconds"),
        first("final_head_seconds"),
        max(one.batch_seconds for one in stages),
        any(one.has_approximate_heads for one in stages),
        first("probe_seconds"),
        first("exit_saved_seconds"),
        first("final_saved_seconds"),
    )


_PROBE_WIDTH = 64.0
"""About as many numbers does a probe read for each channel of a hidden state."""


def guessed_costs(model: WorkerDescription) -> StepCosts:
    """Costs in the right proportion where a layer and a head cost what they read, however many rows they have."""
    layer, head = 12.0 * model.hidden_size, float(model.vocab_size)
    same = lambda cost: (cost,) * len(ROW_COUNTS)
    return StepCosts(same(layer), same(head), same(head), same(head), probe_seconds=same(_PROBE_WIDTH))
