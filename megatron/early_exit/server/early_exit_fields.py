"""Early exit in request and response bodies, the same in every API that has fields for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, Field

from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import (
    LONGEST_DRAFT,
    DraftSourceChoice,
    ExitScore,
    GenerationParams,
    Mode,
    Speculation,
)
from megatron.early_exit.inference.results import GeneratedToken, RequestResult
from megatron.early_exit.server.answer_fields import computed
from megatron.early_exit.server.request_fields import RequestBody, otherwise

_MAX_EXITS = 1024
_Threshold = Annotated[float, Field(ge=0, le=1)]
LevelText = Annotated[str, Field(pattern=r"^certified:0?\.[0-9]{1,12}$")]
"""In place of thresholds."""
_Layer = Annotated[int, Field(ge=0, le=2**31 - 1)]

_FIELDS_OF_MODES: dict[Mode, tuple[str, ...]] = {
    "early_exit": ("exit_thresholds", "exit_layers", "max_deferred", "plan_exits", "exit_score"),
    "self_speculative": ("draft_source", "draft_exit", "draft_length", "draft_min_confidence", "speculation"),
}


class EarlyExitFields(RequestBody):
    """Settings of early exit. What a request leaves out is as the server was told at its start; but fields of one mode
    imply it. Where the mode is given, fields of other ones have no effect."""

    mode: Mode | None = None
    """full: all layers for every token. early_exit: take a token from the first exit that is confident.
    self_speculative: tokens are drafted, all layers verify them."""
    exit_thresholds: Annotated[
        _Threshold | Annotated[list[_Threshold], Field(min_length=1, max_length=_MAX_EXITS)] | LevelText | None,
        otherwise("it must be a number from 0 to 1, a list of them, one for each exit, or a level as certified:0.99"),
    ] = None
    """early_exit: take an exit from this probability of its best token on; one for all exits, or one for each. Or a
    certified level, as in certified:0.99, with the thresholds of its certificate: temperature, max_tokens and the like
    are then, where they are left out, those of the certified answers."""
    exit_layers: Annotated[list[_Layer], Field(max_length=_MAX_EXITS)] | None = None
    """early_exit: exits that may be taken, by the numbers of their layers; empty: all whose use is not to draft
    alone."""
    max_deferred: Annotated[int, Field(ge=0)] | None = None
    """early_exit: tokens whose remaining layers may wait."""
    plan_exits: bool | None = None
    """early_exit: only exits that pay on this machine; needs a calibration. Left out: where a certified level is asked
    for."""
    exit_score: ExitScore | None = None
    """early_exit: what thresholds are compared with. head: the probability of the best token. probe: what a small
    network says before the exit's head is evaluated; the model must have probes. Left out: head, and with a certified
    level what its certificate was made with."""
    draft_source: DraftSourceChoice | None = None
    """self_speculative: an exit drafts; or ngram: what followed the last tokens where they stood before, in the prompt
    or the answer; or both: whichever promises more."""
    draft_exit: _Layer | None = None
    """self_speculative: the exit that drafts; left out: the one that promises most, of those whose use is
    not to leave alone."""
    draft_length: Annotated[int, Field(ge=1, le=LONGEST_DRAFT)] | None = None
    """self_speculative: tokens to draft at once; left out: it adapts."""
    draft_min_confidence: _Threshold | None = None
    """self_speculative: an exit's draft ends with a token of less confidence; left out: where it does not pay."""
    speculation: Speculation | None = None
    """self_speculative, over pipeline stages: how drafts are verified."""
    return_exit_details: bool | None = None
    """Say of each token which head gave it and how confident it was."""

    def with_exits(self, params: GenerationParams) -> GenerationParams:
        """`params` with what this request sets. Raises ValueError."""
        given = self._given
        # Of what drafts the request's word holds, whatever the default says.
        if self.draft_source == "ngram" and self.draft_exit is None:
            given["draft_exit"] = None
        elif self.draft_source is None and self.draft_exit is not None and params.draft_source == "ngram":
            given["draft_source"] = "exit"
        return replace(params, mode=self.mode_or(params.mode), **given)

    def mode_or(self, default: Mode) -> Mode:
        """The mode that is given, else the one that the given fields imply, but for values that ask for nothing, else
        the default. Raises ValueError if fields of several modes are given."""
        if self.mode is not None:
            return self.mode
        asks = {name for name, value in self._given.items() if value is not False and value != []}
        modes = [mode for mode, names in _FIELDS_OF_MODES.items() if not asks.isdisjoint(names)]
        if len(modes) > 1:
            names = ", ".join(sorted(asks))
            raise ValueError(f"mode is left out, and {names} belong to different ones; say which is meant")
        return modes[0] if modes else default

    @property
    def _given(self) -> dict[str, Any]:
        names = [name for names in _FIELDS_OF_MODES.values() for name in names]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class TokenExit(BaseModel):
    """Where one token came from."""

    text: str
    """What it adds to the text; all of them together are the text of the answer."""
    token_id: int
    exit_layer: int
    """The number of layers for the final head."""
    is_final: bool
    """Whether all layers gave or verified it."""
    is_draft: bool
    """Whether it was drafted, by an exit or from earlier text, and all layers accepted it."""
    confidence: float
    """Largest probability of the head that gave it."""


