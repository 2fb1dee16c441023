"""What one request asks for, checked when it is made and, against the model, when it is added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.data.tokenizer import check_unicode
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.exit_policy import ExitPolicy
from megatron.early_exit.inference.sampling import SamplingSettings

Mode = Literal["full", "early_exit", "self_speculative"]
MODES = ("full", "early_exit", "self_speculative")

LONGEST_DRAFT = 1024
"""All lengths up to `max_draft_length` are compared before every draft."""


@dataclass(frozen=True)
class GenerationParams:
    """Settings of one request. Exits are named by their layer numbers, counted from 1."""

    max_tokens: int = 64
    """Stop after this many tokens."""

    mode: Mode = "full"
    """full: all layers for every token. early_exit: take a token from the first exit that is sure enough.
    self_speculative: let an exit draft tokens and all layers verify them; the distribution is that of `full`."""

    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How tokens are chosen from a head's distribution."""

    exit_thresholds: tuple[float, ...] = (0.8,)
    """early_exit: take an exit from this largest probability on; one value for all exits, or one for each. At 0 the
    first exit is always taken, at 1.0 only where the probability rounds to 1."""

    exit_layers: tuple[int, ...] = ()
    """early_exit: exits that may be asked; none given: all."""

    plan_exits: bool = False
    """early_exit: of these exits, ask only those that pay, by what the model's calibration says of how often they would
    be taken and by what layers and heads cost on this machine. Possibly none."""

    max_deferred: int = 32
    """early_exit: when this many rows wait for deeper layers, the next one runs all layers and takes them along."""

    draft_exit: int | None = None
    """self_speculative: the exit that drafts; None: the first."""

    draft_length: int | None = None
    """self_speculative: tokens to draft before they are verified; None: what the measured acceptance and costs make
    best, up to `max_draft_length`."""

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
        if not self.exit_thresholds:
            raise ValueError("exit_thresholds is empty; give one value for all exits, or one for each")
        for threshold in self.exit_thresholds:
            if not 0.0 <= threshold <= 1.0:  # also refuses NaN
                raise ValueError(
                    f"an exit threshold is {threshold}; it must lie between 0 (always exit) and 1 (exit only where the "
                    "probability rounds to 1). To never exit use mode 'full'."
                )
        if self.max_deferred < 0:
            raise ValueError(f"max_deferred is {self.max_deferred}; it must be 0 or more")
        if self.draft_length is not None and self.draft_length < 1:
            raise ValueError(f"draft_length is {self.draft_length}; it must be at least 1, or None to adapt")
        if not 1 <= self.max_draft_length <= LONGEST_DRAFT:
            raise ValueError(f"max_draft_length is {self.max_draft_length}; it must lie between 1 and {LONGEST_DRAFT}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty")
        for text in self.stop:
            check_unicode(text)
        if self.top_log_probs < 0:
            raise ValueError(f"top_log_probs is {self.top_log_probs}; it must be 0 or more")
        if self.n < 1:
            raise ValueError(f"n is {self.n}; it must be at least 1")
        if self.n > 1 and self.sampling.is_greedy:
            raise ValueError(f"n is {self.n}, but greedy answers are all equal; set a temperature")

    def _normalise(self) -> None:
        """Make every field what its annotation says. One value stands for a list of one; NumPy's and torch's numbers
        are numbers. Raises ValueError that names the field."""
        checks = {name: checked.integer for name in ("max_tokens", "max_deferred", "max_draft_length")}
        checks |= {name: checked.integer for name in ("top_log_probs", "n")}
        checks |= {name: checked.truth for name in ("plan_exits", "add_special_tokens", "ignore_eod", "echo")}
        for name in ("draft_exit", "draft_length"):
            if getattr(self, name) is not None:
                checks[name] = checked.integer
        values = {name: check(name, getattr(self, name)) for name, check in checks.items()}
        lists = {
            "exit_thresholds": checked.number, "exit_layers": checked.integer, "stop_tokens": checked.integer,
            "stop": checked.text,
        }  # fmt: skip
        values |= {name: checked.several(name, getattr(self, name), check) for name, check in lists.items()}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.sampling, SamplingSettings):
            raise ValueError(f"sampling is {self.sampling!r}; it must be SamplingSettings(...)")

    def exit_policy(self, exits: ExitConfig) -> ExitPolicy | None:
        """When to exit, or None if this request never does. Raises ValueError if the model cannot do what is asked."""
        if self.mode != "early_exit":
            return None
        return ExitPolicy.for_model(exits, self.exit_thresholds, self.exit_layers)

    def drafting_exit(self, exits: ExitConfig) -> int | None:
        """Layer number of the exit that drafts, or None if this request does not draft. Raises ValueError if the model
        has no such exit."""
        if self.mode != "self_speculative":
            return None
        if not exits.exit_layer_nums:
            raise ValueError("mode 'self_speculative' needs an exit to draft with, and the model has none")
        layer = exits.exit_layer_nums[0] if self.draft_exit is None else self.draft_exit
        if layer not in exits.exit_layer_nums:
            raise ValueError(
                f"draft_exit is {layer}, but the model's exits are {', '.join(map(str, exits.exit_layer_nums))}"
            )
        return layer


def check_prompt(prompt_ids: list[int] | tuple[int, ...], num_positions: int, vocab_size: int) -> None:
    """Raise ValueError if a model with these limits cannot continue `prompt_ids`."""
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token (for instance the end of document)")
    if len(prompt_ids) > num_positions:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; at most {num_positions} fit")
    outside = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"the prompt has ids outside of the vocabulary of {vocab_size}: {outside[:5]}")
