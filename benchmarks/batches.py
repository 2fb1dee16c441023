"""Batches of random tokens for training steps that are measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.platform.device import device


class Batch(NamedTuple):
    """One microbatch of random tokens: what the training step reads of a batch."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: None = None


def random_batches(
    micro_batch_size: int, vocab_size: int, seq_length: int, num_microbatches: int, seed: int
) -> list[Batch]:
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, seq_length)
    batches = []
    for _ in range(num_microbatches):
        tokens = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=generator)
        positions = torch.arange(seq_length).expand(shape)
        fields = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(shape), positions)
        batches.append(Batch(*(field.to(device()) for field in fields)))
    return batches
