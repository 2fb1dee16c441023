"""The settings of one request, checked when it is made and, against the model, when it is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.data.tokenizer import check_unicode
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.engine.exit_policy import ExitPolicy

# Who makes settings imports all of them from here.
from megatron.early_exit.inference.sampling_settings import SamplingSettings as SamplingSettings

Mode = Literal["full", "early_exit", "self_speculative"]
MODES = ("full", "early_exit", "self_speculative")

ExitScore = Literal["head", "probe"]
"""What the threshold of an exit is compared with. head: the largest probability of the exit's head. probe: what a small
network, which reads the same hidden states, says of whether the exit's token is the final head's; the head is then
evaluated only for rows that leave, whose token it gives."""
EXIT_SCORES: tuple[ExitScore, ...] = ("head", "probe")

Speculation = Literal["auto", "draft_then_verify", "across_stages"]
SPECULATIONS = ("auto", "draft_then_verify", "across_stages")

DraftSourceChoice = Literal["exit", "ngram", "both"]
DRAFT_SOURCES = ("exit", "ngram", "both")

LONGEST_DRAFT = 1024
"""All lengths up to `max_draft_length` are compared before every draft."""

MAX_TOP_LOG_PROBS = 512
MAX_SAMPLES = 128
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
MAX_STOP_TOKENS = 1024


@dataclass(frozen=True)
class CertifiedThresholds:
    """In place of thresholds: those of the checkpoint's certificate of this level."""

    level: float
    """The least share of decisions, averaged over prompts, that are the full model's."""

    def __post_init__(self) -> None:
        if not 0.0 < self.level < 1.0:  # also refuses NaN
            raise ValueError(f"a certified level is {self.level}; it must lie between 0 and 1, as in certified:0.99")

    def __str__(self) -> str:
        return f"{_CERTIFIED}{self.level:g}"

    @classmethod
    def parse(cls, text: str) -> CertifiedThresholds:
        """From "certified:0.99". Raises ValueError."""
        try:
            return cls(float(text.removeprefix(_CERTIFIED))) if text.startswith(_CERTIFIED) else cls(math.nan)
        except ValueError:
            raise ValueError(
                f"exit_thresholds is {text!r}; give numbers, or a certified level between 0 and 1 as certified:0.99"
            ) from None


_CERTIFIED = "certified:"


def _thresholds(name: str, given: Any) -> tuple[float, ...] | CertifiedThresholds:
    """Numbers, or what stands for those of a certificate. Raises ValueError."""
    if isinstance(given, CertifiedThresholds):
        return given
    return CertifiedThresholds.parse(given) if isinstance(given, str) else checked.several(name, given, checked.number)


_Check = Callable[[str, Any], object]
"""(name of a field, what was given) -> its value. Raises ValueError that names the field."""

_CHECKS_OF_ONE: dict[str, _Check] = {
    **dict.fromkeys(
        ("max_tokens", "min_tokens", "max_deferred", "max_draft_length", "top_log_probs", "n"), checked.integer
    ),
    **dict.fromkeys(("observe_exits", "add_special_tokens", "ignore_eod", "log_probs", "echo"), checked.truth),
}
_CHECKS_OF_OPTIONAL: dict[str, _Check] = {
    "plan_exits": checked.truth,
    "draft_exit": checked.integer,
    "draft_length": checked.integer,
    "draft_min_confidence": checked.number,
}
_CHECKS_OF_SEVERAL: dict[str, _Check] = {
    "exit_thresholds": _thresholds,
    "exit_layers": lambda name, given: checked.several(name, given, checked.integer),
    "stop_tokens": lambda name, given: checked.several(name, given, checked.integer),
    "stop": lambda name, given: checked.several(name, given, checked.text),
}


