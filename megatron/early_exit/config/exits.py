"""Where the exits sit, what their heads are made of, and how their losses are weighted.

Source of the options: EE-LLM (arXiv:2312.04916) and EE-Tuning (arXiv:2402.00518). Layers are counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from megatron.early_exit.config.ranges import NonNegativeInt

_T = TypeVar("_T")

ExitUse = Literal["leave", "draft", "both"]
"""What decoding may do with an exit: give tokens with it, draft with it, or either."""


@dataclass(frozen=True)
class ExitHeadKind:
    """What the head of one exit is made of, beside an output projection."""

    norm: bool = False
    mlp: bool = False
    """An MLP branch."""
    block: bool = False
    """One more transformer layer."""
    untied_output: bool = False
    """The output projection is the exit's own, not the model's."""

    @property
    def has_parameters(self) -> bool:
        """Whether anything of it is the exit's own."""
        return self.norm or self.mlp or self.block or self.untied_output

    def __str__(self) -> str:
        parts = [("transformer block", self.block), ("MLP branch", self.mlp), ("norm", self.norm)]
        output = f"{'own' if self.untied_output else 'shared'} output projection"
        return " + ".join([*(part for part, is_there in parts if is_there), output])


_SETTING_OF_PART = {
    "norm": "use_exit_norm",
    "mlp": "use_exit_mlp",
    "block": "use_exit_block",
    "untied_output": "untie_exit_output_weights",
}


@dataclass(frozen=True)
class ExitConfig:
    """Early exits of a model; the default has none and is plain GPT.

    What is given for each exit and is the same for all is kept as one value, so equal settings compare equal."""

    exit_layer_nums: tuple[int, ...] = ()
    """Layers (counted from 1) that own an exit, ascending, without repetition."""

    pre_exit: bool = False
    """The exit named N reads the input of layer N (it sits on the pipeline stage of layer N) instead of its output."""

    untie_exit_output_weights: bool | tuple[bool, ...] = False
    """An output projection of the exit's own, for all exits or true or false for each; otherwise exits use the model's
    output weight."""

    use_exit_norm: bool | tuple[bool, ...] = False
    """Normalise the hidden states before the exit's output projection: all exits, or true or false for each."""

    use_exit_mlp: bool | tuple[bool, ...] = False
    """Exit through an MLP branch that stands beside the layer's own MLP (EE-Tuning): all exits, or true or false for
    each."""

    use_exit_block: bool | tuple[bool, ...] = False
    """Exit through one more transformer layer: all exits, or true or false for each."""

    exit_uses: tuple[ExitUse, ...] = ()
    """What decoding may use the exits for: to give tokens (leave), to draft, or both; one value for all exits, or one
    for each. Default: both. Training treats all alike."""

    exit_layer_weight: tuple[float, ...] = ()
    """Loss weight of each exit after warm-up, in the order of --exit-layer-nums. Default: 1.0 each."""

    exit_layer_weight_init: tuple[float, ...] = ()
    """Loss weight of each exit at iteration 0, with --exit-layer-weight-warmup-iters. Default: 0.0 each."""

    exit_layer_weight_warmup_iters: NonNegativeInt = 0
    """Iterations over which each weight moves from its initial to its final value; 0: final from the start."""

    exit_layer_weight_warmup_style: Literal["linear", "cosine"] = "linear"
    """Shape of the weight schedule."""

    exit_layer_temperature: tuple[float, ...] = ()
    """Divide the exit's logits by this before the loss; one value for all exits, or one for each. Default: 1.0."""

    use_dynamic_exit_layer_weight: bool = False
    """Weigh every token's exit loss by the exit's own largest probability (without gradient)."""

    exit_loss_token_fraction: tuple[float, ...] = ()
    """Compute each exit's loss in training on this fraction of a microbatch's tokens, drawn anew every time and scaled
    so that gradients are those of all tokens on average; one value for all exits, or one for each. Default: 1.0."""

    def __post_init__(self) -> None:
        for name in _SETTING_OF_PART.values():
            values = getattr(self, name)
            if not isinstance(values, bool) and self._is_uniform(values):
                object.__setattr__(self, name, values[0])
        if self._is_uniform(self.exit_uses):
            object.__setattr__(self, "exit_uses", () if self.exit_uses[0] == "both" else self.exit_uses[:1])

    def _is_uniform(self, values: tuple[object, ...]) -> bool:
        return len(set(values)) == 1 and len(values) in (1, self.num_exits)

    @property
    def num_exits(self) -> int:
        return len(self.exit_layer_nums)

    @property
    def heads(self) -> tuple[ExitHeadKind, ...]:
        """Of all exits in order."""
        return tuple(map(self.head_of, range(self.num_exits)))

    def head_of(self, exit_index: int) -> ExitHeadKind:
        """What the head of the exit with index `exit_index` is made of."""
        settings = ((part, getattr(self, name)) for part, name in _SETTING_OF_PART.items())
        return ExitHeadKind(
            **{part: values if isinstance(values, bool) else values[exit_index] for part, values in settings}
        )

    def heads_of(self, layers: Collection[int]) -> tuple[ExitHeadKind, ...]:
        """The heads of the exits that these layers name, in order."""
        return tuple(map(self.head_of, self.indices_of(layers)))

    def indices_of(self, layers: Collection[int]) -> list[int]:
        """Indices of the exits that these layers name, in order."""
        return [index for index, layer in enumerate(self.exit_layer_nums) if layer in layers]

    def described_heads(self) -> str:
        """The heads in words: what all are, or what each is; and the uses, where not every exit has both."""
        heads, uses = self.heads, [self.use_of(index) for index in range(self.num_exits)]
        kinds = dict(zip(self.exit_layer_nums, heads, strict=True))
        text = f"head = {heads[0]}" if len(set(heads)) == 1 else _by_layer("head", kinds)
        return text if set(uses) == {"both"} else f"{text}; {_by_layer('use', dict(zip(kinds, uses, strict=True)))}"

    def use_of(self, exit_index: int) -> ExitUse:
        """What decoding may do with the exit with index `exit_index`."""
        return _value_of(self.exit_uses, exit_index, "both")

    def may_leave(self, exit_index: int) -> bool:
        """Whether tokens may leave at the exit with index `exit_index`."""
        return self.use_of(exit_index) != "draft"

    def may_draft(self, exit_index: int) -> bool:
        """Whether the exit with index `exit_index` may give drafts."""
        return self.use_of(exit_index) != "leave"

    def index_of(self, layer_number: int) -> int | None:
        """Index of the exit named `layer_number` among the exits, or None if this layer has none."""
        return self.exit_layer_nums.index(layer_number) if layer_number in self.exit_layer_nums else None

    @property
    def leaving_layers(self) -> tuple[int, ...]:
        """The exits at which tokens may leave."""
        return tuple(layer for index, layer in enumerate(self.exit_layer_nums) if self.may_leave(index))

    @property
    def drafting_layers(self) -> tuple[int, ...]:
        """The exits that may draft."""
        return tuple(layer for index, layer in enumerate(self.exit_layer_nums) if self.may_draft(index))

    def depth_of(self, layer_number: int) -> int:
        """Layers that have run when the exit named `layer_number` reads the hidden states."""
        return layer_number - self.pre_exit

    def weights_at(self, iteration: int) -> tuple[float, ...]:
        """Loss weights for the iteration that starts after `iteration` finished ones (0 gives the initial weights)."""
        final = self.exit_layer_weight or (1.0,) * self.num_exits
        initial = self.exit_layer_weight_init or (0.0,) * self.num_exits
        if iteration >= self.exit_layer_weight_warmup_iters:
            return final
        progress = iteration / self.exit_layer_weight_warmup_iters
        if self.exit_layer_weight_warmup_style == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        return tuple(start + (end - start) * progress for start, end in zip(initial, final, strict=True))

    def temperature_of(self, exit_index: int) -> float:
        """Softmax temperature of the exit with index `exit_index`."""
        return _value_of(self.exit_layer_temperature, exit_index, 1.0)

    def token_fraction_of(self, exit_index: int) -> float:
        """Fraction of the tokens that the exit with index `exit_index` learns from."""
        return _value_of(self.exit_loss_token_fraction, exit_index, 1.0)

    def described_token_fractions(self) -> str:
        """What exits learn from, in words, where it is not all tokens; else nothing."""
        fractions = [f"{self.token_fraction_of(index):g}" for index in range(self.num_exits)]
        if set(fractions) <= {"1"}:
            return ""
        return f"losses over {', '.join(fractions[:1] if len(set(fractions)) == 1 else fractions)} of the tokens"


