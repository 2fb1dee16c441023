"""Hidden states as bytes, on their way from a stage to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:  # ranks of tests need no torch
    from torch import Tensor


class HiddenStates(msgspec.Struct, frozen=True, array_like=True):
    """What the bytes of hidden states mean."""

    num_rows: int
    hidden_size: int
    dtype: str
    """Name in torch."""


def to_bytes(hidden: Tensor) -> tuple[HiddenStates, Any]:
    """(what they are, an object with their bytes: their own memory where they are on the CPU). hidden: [rows, h]"""
    import torch

    if hidden.is_cuda:
        hidden = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden)
    num_rows, hidden_size = hidden.shape
    described = HiddenStates(num_rows, hidden_size, str(hidden.dtype).removeprefix("torch."))
    return described, hidden.contiguous().view(torch.uint8).numpy()


def from_bytes(described: HiddenStates, data: Any) -> Tensor:
    """[rows, h] on this process's device; a copy. data: an object with a buffer. Raises ValueError if there are too few
    or too many bytes."""
    import torch

    from megatron.early_exit.platform.device import device

    dtype = getattr(torch, described.dtype)
    expected, size = described.num_rows * described.hidden_size * dtype.itemsize, memoryview(data).nbytes
    if size != expected:
        raise ValueError(f"{described.num_rows} rows of hidden states came with {size} bytes; they have {expected}")
    # A frame may begin anywhere in memory; what Python allocates is aligned.
    hidden = torch.frombuffer(bytearray(data), dtype=dtype).view(described.num_rows, described.hidden_size)
    return hidden.pin_memory().to(device(), non_blocking=True) if device().type == "cuda" else hidden
