"""What the report needs of the results of each kind of document. Keys beside these are left alone; layers are counted
from 1.

A key without a default must be there; numbers that are unknown are None."""

from __future__ import annotations

from typing import Any

import msgspec

Number = float | None
Interval = tuple[Number, Number] | None
"""Lower and upper bound, of 95% confidence."""


def known_interval(interval: Interval) -> tuple[float, float] | None:
    """None unless both bounds are known."""
    if interval is None:
        return None
    low, high = interval
    return None if low is None or high is None else (low, high)


class Head(msgspec.Struct):
    """An exit, or the final head, on a text."""

    layer: int
    is_final: bool
    loss: Number
    """Nats per token."""
    perplexity: Number
    agreement: Number
    agreement_interval: Interval
    ece: Number
    auroc: Number
    cost_in_layers: Number
    accuracy: Number = None
    confidence: Number = None


class ReliabilityBin(msgspec.Struct):
    """Decisions with scores in one part of [0, 1]."""

    score: Number
    agreement: Number
    count: int


class OtherExits(msgspec.Struct):
    """Of another checkpoint, on the same text."""

    checkpoint: str
    heads: list[Head]


class Exits(msgspec.Struct):
    """Of the command `exits`."""

    tokens: int
    heads: list[Head]
    reliability: dict[str, list[ReliabilityBin]]
    """By layer."""
    by_domain: dict[str, list[Head]] = {}
    compare: list[OtherExits] = []


class ScoreQuality(msgspec.Struct):
    """How well a score tells decisions that agree with the final head from others."""

    auroc: Number
    ece: Number
    leaving: dict[str, Number]
    """Share of the decisions that leave where a share of them, the key, may differ."""


class ProbedExit(msgspec.Struct):
    """An exit whose probe was trained."""

    layer: int
    agreement: Number
    probe: ScoreQuality
    head: ScoreQuality


class Probes(msgspec.Struct):
    """Of the command `probes`."""

    exits: list[ProbedExit]
    decisions: dict[str, int | None] = {}


class PathPoint(msgspec.Struct):
    """One point of the grid along which thresholds were tested, from safe to risky."""

    budget: Number
    p_value: Number
    risk: Number
    thresholds: dict[str, Number] | None = None
    """By layer; None: not taken."""


class FreeRunning(msgspec.Struct):
    """What early exit itself generates; p-value and risk are None if that was measured and not certified."""

    p_value: Number
    risk: Number
    is_certified: bool | None = None
    test_risk: Number = None
    test_risk_interval: Interval = None


class Certificate(msgspec.Struct):
    """A promise, or why it was refused."""

    level: float
    delta: float
    risk: str
    status: str
    reason: str | None
    thresholds: dict[str, float] | None
    """By layer."""
    prompts: dict[str, int | None]
    """Of each split."""
    p_value: Number
    calibration_risk: Number
    test_risk: Number
    test_risk_interval: Interval
    free_running: FreeRunning | None
    expected_runs_saved: Number = None
    path: list[PathPoint] = []
    exit_score: str = "head"

    @property
    def is_certified(self) -> bool:
        return self.status == "certified"

    @property
    def delta_of_test(self) -> float:
        """Two tests share delta where some prompts are left for what early exit itself generates."""
        return self.delta / 2 if self.prompts.get("free_running") else self.delta


class CoveragePoint(msgspec.Struct):
    """What a threshold covers and costs."""

    threshold: Number
    coverage: Number
    risk: Number
    oracle_risk: Number = None


class Shares(msgspec.Struct):
    """Of the decisions at one position of the answers."""

    position: int
    shares: dict[str, Number]
    """By layer, or "final"."""


class AnswerText(msgspec.Struct):
    """How repetitive the full model's answers are."""

    loop_rate: Number
    distinct_1: Number
    distinct_2: Number


class Rounding(msgspec.Struct):
    """What the full model alone changes against itself in batches."""

    batch_1_vs_n: Number
    decisions: int | None = None


class CalibrationCost(msgspec.Struct):
    """Seconds."""

    record_seconds: Number
    rounding_seconds: Number = None
    level_seconds: dict[str, Number] = {}
    test_seconds: dict[str, Number] = {}


class Calibration(msgspec.Struct):
    """Of the command `calibrate`."""

    certificates: list[Certificate]
    coverage_risk: dict[str, list[CoveragePoint]] = {}
    exit_share_by_position: list[Shares] = []
    text: AnswerText | None = None
    rounding: Rounding | None = None
    cost: CalibrationCost | None = None


class Row(msgspec.Struct):
    """One way to decode at one batch size."""

    name: str
    mode: str
    batch: int
    tokens_per_second: Number
    speedup: Number
    speedup_interval: Interval
    layer_run_speedup: Number = None
    agreement: Number = None
    """Share of tokens that the full model would have taken at their place."""
    agreement_interval: Interval = None
    thresholds: Any = None
    level: Number = None
    """Of the certificate whose thresholds these are."""
    draft_source: str | None = None
    draft_exit: int | None = None
    draft_length: int | str | None = None
    layers_saved: Number = None
    runs_saved: Number = None
    identical_answers: Number = None
    """Share."""
    identical_interval: Interval = None
    acceptance: Number = None
    ngram_share: Number = None
    """Of the accepted drafts, those from earlier text."""
    perplexity: Number = None
    loop_rate: Number = None
    first_token_seconds: Number = None
    seconds_per_token: Number = None
    exit_shares: dict[str, Number] | None = None
    is_baseline: bool = False


class StepPart(msgspec.Struct):
    """Of a step of the full model."""

    part: str
    seconds: Number
    batch: int = 1


class Speed(msgspec.Struct):
    """Of the commands `sweep` and `benchmark`."""

    rows: list[Row]
    transformers: Row | None = None
    beside: list[Row] = []
    """Ways that are not ours, whose speed alone is compared; `transformers` may be one of them."""
    step: list[StepPart] = []

    @property
    def others(self) -> list[Row]:
        return self.beside or ([self.transformers] if self.transformers else [])


class Difference(msgspec.Struct):
    """Where an answer first leaves the full model's."""

    prompt: Any
    position: int
    expected: Any
    got: Any
    margin: Number
    """Log-probability (nats) by which the full model prefers its best token to its second there."""
    gap: Number = None
    """The same between the token that was expected and the one that came."""


class Comparison(msgspec.Struct):
    """One way to decode against the full model's answers."""

    name: str
    mode: str
    prompts: int
    identical: int
    identical_interval: Interval
    tokens: int | None
    errors: int | None = None
    """Differences that rounding does not explain."""
    settings: Any = None
    first_differences: list[Difference] = []


class Correctness(msgspec.Struct):
    """Of the command `correctness`."""

    rows: list[Comparison]


class Score(msgspec.Struct):
    """Of a task in one mode."""

    value: Number
    stderr: Number = None


class Paired(msgspec.Struct):
    """A mode against the full model on the same items."""

    metric: str | None = None
    """Which is compared; None: all."""
    mcnemar_p: Number = None
    difference: Number = None
    interval: Interval = None


class Task(msgspec.Struct):
    """One task in all modes."""

    n: int | None
    metrics: dict[str, dict[str, Score]]
    """By metric and mode."""
    paired: dict[str, Paired] = {}


class Tasks(msgspec.Struct):
    """Of the command `tasks`."""

    tasks: dict[str, Task]
    modes: dict[str, Any] = {}
