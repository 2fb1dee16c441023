"""Notices training that has diverged, on all ranks alike and before such weights are saved."""

from __future__ import annotations

import math

from megatron.early_exit.training.metrics import LossMetrics

_ADVICE = "Resume from the last checkpoint with a smaller --lr, more warmup or other data."


def check_gradients(grad_norm: float | None, iteration: int) -> None:
    """Raise FloatingPointError if the norm of an iteration's gradients is no number. grad_norm: None without clipping,
    when core does not compute it."""
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"the gradient norm of iteration {iteration} is {grad_norm}: training has diverged. {_ADVICE}"
        )


def check_loss_scale(loss_scale: float, min_loss_scale: float, iteration: int) -> None:
    """Raise FloatingPointError if gradients overflowed in fp16 although they were scaled by the least: all iterations
    from here on would be skipped. loss_scale: with which the skipped iteration ran."""
    if loss_scale <= min_loss_scale:
        raise FloatingPointError(
            f"the fp16 gradients of iteration {iteration} overflow at --min-loss-scale {min_loss_scale:g}: training "
            f"has diverged, or the model needs --bf16. {_ADVICE}"
        )


def check_losses(losses: LossMetrics, iteration: int) -> None:
    """Raise FloatingPointError if the loss of a head that saw tokens is no number."""
    heads = {"final head": losses.final, **{f"exit at layer {layer}": head for layer, head in losses.exits.items()}}
    broken = [name for name, head in heads.items() if head.num_tokens and not math.isfinite(head.loss)]
    if broken:
        raise FloatingPointError(
            f"the loss of the {broken[0]} is {heads[broken[0]].loss} by iteration {iteration}: training has diverged. "
            f"{_ADVICE}"
        )
