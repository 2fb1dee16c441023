"""What a request gives back: tokens with where they came from, and what they cost. Plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["eod", "stop", "max_tokens", "max_positions", "cancelled", "error"]
"""eod: one of the model's ends (of a document, of a turn); stop: a stop token or string; max_positions: the model takes
no longer sequence."""


DraftSource = Literal["exit", "ngram"]
"""What drafted a token: an exit, or earlier text in which the last tokens stood before."""


@dataclass(frozen=True)
class HeadPrediction:
    """What one head predicts for the next token."""

    exit_layer: int | None
    """Layer number that names the exit; None for the final head."""
    token: int
    """Its most probable token."""
    confidence: float | None
    """What the exit's threshold was compared with: that token's probability, or with `exit_score` "probe" the output of
    the exit's probe. None where it was not computed (`GenerationParams.log_probs`)."""
    is_approximate: bool = False
    """Whether an approximate head (over a shortlist) predicted it; the exit's own was not evaluated."""


@dataclass(frozen=True)
class GeneratedToken:
    """One token and where it came from."""

    token: int
    exit_layer: int
    """Layer number that names the exit; the number of layers for the final head."""
    is_final: bool
    """Whether the final head produced or verified it (an exit may be named after the last layer as well)."""
    confidence: float | None
    """Largest probability of the head that produced it; None where it was not computed (`GenerationParams.log_probs`).
    """
    log_prob: float | None
    """Log-probability (nats) of the token in that head's distribution, before penalty, temperature, top-k and top-p;
    None as well."""
    predictions: tuple[HeadPrediction, ...] = ()
    """Of all heads evaluated for this token, in order; the last one produced it."""
    caught_up: bool = False
    """Whether the cap on deferred rows ran this row, and those deferred before it, through the remaining layers; the
    token is still the exit's."""
    is_draft: bool = False
    """Whether the token was drafted, by an exit or from earlier text, and all layers accepted it."""
    top_log_probs: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of that head's most probable tokens."""


@dataclass(frozen=True)
class PromptToken:
    """A token of the prompt, in the final head's distribution."""

    token: int
    log_prob: float | None
    """None for the first token."""
    top_log_probs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Statistics:
    """What one request cost."""

    layer_passes: int
    """(row, layer) pairs computed after the prefill: rows that were deferred and run later count, so do exit blocks and
    drafts that were rejected. Of pipeline stages those that had been reported when the last token was there; the rows
    of tokens that exited go on through all stages."""
    full_layer_passes: int
    """The same of the full model: layers times generated tokens, but for one that came out of the prefill."""
    layer_runs: int
    """Times that a layer (or an exit block) ran rows of this request after the prefill. A run serves all deferred
    rows that it reaches and reads the weights once. The full model needs `full_layer_passes` of them. Of pipeline
    stages those that a token waited for; with speculation across stages, for an accepted draft those up to its exit."""
    drafted: int
    """Tokens that were drafted for verification."""
    accepted: int
    """Drafted tokens that all layers accepted."""
    queue_seconds: float
    """From the request's arrival until it got a slot."""
    first_token_seconds: float | None
    """From the request's arrival until its first token; None if it has none."""
    decode_seconds: float
    """From the first token until the last."""
    ngram_drafted: int = 0
    """Of the drafted tokens, those from earlier text; exits made the others."""
    ngram_accepted: int = 0

    @property
    def layers_saved(self) -> float:
        """Share of the full model's layer passes that was not run; negative if blocks or drafts cost more than that. 0
        if it runs none, as for an answer of one token, which comes with the prompt."""
        return self._share_saved(self.layer_passes)

    @property
    def runs_saved(self) -> float:
        """Share of the full model's layer runs that was not needed; 0 if it needs none."""
        return self._share_saved(self.layer_runs)

    def _share_saved(self, run: int) -> float:
        return 1.0 - run / self.full_layer_passes if self.full_layer_passes else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that was accepted; None if none was drafted."""
        return self.accepted / self.drafted if self.drafted else None


@dataclass(frozen=True)
class ExitUsage:
    """How often a head produced the token."""

    exit_layer: int
    is_final: bool
    tokens: int
    mean_confidence: float | None
    """Of those tokens whose confidence was computed; None if there are none."""


@dataclass(frozen=True)
class RequestResult:
    """A finished request."""

    request_id: int
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason
    statistics: Statistics
    exit_layers: tuple[int, ...]
    """Layer numbers of the exits that it may have evaluated, ascending."""
    num_layers: int
    prompt: tuple[PromptToken, ...] = ()
    """With echo: the prompt's tokens."""
    error: str | None = None
    """With finish reason 'error': what went wrong."""

    @property
    def token_ids(self) -> list[int]:
        """Generated ids, the one that stopped included."""
        return [generated.token for generated in self.tokens]

    def stopped_after(self, num_tokens: int) -> RequestResult:
        """The result if the answer stops after so many of its tokens; those beyond are not counted."""
        tokens = self.tokens[:num_tokens]
        num_passes = self.statistics.full_layer_passes - (len(self.tokens) - len(tokens)) * self.num_layers
        return replace(
            self, tokens=tokens, finish_reason="stop", error=None,
            statistics=replace(self.statistics, full_layer_passes=num_passes),
        )  # fmt: skip

    @property
    def usage(self) -> tuple[ExitUsage, ...]:
        """Enabled exits in the order of layers, then the final head. Their tokens add up to the generated ones."""
        usage = []
        for layer, is_final in [*((layer, False) for layer in self.exit_layers), (self.num_layers, True)]:
            confidences = [t.confidence for t in self.tokens if (t.exit_layer, t.is_final) == (layer, is_final)]
            known = [confidence for confidence in confidences if confidence is not None]
            mean = math.fsum(known) / len(known) if known else None
            usage.append(ExitUsage(layer, is_final, len(confidences), mean))
        return tuple(usage)


@dataclass(frozen=True)
class ScoredHead:
    """What one head predicts at each scored position p, from `score_from` to the last: the token at p + 1. (Without
    `score_last`, to the last but one.)"""

    exit_layer: int | None
    """Layer number that names the exit; None for the final head."""
    tokens: tuple[int, ...]
    """Its most probable token."""
    confidences: tuple[float, ...]
    """That token's probability."""
    log_probs: tuple[float, ...]
    """Log-probability (nats) of the given next token; one fewer than positions if the last one is scored, as none is
    given behind it."""
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """(id, log-probability) of the most probable tokens; empty if none are wanted."""
    logits: np.ndarray | None = field(default=None, compare=False)
    """[positions, vocabulary], fp32; None if not wanted."""
    states: np.ndarray | None = field(default=None, compare=False)
    """[positions, h], fp32: what an exit's head reads; None if not wanted, and of the final head."""


@dataclass(frozen=True)
class ScoreResult:
    """The predictions of one request for scores."""

    request_id: int | None
    """None if the prompt was refused."""
    heads: tuple[ScoredHead, ...]
    """In the order of layers, the final head last; empty with an error."""
    error: str | None = None
    """What went wrong."""

    is_finished: ClassVar[bool] = True
    """Unlike outputs, scores come all at once."""

    def check(self) -> ScoreResult:
        """The result itself. Raises ValueError if there is an error."""
        if self.error is not None:
            raise ValueError(f"tokens could not be scored: {self.error}")
        return self
