"""Linear layers for decoding: fast for one row, for a few, and for many.

Decoding reads every weight once a step, so a step over a few rows should cost what one row costs. On CPUs that depends
on which path of the matrix library is taken: PyTorch's plain path costs twice as much from a few rows on, oneDNN over
packed weights does not (`docs/decisions.md`, `benchmarks/decode.py`). Weight-only int8 reads a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Linear(Protocol):
    """x @ weight.T + bias"""

    num_bytes: int
    """What one use reads."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], in the type that it computes in."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + what it makes of x, in the type of the residual."""


MakeLinear = Callable[[Tensor, Tensor | None], Linear]
"""(weight [out, in], bias [out] or None) -> the layer that uses them"""

# Of the packing: how many rows oneDNN is told to expect. Any number above 1 gives the same form.
_PACKED_FOR_ROWS = 16


class DenseLinear:
    """In the weight's own type, with PyTorch's plain path."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in]; bias: [out] or None."""
        # mm and addmm are what F.linear comes to, with fewer steps on the way.
        self._transposed, self.bias = weight.contiguous().t(), bias
        self.num_bytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self._transposed)
        return torch.addmm(self.bias, x, self._transposed)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        sum_ = torch.addmm(residual, x, self._transposed)
        return sum_ if self.bias is None else sum_.add_(self.bias)


class PackedLinear:
    """On the CPU: plain for one row, oneDNN over packed weights where that is faster.

    fp32 keeps both forms, and so takes twice the memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in] on the CPU, fp32 or bf16; bias: [out] or None."""
        self.bias = bias
        self.num_bytes = weight.numel() * weight.element_size()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        # In bf16 the packed form is faster for one row already. In fp32 a call of it costs 30 microseconds more; with
        # AVX512 the plain path is as fast for two rows as for one.
        has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        self._max_plain_rows = 0 if weight.dtype == torch.bfloat16 else 2 if has_avx512 else 1
        self._plain = DenseLinear(weight, bias) if self._max_plain_rows else None

    def __call__(self, x: Tensor) -> Tensor:
        if x.size(0) <= self._max_plain_rows:
            return self._plain(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if x.size(0) <= self._max_plain_rows:
            return self._plain.add_to(residual, x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self.bias, "add")


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedLinear` takes this weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def fastest_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Packed where that can be done, else plain."""
    return (PackedLinear if can_pack(weight) else DenseLinear)(weight, bias)


class Int8Linear:
    """Weights in int8 with one scale a row (weight-only quantisation); computes in bf16. On the CPU.

    For many rows the weights are converted back, piece by piece, since the int8 kernel computes row by row."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in]; bias: [out] or None."""
        # Scales that bf16 holds exactly, so that only the weights are rounded.
        self._scales = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).bfloat16()  # [out]
        quantised = weight.float() / self._scales.float()[:, None]
        self._weight = quantised.round_().clamp_(-127, 127).to(torch.int8)
        self.bias = bias
        self.num_bytes = weight.numel()
        self._wide_type = torch.float32
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self._wide_type = torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        if x.size(0) <= _MAX_INT8_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self._weight, self._scales)
        else:
            y = self._wide(x.to(self._wide_type))
        return y if self.bias is None else y + self.bias

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + self(x)

    def _wide(self, x: Tensor) -> Tensor:
        parts = zip(self._weight.split(_PIECE), self._scales.split(_PIECE), strict=True)
        return torch.cat([F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype) for weight, scales in parts], dim=1)

    def dequantised(self) -> Tensor:
        """[out, in] fp32: the weight that it stands for."""
        return self._weight.float() * self._scales.float()[:, None]


# Beyond this many rows converting the weights is cheaper; rows of the weight that are converted at once.
_MAX_INT8_ROWS, _PIECE = 8, 4096
