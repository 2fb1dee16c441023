"""How the tokens of one request are drawn from what a head predicts: checked when the settings are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.early_exit.inference import checked

MAX_LOGIT_BIASES, LARGEST_LOGIT_BIAS = 1024, 100.0

# Below this temperature the most probable token is taken: nothing else has a probability to speak of.
GREEDY_BELOW = 1e-5

_SMALLEST_FLOAT32 = 2.0**-126
"""Normal number."""


@dataclass(frozen=True)
class SamplingSettings:
    """How one request's tokens are chosen. The default is greedy."""

    temperature: float = 0.0
    """Divide the logits by this; 0, and values so small that they do the same: take the most probable token, whatever
    the other settings but biases and penalties are."""

    top_k: int = 0
    """Choose among the k most probable tokens only; 0: among all."""

    top_p: float = 0.0
    """Choose among the fewest most probable tokens whose probabilities add up to this; 0: among all."""

    top_p_decay: float = 0.0
    """Multiply top_p by this after every token; 0: keep it."""

    top_p_bound: float = 0.0
    """With top_p_decay: top_p never falls below this."""

    min_p: float = 0.0
    """Leave out tokens whose probability is below this share of the most probable one's; 0: none."""

    repetition_penalty: float = 1.0
    """Divide positive logits of tokens that the prompt or the answer holds by this, multiply negative ones; 1: off."""

    frequency_penalty: float = 0.0
    """Subtract this from a token's logit as often as the answer holds it; negative values make it more probable."""

    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the answer holds."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits, before penalties and everything else: from -100, which all but bans
    a token, to 100, which all but forces it. Pairs in any order, or a mapping, may be given."""

    seed: int = 1234
    """The same seed, prompt and settings give the same tokens; of 64 bits, with a sign."""

    def __post_init__(self) -> None:
        numbers = (
            "temperature", "top_p", "top_p_decay", "top_p_bound", "min_p", "repetition_penalty", "frequency_penalty",
            "presence_penalty",
        )  # fmt: skip
        for name in numbers:
            object.__setattr__(self, name, checked.number(name, getattr(self, name)))
        for name in ("top_k", "seed"):
            object.__setattr__(self, name, checked.integer(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", _sorted_biases(self.logit_bias))
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or positive")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie between 0 (off) and 1")
        if not 0.0 <= self.top_p_decay <= 1.0:
            raise ValueError(f"top_p_decay is {self.top_p_decay}; it must lie between 0 (off) and 1")
        if not 0.0 <= self.top_p_bound <= self.top_p:
            raise ValueError(f"top_p_bound is {self.top_p_bound}; it must lie between 0 and top_p ({self.top_p})")
        if self.top_p_decay and not self.top_p:
            raise ValueError(f"top_p_decay is {self.top_p_decay}, which has no effect without top_p")
        if self.top_p_bound and not self.top_p_decay:
            raise ValueError(f"top_p_bound is {self.top_p_bound}, which has no effect without top_p_decay")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}; it must lie between 0 (off) and 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be positive (1: off)")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between -2 and 2 (0: off)")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie between -2**63 and 2**63 - 1")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token (after biases and penalties) is always taken."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def is_plain_argmax(self) -> bool:
        """Whether the head's most probable token is taken as it is: no logits need to be looked at."""
        return self.is_greedy and not self.has_penalty and not self.logit_bias

    @property
    def has_penalty(self) -> bool:
        """Whether tokens that came before change the logits."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def of_sample(self, number: int) -> SamplingSettings:
        """The same with seed + `number`, for one of several answers; behind the largest seed comes the smallest."""
        return replace(self, seed=(self.seed + number + 2**63) % 2**64 - 2**63)

    def top_p_at(self, index: int) -> float:
        """top_p for the answer's token number `index`, from 0, as Megatron's text generation lowers it."""
        if not self.top_p_decay:
            return self.top_p
        return max(self.top_p * self.top_p_decay**index, self.top_p_bound, _SMALLEST_FLOAT32)


def _sorted_biases(biases: Any) -> tuple[tuple[int, float], ...]:
    """Raises ValueError that names the field."""
    if biases is None:
        return ()
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    if not hasattr(pairs, "__len__") or isinstance(pairs, (str, bytes)):
        raise ValueError(f"logit_bias is {biases!r}; give pairs of a token id and its bias, or a mapping")
    if len(pairs) > MAX_LOGIT_BIASES:
        raise ValueError(f"logit_bias has {len(pairs)} entries; give at most {MAX_LOGIT_BIASES}")
    result: dict[int, float] = {}
    for pair in pairs:
        if not hasattr(pair, "__len__") or isinstance(pair, (str, bytes)) or len(pair) != 2:
            raise ValueError(f"logit_bias has {pair!r}; its entries are pairs of a token id and its bias")
        token, bias = checked.integer("an id of logit_bias", pair[0]), checked.number("logit_bias", pair[1])
        if not -LARGEST_LOGIT_BIAS <= bias <= LARGEST_LOGIT_BIAS:
            raise ValueError(f"logit_bias of token {token} is {bias}; it must lie between -100 and 100")
        if token in result:
            raise ValueError(f"logit_bias has token {token} twice; give one bias")
        result[token] = bias
    return tuple(sorted(result.items()))
