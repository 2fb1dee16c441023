"""What a layer and a head cost, by the number of rows; measured by a worker (`worker/cost_measurement.py`)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.inference.protocol import WorkerDescription

ROW_COUNTS = (1, 2, 4, 8, 16, 32)

MEASURED_SLOTS = ROW_COUNTS[-1]
"""A measurement writes to so many slots, or to all if there are fewer."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds, each measured for `ROW_COUNTS` rows of one slot. Exits: of the first; zeros if the model has none."""

    layer_seconds: tuple[float, ...]
    approximate_seconds: tuple[float, ...]
    """What is evaluated for every row: the approximate head if there is one, else the exit's own."""
    exit_head_seconds: tuple[float, ...]
    final_head_seconds: tuple[float, ...]
    batch_seconds: float = 0.0
    """What a step with one row takes beside layers and heads: to set up the batch, to report the token. Once a step,
    and again where rows leave."""
    row_seconds: float = 0.0
    """More of it with each further row."""
    slot_seconds: float = 0.0
    """More of a layer with each further slot that its rows are of: attention reads the keys of each."""
    call_seconds: float = 0.0
    """More of a layer with each further call of attention, where slots have unequal numbers of rows."""
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

    def layer(self, rows: float, slots: float = 1, calls: float = 1) -> float:
        """Of rows in so many slots, which attend in so many calls."""
        further = max(slots - 1, 0) * self.slot_seconds + max(calls - 1, 0) * self.call_seconds
        return _interpolate(self.layer_seconds, rows) + further

    def batch(self, rows: float) -> float:
        return self.batch_seconds + max(rows - 1, 0) * self.row_seconds

    def approximate_head(self, rows: float) -> float:
        return _interpolate(self.approximate_seconds, rows)

    def exit_head(self, rows: float) -> float:
        return _interpolate(self.exit_head_seconds, rows)

    def probe(self, rows: float) -> float:
        return _interpolate(self.probe_seconds, rows)

    def final_head(self, rows: float) -> float:
        return _interpolate(self.final_head_seconds, rows)


def _interpolate(seconds: tuple[float, ...], rows: float) -> float:
    """Between the measured row counts; beyond the last, each further row takes as long as those before it."""
    if rows <= ROW_COUNTS[0]:
        return seconds[0]
    if rows >= ROW_COUNTS[-1]:
        of_row = (seconds[-1] - seconds[-2]) / (ROW_COUNTS[-1] - ROW_COUNTS[-2])
        return seconds[-1] + max(of_row, 0.0) * (rows - ROW_COUNTS[-1])
    above = bisect_left(ROW_COUNTS, rows)
    if ROW_COUNTS[above] == rows:
        return seconds[above]
    low, high = ROW_COUNTS[above - 1], ROW_COUNTS[above]
    share = (rows - low) / (high - low)
    return seconds[above - 1] * (1 - share) + seconds[above] * share


def merged_costs(stages: Sequence[StepCosts], layers_per_stage: Sequence[int]) -> StepCosts:
    """Costs of a model from those of its stages, which have zeros for what they do not have."""
    num_layers = sum(layers_per_stage)
    mean = lambda of_stages: sum(
        count * value for count, value in zip(layers_per_stage, of_stages, strict=True)
    ) / num_layers  # fmt: skip
    mean_of = lambda name: mean([getattr(one, name) for one in stages])
    most = lambda name: max(getattr(one, name) for one in stages)
    first = lambda name: next(filter(any, (getattr(one, name) for one in stages)), (0.0,) * len(ROW_COUNTS))
    return StepCosts(
        layer_seconds=tuple(map(mean, zip(*(one.layer_seconds for one in stages), strict=True))),
        approximate_seconds=first("approximate_seconds"),
        exit_head_seconds=first("exit_head_seconds"),
        final_head_seconds=first("final_head_seconds"),
        batch_seconds=most("batch_seconds"),
        row_seconds=most("row_seconds"),
        slot_seconds=mean_of("slot_seconds"),
        call_seconds=mean_of("call_seconds"),
        has_approximate_heads=any(one.has_approximate_heads for one in stages),
        probe_seconds=first("probe_seconds"),
        exit_saved_seconds=first("exit_saved_seconds"),
        final_saved_seconds=first("final_saved_seconds"),
    )


_PROBE_WIDTH = 64.0
"""About as many numbers does a probe read for each channel of a hidden state."""


def guessed_costs(model: WorkerDescription) -> StepCosts:
    """Costs in the right proportion where a layer and a head cost what they read, however many rows they have."""
    layer, head = 12.0 * model.hidden_size, float(model.vocab_size)
    same = lambda cost: (cost,) * len(ROW_COUNTS)
    return StepCosts(same(layer), same(head), same(head), same(head), probe_seconds=same(_PROBE_WIDTH))
