"""The ranks that share the weights of one stage, and what they exchange in a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class TensorParallel:
    """A group of tensor-parallel ranks. All of them must make the same calls."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """group: default this process alone."""
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    def sum(self, tensor: Tensor) -> None:
        """Add up every rank's `tensor`, which must be contiguous, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self._group)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, in the order of ranks; all have the same shape.

        Where ranks must agree bit for bit, since the order in which a sum is made may differ by rank."""
        if self.size == 1:
            return [tensor]
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor, group=self._group)
        return parts
