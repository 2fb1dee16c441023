"""What the benchmark compares with: exits in plain autograd, and core's own final head.

The exits compute the loss in the layer's forward, from full logits that live until the backward pass, as a first
implementation would. Same parameters, same losses, same gradients as the model that is changed. For TP size 1.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron.early_exit.model.build import Model
from megatron.early_exit.model.gpt_model import EarlyExitGPTModel
from megatron.early_exit.model.layer import EarlyExitTransformerLayer


def make_exits_naive(model: Model) -> None:
    """Let the exits of an early-exit model compute their losses in forward, with full logits."""
    for chunk in model.chunks:
        for layer in chunk.decoder.layers:
            if isinstance(layer, EarlyExitTransformerLayer):
                layer._attach_exit = MethodType(_attach_exit_in_forward, layer)


def use_core_head(model: Model) -> None:
    """Let the last stage compute the final loss as core's GPT does, with full logits."""
    for chunk in model.chunks:
        chunk._postprocess = MethodType(_core_head, chunk)


class _AddLoss(torch.autograd.Function):
    """Identity on the hidden states that makes a loss part of the objective (a gradient of 1 in backward)."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, ctx.one


def _attach_exit_in_forward(
    layer: EarlyExitTransformerLayer, hidden_states: Tensor, kwargs: dict[str, Any], **head_arguments: Any
) -> Tensor:
    labels, loss_mask = kwargs["context"], kwargs["context_mask"]
    head, exit_losses = layer.exit_head, layer.exit_losses
    exit_index = head.spec.exit_index
    logits = head(hidden_states, **head_arguments) @ head.output_weight.t()
    loss_sum = _masked_loss_sum(logits, labels, loss_mask)
    _count(exit_losses, exit_index, loss_sum, loss_mask)
    loss = loss_sum * (exit_losses.gradient_scale(loss_mask) * exit_losses.weights[exit_index])
    return make_viewless_tensor(_AddLoss.apply(hidden_states, loss), requires_grad=True, keep_graph=True)


def _core_head(chunk: EarlyExitGPTModel, **kwargs: Any) -> Tensor:
    labels, loss_mask = kwargs["labels"], kwargs["loss_mask"]
    output = GPTModel._postprocess(chunk, **kwargs)
    if not chunk.post_process:
        return output
    assert output.shape == labels.shape, f"core's GPT returned {tuple(output.shape)}, expected a loss per token"
    loss_sum = (output * loss_mask).sum()
    _count(chunk.exit_losses, chunk.exit_losses.final_index, loss_sum, loss_mask)
    return loss_sum


def _masked_loss_sum(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """logits: [s, b, vocabulary]; labels, loss_mask: [b, s]. Returns a scalar (nats)."""
    losses = vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous())
    return (losses * loss_mask.t()).sum()


def _count(exit_losses: Any, exit_index: int, loss_sum: Tensor, loss_mask: Tensor) -> None:
    zero = loss_sum.new_zeros(())  # correct predictions are not counted here, and no exit follows the final head
    exit_losses.add_statistics(exit_index, torch.stack([loss_sum.detach(), loss_mask.sum(), zero, zero]).double())
