"""Which device and which process-group backend this process uses.

CUDA and NCCL where a GPU is visible, else the CPU and gloo. The rest of the package asks here.
"""

from __future__ import annotations

import os

import torch


def use_cuda() -> bool:
    """Whether this process computes on a GPU. `CUDA_VISIBLE_DEVICES=` hides GPUs and so chooses the CPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: the GPU of its local rank, or the CPU."""
    if use_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    """Backend of `torch.distributed`: NCCL between GPUs, gloo between CPUs."""
    return "nccl" if use_cuda() else "gloo"


def peak_memory_bytes() -> int:
    """Largest memory use so far: allocated on the GPU, or resident set of the process on the CPU."""
    if use_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
