"""What runs in the idle time of pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron.early_exit.config.ranges import Bound, NonNegativeInt

USUAL_BACKWARD_FORWARD_RATIO = 2.0
_RATIO = Bound("above 0 and below 100; 2 is usual, 3 with full recomputation", lambda ratio: 0 < ratio < 100)

ITERATIONS_UNTIL_MEASURED = 5
"""Iterations until stages are measured, and until a profile is written of the plan that follows."""


@dataclass(frozen=True)
class PipelineConfig:
    """Plans for the pipeline beyond core's schedules (docs/pipeline_plans.md)."""

    exits_in_bubbles: bool = False
    """Run exits while their stage waits for a gradient, instead of in the backward pass."""

    fill_explicit_bubbles: bool = False
    """Fill the idle time of the pipeline's warmup and cooldown with further microbatches, which pass through some
    stages only. Every parameter's gradient stays unbiased and varies less; the iteration takes no longer."""

    num_fill_warmup_microbatches: NonNegativeInt | None = None
    """With --fill-explicit-bubbles: microbatches that fill the warmup. Default: as many as cost no time."""

    num_fill_cooldown_microbatches: NonNegativeInt | None = None
    """With --fill-explicit-bubbles: microbatches that fill the cooldown. Default: as many as cost no time."""

    backward_forward_ratio: Annotated[float, _RATIO] | None = None
    """With --fill-explicit-bubbles: time of a stage's backward over that of its forward, equal on all stages. Default:
    every stage is measured in the first five iterations, which have no fill; 2 if a number of microbatches is given."""

    profile_pipeline: str | None = None
    """Picture (.png, .svg or .pdf) of what every stage did in an iteration, beside what its plan predicts; the times
    themselves go to a .json file beside it."""

    @property
    def is_planned(self) -> bool:
        """Whether training follows a plan of ours instead of core's schedule."""
        return self.exits_in_bubbles or self.fill_explicit_bubbles or self.profile_pipeline is not None

    @property
    def given_ratio(self) -> float | None:
        """Backward over forward, as filling takes it; None: stages are measured. A number of microbatches that was
        asked for is checked, or refused, before training, so it goes by the usual ratio if none is given."""
        asked = (self.num_fill_warmup_microbatches, self.num_fill_cooldown_microbatches)
        if self.backward_forward_ratio is None and asked != (None, None):
            return USUAL_BACKWARD_FORWARD_RATIO
        return self.backward_forward_ratio

    @property
    def fills_by_measure(self) -> bool:
        """Whether how much fills the bubbles depends on measured stages."""
        return self.fill_explicit_bubbles and self.given_ratio is None

    @property
    def measures_stages(self) -> bool:
        """Whether the first iterations are timed for the plan of the later ones."""
        return self.fills_by_measure or self.exits_in_bubbles
