"""What a calibration certifies, and how many prompts that takes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.early_exit.evaluation.certification import ThresholdLine
from megatron.early_exit.evaluation.statistics.learn_then_test import least_prompts
from megatron.early_exit.inference.certificates import Risk
from megatron.early_exit.inference.params import ExitScore


@dataclass(frozen=True)
class CalibrationSettings:
    """What is certified. Impossible values raise ValueError."""

    answer_tokens: int = 64
    ignore_eod: bool = False
    levels: tuple[float, ...] = (0.99,)
    delta: float = 0.05
    risk: Risk = "A-max"
    grid: tuple[float, ...] | None = None
    """Thresholds for all exits alike; None: those of the tuning split, with risks B and C `NAMED_GRID`."""
    with_free_running: bool = False
    rounding_prompts: int = 16
    seed: int = 1234
    exit_score: ExitScore = "head"
    """What thresholds are compared with."""

    def __post_init__(self) -> None:
        if self.answer_tokens < 1:
            raise ValueError(f"--answer-tokens is {self.answer_tokens}; it must be at least 1")
        for level in self.levels:
            if not 0.0 < level < 1.0:
                raise ValueError(f"--levels has {level:g}; a level lies between 0 and 1, as 0.99")
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"--delta is {self.delta:g}; it must lie between 0 and 1")
        if self.rounding_prompts < 0:
            raise ValueError(f"--rounding-prompts is {self.rounding_prompts}; it must be 0 or more")
        if self.grid is not None:
            ThresholdLine.named(self.grid, 1)

    @property
    def delta_of_test(self) -> float:
        """For each of the tests that a level needs."""
        return self.delta / 2 if self.with_free_running else self.delta

    def check_prompts(self, num_prompts: int) -> None:
        """Raise ValueError if a level could not be certified with so many prompts, whatever exits do."""
        if num_prompts < 10:
            raise ValueError(f"{num_prompts} prompts leave less than 2 to test on; give at least 10 (--prompts 10)")
        for level in self.levels:
            least = least_prompts(1.0 - level, self.delta_of_test)
            if _smallest_test(num_prompts, self) >= least:
                continue
            parts = 2 if self.with_free_running else 1
            needed = max(num_prompts, 5 * (parts * least - 2) // 3)  # three fifths of less cannot be enough
            while _smallest_test(needed, self) < least:
                needed += 1
            raise ValueError(
                f"{num_prompts} prompts cannot support level {level}: its test needs {least} prompts even if no "
                f"decision differs, and gets {_smallest_test(num_prompts, self)} of them; give "
                f"{needed - num_prompts} more (--prompts {needed}), or ask for a lower level"
            )


def _smallest_test(num_prompts: int, settings: CalibrationSettings) -> int:
    rest = num_prompts - 2 * (num_prompts // 5)  # as `Split.draw` has it
    return rest // 2 if settings.with_free_running else rest