class EarlyExitUsage(BaseModel):
    """What early exit did for the answers to a request."""

    mode: Mode
    certified: float | None
    """The level that was promised: the share of tokens, averaged over prompts, that are the full model's."""
    layers_saved: float
    """Share of the full model's layer computations that was not run."""
    runs_saved: float
    """Share of the full model's passes over layers that was not needed: deferred rows run together."""
    tokens_by_exit: dict[str, int]
    """By the layer of the exit; `final` for the final head."""
    drafted: int
    accepted: int
    ngram_drafted: int
    """Of the drafted tokens, those from earlier text."""
    ngram_accepted: int


def certified_or_full(
    exits: GenerationParams,
    is_asked: bool,
    checks: RequestChecks,
    settings: Callable[[GenerationParams, Certificate | None], GenerationParams],
) -> GenerationParams:
    """The settings of a request whose mode and exits are those of `exits`. A promise that it asks for must cover it;
    one that it gets by default holds for requests that it covers, and the full model answers the others.

    is_asked: whether the request names the thresholds itself. settings: all of its settings, by its exits, and by the
    certificate for what it leaves out. Raises ValueError."""
    if exits.certified_level is None:
        return settings(exits, None)
    try:
        params = settings(exits, checks.certificate(exits))
        checks.thresholds(params)
    except ValueError:
        if is_asked:
            raise
        return settings(replace(exits, mode="full"), None)
    return params


def exit_details(pieces: Sequence[str], tokens: Sequence[GeneratedToken]) -> list[TokenExit]:
    """Of each token."""
    return [
        TokenExit(
            text=piece, token_id=token.token, exit_layer=token.exit_layer, is_final=token.is_final,
            is_draft=token.is_draft, confidence=computed(token.confidence),
        )
        for piece, token in zip(pieces, tokens, strict=True)
    ]  # fmt: skip


def early_exit_usage(params: GenerationParams, results: Sequence[RequestResult]) -> EarlyExitUsage:
    """Of all answers together."""
    statistics = [result.statistics for result in results]
    full = sum(one.full_layer_passes for one in statistics)
    saved = lambda run: 1.0 - run / full if full else 0.0
    tokens: Counter[str] = Counter()
    for result in results:
        for usage in result.usage:
            tokens["final" if usage.is_final else str(usage.exit_layer)] += usage.tokens
    return EarlyExitUsage(
        mode=params.mode,
        certified=params.certified_level,
        layers_saved=saved(sum(one.layer_passes for one in statistics)),
        runs_saved=saved(sum(one.layer_runs for one in statistics)),
        tokens_by_exit=dict(tokens),
        drafted=sum(one.drafted for one in statistics),
        accepted=sum(one.accepted for one in statistics),
        ngram_drafted=sum(one.ngram_drafted for one in statistics),
        ngram_accepted=sum(one.ngram_accepted for one in statistics),
    )
