"""When to leave early: a pure function of an exit's confidence. It does not sample, print or send.

The confidence is the largest probability of the exit's softmax, at the exit's own `--exit-layer-temperature`: the
distribution that the exit was trained to predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.early_exit.config.exits import ExitConfig


@dataclass(frozen=True)
class ExitPolicy:
    """Which exits are evaluated, and from which confidence on each is taken. Build it with `for_model`."""

    exit_layers: tuple[int, ...]
    """Enabled exits, by the layer number (from 1) that names them, ascending."""

    thresholds: tuple[float, ...]
    """One for each of `exit_layers`."""

    @classmethod
    def for_model(cls, exits: ExitConfig, thresholds: Sequence[float], exit_layers: Sequence[int] = ()) -> ExitPolicy:
        """The policy for a model with `exits`.

        exit_layers: exits to enable, by layer number; none given: all that tokens may leave at. thresholds: one for all
        of them, or one for each in the order of `exit_layers`. Raises ValueError for a model without such exits, an
        exit that the model does not have or that only drafts, a repeated one, a number of thresholds that does not fit,
        and a threshold that is not a number."""
        if not exits.exit_layer_nums:
            raise ValueError("early exit was asked for, but the model has no exits (--exit-layer-nums is empty)")
        leaving = exits.leaving_layers
        if not leaving:
            raise ValueError(
                f"early exit was asked for, but the model's exits ({_text(exits.exit_layer_nums)}) only draft "
                "(--exit-uses); use mode 'self_speculative'"
            )
        enabled = tuple(exit_layers) or leaving
        unknown = sorted(set(enabled) - set(exits.exit_layer_nums))
        if unknown:
            raise ValueError(
                f"exit_layers {_text(enabled)}: the model has no exit named {_text(unknown)}; its exits are "
                f"{_text(exits.exit_layer_nums)}"
            )
        drafting = sorted(set(enabled) - set(leaving))
        if drafting:
            raise ValueError(
                f"exit_layers {_text(enabled)}: the use of exit {_text(drafting)} is to draft, and no token may leave "
                f"there; exits to leave at are {_text(leaving)}"
            )
        if len(set(enabled)) < len(enabled):
            raise ValueError(f"exit_layers {_text(enabled)} names an exit twice")
        if len(thresholds) not in (1, len(enabled)):
            raise ValueError(
                f"exit_thresholds {_text(thresholds)} has {len(thresholds)} values for {len(enabled)} exits "
                f"({_text(enabled)}); give one for all or one for each"
            )
        if any(math.isnan(threshold) for threshold in thresholds):
            raise ValueError(f"exit_thresholds {_text(thresholds)} holds a value that is not a number")
        for_each = tuple(thresholds) * (len(enabled) if len(thresholds) == 1 else 1)
        layers, values = zip(*sorted(zip(enabled, for_each, strict=True)), strict=True)
        return cls(layers, values)


def _text(values: Sequence[float]) -> str:
    return " ".join(str(value) for value in values)
