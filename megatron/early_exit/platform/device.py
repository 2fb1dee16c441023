"""Which device and which process-group backend this process uses.

CUDA and NCCL where a GPU is visible, else the CPU and gloo. The rest of the package asks here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

# Limits of the memory of a container, in bytes or "max": control groups version 2, version 1.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def use_cuda() -> bool:
    """Whether this process computes on a GPU. `CUDA_VISIBLE_DEVICES=` hides GPUs and so chooses the CPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: the GPU of its local rank, or the CPU."""
    if use_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """[numbers], int64, on `device`. On a GPU the process goes on at once: a copy from pageable memory would wait for
    all kernels before it. (PyTorch keeps the pinned memory until the copy is done.)"""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.long, device=device)
    return torch.tensor(numbers, dtype=torch.long, pin_memory=True).to(device, non_blocking=True)


def claim_device() -> None:
    """Make the GPU of this process's local rank its current one; nothing on the CPU. Raises ValueError if there is no
    such GPU."""
    if not use_cuda():
        return
    local_rank, visible = device().index, torch.cuda.device_count()
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: {visible} visible. Start at most {visible} processes on "
            "this node (--nproc_per_node, pipeline_parallel_size x tensor_parallel_size)."
        )
    torch.cuda.set_device(device())


def backend() -> str:
    """Backend of `torch.distributed`: NCCL between GPUs, gloo between CPUs."""
    return "nccl" if use_cuda() else "gloo"


def free_memory_bytes() -> int:
    """Memory that this process may still take: of its GPU, or its share of the machine's or the container's."""
    if use_cuda():
        return torch.cuda.mem_get_info(device())[0]
    return free_main_memory_bytes()


def free_main_memory_bytes() -> int:
    """Main memory that this process may still take: its share of the machine's or the container's."""
    import psutil

    own = psutil.Process().memory_info().rss
    free = min(psutil.virtual_memory().available, machine_memory_bytes() - own)
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_bytes() -> int:
    """Largest memory use so far: allocated on the GPU, or resident set of the process on the CPU."""
    if use_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_memory_bytes() -> int:
    """Memory of the device of this process: of its GPU, or of the machine."""
    return torch.cuda.get_device_properties(device()).total_memory if use_cuda() else machine_memory_bytes()


def machine_memory_bytes() -> int:
    """Main memory of the machine, or of the container that this process runs in."""
    import psutil

    sizes = [psutil.virtual_memory().total]
    for path in _CONTAINER_LIMITS:
        try:
            sizes.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there, or no limit
            continue
    return min(sizes)