@dataclass(frozen=True)
class GenerationParams:
    """Settings of one request. Exits are named by their layer numbers, counted from 1."""

    max_tokens: int = 64
    """Stop after this many tokens."""

    min_tokens: int = 0
    """Until the answer has so many tokens, none that ends it can be drawn, and no stop string ends it: one that is
    complete within their text is part of the answer."""

    mode: Mode = "full"
    """full: all layers for every token. early_exit: take a token from the first exit that is confident.
    self_speculative: draft tokens and let all layers verify them; the answer is that of `full`."""

    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How tokens are chosen from a head's distribution."""

    exit_thresholds: tuple[float, ...] | CertifiedThresholds = (0.8,)
    """early_exit: take an exit from this largest probability on; one value for all exits, or one for each. At 0 the
    first exit is always taken, at 1.0 only where the probability rounds to 1. "certified:0.99": the thresholds that the
    checkpoint's certificate of this level has (`tools/evaluate.py calibrate`)."""

    exit_layers: tuple[int, ...] = ()
    """early_exit: exits that may be evaluated; none given: all that tokens may leave at."""

    exit_score: ExitScore | None = None
    """early_exit, and exits that are observed: what thresholds are compared with, the largest probability of the exit's
    head ("head"), or the output of the exit's probe ("probe", `tools/evaluate.py probes`), with which the head is
    evaluated only for tokens that leave. None: the head's probability, and with certified thresholds what the newest
    certificate was made with."""

    plan_exits: bool | None = None
    """early_exit: of these exits, evaluate only those that pay, by how often the model's calibration expects them to be
    taken and by what layers and heads cost on this machine. Possibly none. None: if the thresholds are certified."""

    observe_exits: bool = False
    """full: evaluate every exit that tokens may leave at for every token, and take none; `GeneratedToken.predictions`
    tell what each would have said, with the score (`exit_score`) that early exit would have compared with its
    threshold."""

    max_deferred: int = 32
    """early_exit: rows of this request that may be deferred. Where one more exits, it runs the remaining layers with
    those deferred before it; the token is still the exit's."""

    draft_source: DraftSourceChoice = "exit"
    """self_speculative. exit: an exit of the model drafts. ngram: what followed the last tokens where they stood
    before, in the prompt or the answer; that costs no rows and needs no exit. both: whichever promises more."""

    draft_exit: int | None = None
    """self_speculative: the exit that drafts; None: the one that promises most, by what all layers accept and by what
    layers and heads cost (across stages: the first)."""

    draft_length: int | None = None
    """self_speculative: tokens to draft before they are verified; None: what the measured acceptance and costs make
    best, up to `max_draft_length`."""

    speculation: Speculation = "auto"
    """self_speculative. draft_then_verify: some tokens are drafted, then all layers verify them together.
    across_stages: every token goes on through the pipeline stages while its draft is fed already; `draft_length` is
    then the number of unverified drafts on the way, by default what keeps all stages busy. auto: across stages, where
    there is one behind that of the draft exit."""

    draft_min_confidence: float | None = None
    """self_speculative: an exit's draft ends with a token of less confidence than this; None: with an adaptive length
    where one more token is not expected to pay. Where cheap heads give no confidence it has no effect."""

    max_draft_length: int = 12
    """self_speculative: longest draft if the length adapts."""

    add_special_tokens: bool = True
    """A prompt that is text begins (or ends) as the tokenizer lets every text do, with its begin of text for instance;
    the text alone otherwise. Chat templates write such tokens themselves."""

    stop_tokens: tuple[int, ...] = ()
    """Stop after one of these ids."""

    stop: tuple[str, ...] = ()
    """Stop when the text of the answer holds one of these; it is cut before it."""

    ignore_eod: bool = False
    """Go on after what ends an answer by the model's own files: the end of a document, of a turn."""

    log_probs: bool = True
    """Report the log-probability of each token, and the confidence of the head that gave it. Without it they may be
    None: a greedy token that needs nothing else may come from a head in int8, certified to be the exact head's."""

    top_log_probs: int = 0
    """Report this many of the most probable tokens, with log-probabilities, beside each token."""

    echo: bool = False
    """Report the log-probability of every token of the prompt as well."""

    n: int = 1
    """Independent answers; answer i is drawn with seed + i."""

    def __post_init__(self) -> None:
        self._normalise()
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.max_tokens < (0 if self.echo else 1):
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1 (0 with echo)")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must lie between 0 and max_tokens ({self.max_tokens})"
            )
        self._check_thresholds()
        if self.observe_exits and self.mode != "full":
            raise ValueError(f"observe_exits needs mode 'full', not {self.mode!r}")
        if self.exit_score not in (None, *EXIT_SCORES):
            raise ValueError(f"exit_score is {self.exit_score!r}; choose one of {', '.join(EXIT_SCORES)}")
        if self.draft_source not in DRAFT_SOURCES:
            raise ValueError(f"draft_source is {self.draft_source!r}; choose one of {', '.join(DRAFT_SOURCES)}")
        if self.draft_source == "ngram" and self.draft_exit is not None:
            raise ValueError(f"draft_exit is {self.draft_exit}, but with draft_source 'ngram' no exit drafts")
        if self.draft_min_confidence is not None and not 0.0 <= self.draft_min_confidence <= 1.0:
            raise ValueError(f"draft_min_confidence is {self.draft_min_confidence}; it must lie between 0 and 1")
        if self.speculation not in SPECULATIONS:
            raise ValueError(f"speculation is {self.speculation!r}; choose one of {', '.join(SPECULATIONS)}")
        if self.max_deferred < 0:
            raise ValueError(f"max_deferred is {self.max_deferred}; it must be 0 or more")
        if self.draft_length is not None and self.draft_length < 1:
            raise ValueError(f"draft_length is {self.draft_length}; it must be at least 1, or None to adapt")
        if not 1 <= self.max_draft_length <= LONGEST_DRAFT:
            raise ValueError(f"max_draft_length is {self.max_draft_length}; it must lie between 1 and {LONGEST_DRAFT}")
        self._check_stops()
        _check_top_log_probs(self.top_log_probs)
        if self.top_log_probs and not self.log_probs:
            raise ValueError(f"top_log_probs is {self.top_log_probs}, which needs log_probs")
        if not 1 <= self.n <= MAX_SAMPLES:
            raise ValueError(f"n is {self.n}; it must lie between 1 and {MAX_SAMPLES}")
        if self.n > 1 and self.sampling.is_greedy:
            raise ValueError(f"n is {self.n}, but greedy answers are all equal; set a temperature")

    def _check_thresholds(self) -> None:
        if isinstance(self.exit_thresholds, CertifiedThresholds):
            return
        if not self.exit_thresholds:
            raise ValueError("exit_thresholds is empty; give one value for all exits, or one for each")
        for threshold in self.exit_thresholds:
            if not 0.0 <= threshold <= 1.0:  # also refuses NaN
                raise ValueError(
                    f"an exit threshold is {threshold}; it must lie between 0 (always exit) and 1 (exit only where the "
                    "probability rounds to 1). To never exit use mode 'full'."
                )

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(self.stop)} strings; give at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not text:
                raise ValueError("a stop string is empty")
            if len(text) > MAX_STOP_CHARACTERS:
                raise ValueError(
                    f"the stop string {text[:20]!r}... has {len(text)} characters; it may have {MAX_STOP_CHARACTERS}"
                )
            check_unicode(text)
        if len(self.stop_tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_tokens has {len(self.stop_tokens)} ids; give at most {MAX_STOP_TOKENS}")

    def _normalise(self) -> None:
        """Make every field what its annotation says. One value stands for a list of one; NumPy's and torch's numbers
        are numbers. Raises ValueError that names the field."""
        optional = {name: check for name, check in _CHECKS_OF_OPTIONAL.items() if getattr(self, name) is not None}
        for name, check in (_CHECKS_OF_ONE | optional | _CHECKS_OF_SEVERAL).items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if not isinstance(self.sampling, SamplingSettings):
            raise ValueError(f"sampling is {self.sampling!r}; it must be SamplingSettings(...)")

    def all_ends(self, ends: Collection[int]) -> frozenset[int]:
        """Ids that end the answer, of a model whose answers end at `ends`."""
        return frozenset(self.stop_tokens).union(() if self.ignore_eod else ends)

    @property
    def certified_level(self) -> float | None:
        """The promise that is asked for; None: thresholds are given as numbers, or nothing exits."""
        if self.mode == "early_exit" and isinstance(self.exit_thresholds, CertifiedThresholds):
            return self.exit_thresholds.level
        return None

    def exit_policy(self, exits: ExitConfig) -> ExitPolicy | None:
        """When to exit, or None if this request never does. Raises ValueError if the model has no such exits, and for
        certified thresholds, which `RequestChecks` knows."""
        if self.mode != "early_exit":
            return None
        if isinstance(self.exit_thresholds, CertifiedThresholds):
            raise ValueError(f"exit_thresholds is {str(self.exit_thresholds)!r}: only a loaded model knows it")
        return ExitPolicy.for_model(exits, self.exit_thresholds, self.exit_layers)

    def drafting_exits(self, exits: ExitConfig) -> tuple[int, ...]:
        """Layer numbers of the exits that may draft; none: no exit does. Raises ValueError if the model has no such
        exit."""
        if self.mode != "self_speculative" or self.draft_source == "ngram":
            return ()
        if not exits.exit_layer_nums:
            raise ValueError(
                f"mode 'self_speculative' with draft_source {self.draft_source!r} needs an exit to draft with, and the "
                "model has none; use draft_source 'ngram' (--draft-source ngram), which needs none"
            )
        may_draft = exits.drafting_layers
        if self.draft_exit is None and not may_draft:
            raise ValueError(
                f"draft_source {self.draft_source!r} needs an exit to draft with, and the model's exits are for "
                "leaving alone (--exit-uses); use draft_source 'ngram' (--draft-source ngram), which needs none"
            )
        if self.draft_exit is None:
            return may_draft
        if self.draft_exit not in exits.exit_layer_nums:
            raise ValueError(
                f"draft_exit is {self.draft_exit}, but the model's exits are "
                f"{', '.join(map(str, exits.exit_layer_nums))}"
            )
        if self.draft_exit not in may_draft:
            others = ", ".join(map(str, may_draft)) or "none"
            raise ValueError(
                f"draft_exit is {self.draft_exit}, an exit that is for leaving alone (--exit-uses); those that may "
                f"draft are {others}"
            )
        return (self.draft_exit,)


@dataclass(frozen=True)
class ScoreParams:
    """Which predictions over given tokens are wanted. Exits are named by their layer numbers, counted from 1."""

    exit_layers: tuple[int, ...] | None = None
    """Exits to evaluate at every position, whatever their confidence; None: all, (): none."""

    final: bool = True
    """Whether the final head is evaluated. Without it, layers above the deepest of the exits do not run."""

    top_log_probs: int = 0
    """Report this many of the most probable tokens, with log-probabilities, at each position."""

    logits: bool = False
    """Report the logits of the whole vocabulary as well."""

    states: bool = False
    """Report the hidden states that the head of each exit reads as well."""

    score_from: int = 0
    """First position whose prediction is wanted; those before it are context."""

    score_last: bool = True
    """Whether what follows the last token is wanted as well. Without it that token is predicted but takes no position:
    one more token fits, and its row does not run."""

    def __post_init__(self) -> None:
        if self.exit_layers is not None:
            layers = checked.several("exit_layers", self.exit_layers, checked.integer)
            object.__setattr__(self, "exit_layers", layers)
        for name in ("top_log_probs", "score_from"):
            object.__setattr__(self, name, checked.integer(name, getattr(self, name)))
        for name in ("final", "logits", "states", "score_last"):
            object.__setattr__(self, name, checked.truth(name, getattr(self, name)))
        _check_top_log_probs(self.top_log_probs)
        if self.score_from < 0:
            raise ValueError(f"score_from is {self.score_from}; it must be 0 or more")

    def heads(self, exits: ExitConfig) -> tuple[int | None, ...]:
        """Layer numbers of the exits to evaluate, ascending, then None if the final head is. Raises ValueError if the
        model has no such exit, or there is no head to evaluate."""
        layers = exits.exit_layer_nums if self.exit_layers is None else self.exit_layers
        unknown = sorted(set(layers) - set(exits.exit_layer_nums))
        if unknown:
            raise ValueError(
                f"exit_layers names {', '.join(map(str, unknown))}, but the model's exits are "
                f"{', '.join(map(str, exits.exit_layer_nums)) or 'none'}"
            )
        heads = (*sorted(set(layers)), *((None,) if self.final else ()))
        if not heads:
            raise ValueError("no head is to be evaluated: there are no exits, and final is False")
        return heads

    @property
    def num_targets(self) -> int:
        """Tokens at the end that are predicted and take no position."""
        return 0 if self.score_last else 1

    def check_tokens(self, ids: Sequence[int], num_positions: int, vocab_size: int) -> None:
        """Raise ValueError if a model with these limits cannot score `ids`."""
        check_prompt(ids, num_positions + self.num_targets, vocab_size)
        num_rows = len(ids) - self.num_targets
        if self.score_from >= num_rows:
            but_last = " but the last" * self.num_targets
            raise ValueError(
                f"score_from is {self.score_from}; it must be below the number of tokens{but_last}, {num_rows}"
            )


class PromptTooLong(ValueError):
    """A prompt does not fit."""


def check_length(num_tokens: int, num_positions: int) -> None:
    """Raise ValueError unless a model with so many positions can continue so many tokens."""
    if num_tokens == 0:
        raise ValueError("the prompt is empty; give at least one token (for instance the end of document)")
    if num_tokens > num_positions:
        raise PromptTooLong(f"the prompt has {num_tokens} tokens; at most {num_positions} fit")


def check_prompt(prompt_ids: Sequence[int], num_positions: int, vocab_size: int) -> None:
    """Raise ValueError if a model with these limits cannot continue `prompt_ids`."""
    check_length(len(prompt_ids), num_positions)
    check_ids("the prompt", prompt_ids, vocab_size)


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError that names the field if some of `ids` are outside of the vocabulary."""
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"{name} has ids outside of the vocabulary of {vocab_size}: {outside[:5]}")


def _check_top_log_probs(count: int) -> None:
    if not 0 <= count <= MAX_TOP_LOG_PROBS:
        raise ValueError(f"top_log_probs is {count}; it must lie between 0 and {MAX_TOP_LOG_PROBS}")
