"""What core's schedules call: all of it stands in the model's `TransformerConfig`, and is put there here alone."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.timers import Timers

from megatron.early_exit.model.build import Model


def connect_core_config(model: Model, optimizer: MegatronOptimizer | None = None, timers: Timers | None = None) -> None:
    """Connect a model that is built with its optimizer, the reduction of its gradients and the timers.

    Without an optimizer losses are not scaled: fp16 needs one."""
    config = model.config
    chunks = [chunk for chunk in model.wrapped if isinstance(chunk, DistributedDataParallel)]
    if chunks:
        # Schedules take one function without interleaving, a list with one per chunk otherwise.
        one_or_list = lambda functions: functions[0] if len(functions) == 1 else functions
        config.no_sync_func = one_or_list([chunk.no_sync for chunk in chunks])
        if chunks[0].ddp_config.overlap_grad_reduce:
            config.grad_sync_func = one_or_list([chunk.start_grad_sync for chunk in chunks])

    def finalize(chunks: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Core's reductions, followed by that of the shared output weight."""
        finalize_model_grads(chunks, *args, **kwargs)
        model.shared_weight.reduce_gradients()

    config.finalize_model_grads_func = finalize
    if optimizer is not None:
        # Core scales the final loss; that of an exit is scaled where its gradients are taken.
        config.grad_scale_func = model.exit_losses.grad_scale_func = optimizer.scale_loss
    if timers is not None:
        config.timers = timers
        if optimizer is not None:
            optimizer.config.timers = timers
