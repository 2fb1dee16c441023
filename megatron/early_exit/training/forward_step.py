"""The forward pass of one microbatch through one model chunk, as core's schedules and plans call it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.data.batches import Batch


def forward_step(data_iterator: Iterator[Batch] | None, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    """Core's forward-step function. data_iterator: batches (`data.batches.Batch`), or None on a stage that neither
    embeds, nor computes a loss, nor needs a mask.

    The loss function returns (sum of losses, tokens, nothing): core divides the sum by the microbatch's tokens and by
    the number of microbatches, or with --calculate-per-token-loss by the tokens of the global batch at the end."""
    if data_iterator is None:
        return chunk(None, None, None), None
    batch = next(data_iterator)
    output = chunk(
        batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels, loss_mask=batch.loss_mask
    )
    return output, partial(_loss_and_tokens, batch.loss_mask)


def _loss_and_tokens(loss_mask: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return loss_sum, loss_mask.sum().int(), {}