def _value_of(values: tuple[_T, ...], exit_index: int, default: _T) -> _T:
    """One of values that are given for all exits, for each, or not."""
    if not values:
        return default
    return values[0] if len(values) == 1 else values[exit_index]


def num_sampled_tokens(fraction: float, num_tokens: int) -> int:
    """Of `num_tokens` unmasked ones (at least 1), how many an exit with this token fraction learns from."""
    return max(1, round(fraction * num_tokens))


def head_settings(heads: Sequence[ExitHeadKind]) -> dict[str, Any]:
    """The fields of `ExitConfig` that give exits these heads, in order."""
    return {name: tuple(getattr(head, part) for head in heads) for part, name in _SETTING_OF_PART.items()}


def exit_kind_problems(exits: ExitConfig) -> Iterator[str]:
    """What is wrong with the heads and the uses of exits, in a sentence each that names flags and exits."""
    counts = _count_problems(exits)
    if counts:
        yield from counts
        return
    heads = dict(zip(exits.exit_layer_nums, exits.heads, strict=True))
    branches = [layer for layer, head in heads.items() if head.mlp]
    if branches and exits.pre_exit:
        yield (
            f"--use-exit-mlp with --pre-exit ({_named(branches)}): the MLP branch stands beside its layer's own MLP,"
            " before which a pre-exit has left; drop --pre-exit and name the layer before (7 becomes 6)"
        )
    if both := [layer for layer in branches if heads[layer].block]:
        yield (
            f"--use-exit-mlp with --use-exit-block ({_named(both)}): an exit has an MLP branch or a block, not both;"
            " drop one"
        )


def _count_problems(exits: ExitConfig) -> list[str]:
    given = {name: getattr(exits, name) for name in (*_SETTING_OF_PART.values(), "exit_uses")}
    return [
        f"--{name.replace('_', '-')} has {len(values)} values for {exits.num_exits} exits: give"
        f" {'1' if exits.num_exits == 1 else f'1 or {exits.num_exits}'}"
        for name, values in given.items()
        if not isinstance(values, bool) and len(values) not in (0, 1, exits.num_exits)
    ]


def _by_layer(what: str, values: Mapping[int, object]) -> str:
    return f"{what} of " + ", ".join(f"{layer} = {value}" for layer, value in values.items())


def _named(layers: Sequence[int]) -> str:
    return f"exit{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
