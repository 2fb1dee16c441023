"""Seconds of what runs on the device, and the most bytes that it takes there."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import ParamSpec

import torch

from benchmarks.memory_tracker import TensorMemoryTracker
from megatron.early_exit.platform.device import use_cuda

P = ParamSpec("P")


def now() -> float:
    """Seconds of a clock, when all that was begun on the device has ended."""
    if use_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(action: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> tuple[float, float]:
    """(by the clock, of this process's CPU time)"""
    wall, cpu = now(), time.process_time()
    action(*args, **kwargs)
    return now() - wall, time.process_time() - cpu


def peak_bytes(action: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int:
    """Most bytes of tensors alive at once that one `action` creates on this rank."""
    gc.collect()
    if use_cuda():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action(*args, **kwargs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with TensorMemoryTracker() as tracker:
        action(*args, **kwargs)
    return tracker.peak_bytes
