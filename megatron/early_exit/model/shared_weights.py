"""Keeps the copies of the model's output weight equal on all stages that use one.

With tied word embeddings the weight is the embedding: copies on the first stage, the last stage and every stage with a
tied exit. Otherwise it is the output layer's: copies on the last stage and every stage with a tied exit. Core reduces
one copy per rank, of its first or last chunk; here a rank may hold several (interleaving), on any stage.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch
from megatron.core import parallel_state

from megatron.early_exit.model.gpt_model import EarlyExitGPTModel


class _MarkedWeight(torch.nn.Parameter):
    """A weight with what core reads of it, and what its DDP puts on it. For types alone: none is built."""

    shared_embedding: bool
    shared: bool
    zero_out_wgrad: bool
    main_grad: torch.Tensor


class SharedOutputWeight:
    """The copies of the output weight on this rank, and the group of ranks with the others.

    Build it on all ranks after the model chunks and before DDP and the optimizer, which read the marks it sets."""

    def __init__(self, chunks: list[EarlyExitGPTModel], timeout_minutes: float = 10.0) -> None:
        # Which marks there are is core's matter; see `_MarkedWeight`.
        copies = [(chunk, cast("_MarkedWeight | None", chunk.model_output_weight)) for chunk in chunks]
        owning = [(chunk, weight) for chunk, weight in copies if weight is not None]
        self.copies = [weight for _, weight in owning]
        owner = next((weight for chunk, weight in owning if chunk.owns_output_weight), None)
        self.group, owner_rank, num_copies = _ranks_with_copies(
            len(self.copies), owner is not None, timedelta(minutes=timeout_minutes)
        )
        if num_copies < 2:
            return
        for weight in self.copies:
            weight.shared_embedding = True  # DDP: a bucket of its own, so that all copies are sharded alike over DP
            weight.shared = weight is not owner  # the gradient norm counts one copy
        for chunk, weight in owning:
            if chunk.pre_process:
                # The weight is used by the lookup as well: fused weight gradients must not drop that gradient.
                weight.zero_out_wgrad = True
        self._copy_from(owner, owner_rank)

    @torch.no_grad()
    def _copy_from(self, owner: torch.Tensor | None, owner_rank: int) -> None:
        if not self.copies:
            return
        source = owner if owner is not None else self.copies[0]
        if self.group is not None:
            torch.distributed.broadcast(source.data, src=owner_rank, group=self.group)
        for weight in self.copies:
            if weight is not source:
                weight.data.copy_(source.data)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Give every copy the sum of all copies' gradients. Call after the reduction over data-parallel ranks."""
        if not self.copies or (self.group is None and len(self.copies) == 1):
            return
        total = self.copies[0].main_grad
        for weight in self.copies[1:]:
            total += weight.main_grad
        if self.group is not None:
            torch.distributed.all_reduce(total, group=self.group)
        for weight in self.copies[1:]:
            weight.main_grad.copy_(total)


def _ranks_with_copies(
    num_local_copies: int, is_owner: bool, timeout: timedelta
) -> tuple[torch.distributed.ProcessGroup | None, int, int]:
    """(group of this rank's pipeline ranks that hold a copy, global rank of the owner, copies in this pipeline).

    The group is None if this rank holds no copy or is the only one that does."""
    mine = (torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()),
            num_local_copies, is_owner)  # fmt: skip
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    my_group = None
    # new_group must be called by all ranks for all groups, in one order.
    for ranks in sorted({tuple(ranks) for ranks, _, _ in everyone}):
        holders = [rank for rank in ranks if everyone[rank][1] > 0]
        if len(holders) > 1:
            group = torch.distributed.new_group(holders, timeout=timeout)
            if torch.distributed.get_rank() in holders:
                my_group = group
    pipeline = mine[0]
    owner_rank = next((rank for rank in pipeline if everyone[rank][2]), pipeline[0])
    return my_group, owner_rank, sum(everyone[rank][1] for rank in pipeline)
