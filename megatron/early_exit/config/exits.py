"""Where the exits sit, what their heads are made of, and how their losses are weighted.

Source of the options: EE-LLM (arXiv:2312.04916) and EE-Tuning (arXiv:2402.00518). Layers are counted from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExitConfig:
    """Early exits of a model; the default has none and is plain GPT."""

    exit_layer_nums: tuple[int, ...] = ()
    """Layers (counted from 1) that own an exit, ascending, without repetition."""

    pre_exit: bool = False
    """The exit named N reads the input of layer N (it sits on the pipeline stage of layer N) instead of its output."""

    untie_exit_output_weights: bool = False
    """Every exit has an output projection of its own; otherwise exits use the model's output weight."""

    use_exit_norm: bool = False
    """Normalise the hidden states before the exit's output projection."""

    use_exit_mlp: bool = False
    """Exit through an MLP branch that stands beside the layer's own MLP (EE-Tuning)."""

    use_exit_block: bool = False
    """Exit through one more transformer layer."""

    exit_layer_weight: tuple[float, ...] = ()
    """Loss weight of each exit after warm-up, in the order of --exit-layer-nums. Default: 1.0 each."""

    exit_layer_weight_init: tuple[float, ...] = ()
    """Loss weight of each exit at iteration 0, with --exit-layer-weight-warmup-iters. Default: 0.0 each."""

    exit_layer_weight_warmup_iters: int = 0
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

    @property
    def num_exits(self) -> int:
        return len(self.exit_layer_nums)

    def index_of(self, layer_number: int) -> int | None:
        """Index of the exit named `layer_number` among the exits, or None if this layer has none."""
        return self.exit_layer_nums.index(layer_number) if layer_number in self.exit_layer_nums else None

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
        return _value_of(self.exit_layer_temperature, exit_index)

    def token_fraction_of(self, exit_index: int) -> float:
        """Fraction of the tokens that the exit with index `exit_index` learns from."""
        return _value_of(self.exit_loss_token_fraction, exit_index)


def _value_of(values: tuple[float, ...], exit_index: int) -> float:
    """One of values that are given for all exits, for each, or not (1.0)."""
    if not values:
        return 1.0
    return values[0] if len(values) == 1 else values[exit_index]


def num_sampled_tokens(fraction: float, num_tokens: int) -> int:
    """Of `num_tokens` unmasked ones (at least 1), how many an exit with this token fraction learns from."""
    return max(1, round(fraction * num_tokens))
