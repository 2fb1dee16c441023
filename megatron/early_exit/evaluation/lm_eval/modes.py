"""Ways to decode, by the words that name them on a command line:

full                     all layers
early_exit:0.9           exits at this threshold; early_exit:0.9,0.8 names one for each exit
certified:0.99           exits at the thresholds that the model's certificate promises this level for
self_speculative         the first exit drafts; self_speculative:4 names the exit
exit:8                   the model ends behind layer 8: that exit gives every token and every likelihood
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.early_exit.inference.params import CertifiedThresholds, GenerationParams, ScoreParams

WORDS = "full, early_exit:THRESHOLD[,THRESHOLD...], certified:LEVEL, self_speculative[:EXIT], exit:EXIT"


@dataclass(frozen=True)
class DecodingMode:
    """How a model answers and scores. Exits are named by their layer numbers, counted from 1."""

    name: str
    """What results are filed under."""
    params: GenerationParams = field(default_factory=GenerationParams)
    """Settings of answers, but for lengths, stops and sampling."""
    exit_layer: int | None = None
    """The exit whose head gives all likelihoods; None: the final head."""

    @classmethod
    def parse(cls, words: str) -> DecodingMode:
        """Raises ValueError if they name no mode."""
        kind, _, value = words.partition(":")
        if kind not in _KINDS or (not value and kind not in ("full", "self_speculative")) or (value and kind == "full"):
            raise ValueError(f"{words!r} names no way to decode; there are {WORDS}")
        return _KINDS[kind](words, value)

    @classmethod
    def forced(cls, name: str, exit_layer: int) -> DecodingMode:
        """The model that ends behind one exit: at threshold 0 the only exit that may be evaluated is always taken."""
        params = GenerationParams(mode="early_exit", exit_thresholds=(0.0,), exit_layers=(exit_layer,))
        return cls(name, params, exit_layer)

    @property
    def changes_likelihoods(self) -> bool:
        """Whether likelihoods are others than those of `full`. Thresholds and drafts concern answers alone."""
        return self.exit_layer is not None

    @property
    def score_params(self) -> ScoreParams:
        """Of likelihoods: the one head that gives them. Layers behind it do not run."""
        if self.exit_layer is None:
            return ScoreParams(exit_layers=(), score_last=False)
        return ScoreParams(exit_layers=(self.exit_layer,), final=False, score_last=False)

    @property
    def settings(self) -> dict[str, Any]:
        """For result documents."""
        params = self.params
        return {
            "mode": params.mode,
            "exit_thresholds": self._thresholds if params.mode == "early_exit" else None,
            "exit_layers": list(params.exit_layers) or None,
            "draft_exit": params.draft_exit,
            "likelihoods": "final head" if self.exit_layer is None else f"head of exit {self.exit_layer}",
        }

    @property
    def _thresholds(self) -> list[float] | str:
        thresholds = self.params.exit_thresholds
        return list(thresholds) if isinstance(thresholds, tuple) else str(thresholds)


FULL = DecodingMode("full")


def _full(words: str, value: str) -> DecodingMode:
    return FULL


def _early_exit(words: str, value: str) -> DecodingMode:
    thresholds = tuple(_number(words, one, float) for one in value.split(","))
    return DecodingMode(words, GenerationParams(mode="early_exit", exit_thresholds=thresholds))


def _certified(words: str, value: str) -> DecodingMode:
    return DecodingMode(words, GenerationParams(mode="early_exit", exit_thresholds=CertifiedThresholds.parse(words)))


def _self_speculative(words: str, value: str) -> DecodingMode:
    draft_exit = _number(words, value, int) if value else None
    return DecodingMode(words, GenerationParams(mode="self_speculative", draft_exit=draft_exit))


def _exit(words: str, value: str) -> DecodingMode:
    return DecodingMode.forced(words, _number(words, value, int))


_KINDS: dict[str, Callable[[str, str], DecodingMode]] = {
    "full": _full,
    "early_exit": _early_exit,
    "certified": _certified,
    "self_speculative": _self_speculative,
    "exit": _exit,
}


def _number(words: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        what = "a layer number" if kind is int else "a number"
        raise ValueError(f"{words!r} names no way to decode: {value!r} is not {what}; there are {WORDS}") from None
