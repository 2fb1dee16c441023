"""Starts and ends the process groups of one run."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron.early_exit.config.parallel import SEED_STEP, ParallelConfig
from megatron.early_exit.platform import device as device_module
from megatron.early_exit.platform.cpu import adapt_core_to_cpu
from megatron.early_exit.platform.processes import die_with_torchrun


def initialize_distributed(timeout_minutes: float = 10.0) -> None:
    """Join the world that torchrun describes in the environment, or make a world of this one process.

    A collective that takes longer than `timeout_minutes` ends the process, so that a dead rank ends the run.
    """
    die_with_torchrun()
    device_module.claim_device()
    if not device_module.use_cuda():
        adapt_core_to_cpu()
    if torch.distributed.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if "RANK" not in os.environ else "29500")
    torch.distributed.init_process_group(
        backend=device_module.backend(),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
        timeout=timedelta(minutes=timeout_minutes),
    )


def initialize_model_parallel(parallel: ParallelConfig, num_layers: int, seed: int) -> None:
    """Create core's process groups for this layout, or use those that exist, and seed the generators.

    Raises ValueError if this process has groups of another layout.

    The word-embedding group of core is reduced to the first stage: weights that several stages use are kept equal by
    `model/shared_weights.py`, which also covers stages in the middle (core would hang there).
    """
    num_chunks = parallel.num_model_chunks(num_layers)
    if parallel_state.model_parallel_is_initialized():
        _check_same_layout(parallel.tensor_model_parallel_size, parallel.num_stages, num_chunks)
        seed_generators(seed)
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.num_stages,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        get_embedding_ranks=lambda ranks, *_: ranks[:1],
        # Beside NCCL groups core wants gloo groups for CPU tensors; where all groups are gloo they would only cost
        # polling threads.
        create_gloo_process_groups=device_module.use_cuda(),
    )
    seed_generators(seed)


def _check_same_layout(tp_size: int, num_stages: int, num_chunks: int) -> None:
    """Raise ValueError unless the process groups that exist are of this layout."""
    existing = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )
    if existing != (tp_size, num_stages, num_chunks):
        name = "tensor parallel size {}, {} pipeline stages, {} model chunks a rank".format
        raise ValueError(
            f"this process has a model with {name(*existing)}, and one with {name(tp_size, num_stages, num_chunks)} "
            "cannot join it: core's process groups are shared by all models of a process. Use another process, or "
            "call destroy_distributed() of megatron.early_exit.platform.distributed when the first model is done."
        )


def seed_generators(seed: int) -> None:
    """Seed Python, NumPy and torch as Megatron does: another stream for each pipeline rank, the same over TP and DP."""
    import random

    import numpy

    seed += SEED_STEP * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def on_rank_zero(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait; its error is raised on all ranks."""
    error: list[Exception | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except Exception as raised:
            error[0] = raised
    torch.distributed.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]


def destroy_distributed() -> None:
    """Leave all process groups."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
