"""Linear layers for decoding: fast for one row, for a few, and for many.

Decoding reads every weight once a step, so a step over a few rows should cost what one row costs. On CPUs that depends
on which path of the matrix library is taken: PyTorch's plain path costs twice as much from a few rows on, oneDNN over
packed weights does not, and which is fastest for one row depends on the processor (`docs/decisions.md`,
`benchmarks/decode`). Weight-only int8 reads a quarter of the bytes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
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


class WeightFirstLinear:
    """In the weight's own type, as weight @ x: another path of the matrix library, which on some processors is several
    times as fast for two to four rows, or for one row twice."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in]; bias: [out] or None."""
        self._weight, self.bias = weight.contiguous(), bias
        self.num_bytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        columns = (torch.cat([x, x]) if x.size(0) == 1 else x).t()
        y = torch.mm(self._weight, columns)[:, : x.size(0)].t().contiguous()
        return y if self.bias is None else y.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(residual)


class PackedLinear:
    """oneDNN over packed weights, on the CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in] on the CPU, fp32 or bf16; bias: [out] or None."""
        self.bias = bias
        self.num_bytes = weight.numel() * weight.element_size()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        return y

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self.bias, "add")
        return y


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedLinear` takes this weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class FewRowsLinear:
    """On the CPU: for one row and for two the form that is fastest here, packed for more.

    Two forms of one weight take twice its memory, so another than the packed one is only used where it is much faster.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kinds: Sequence[type[Linear]]) -> None:
        """weight: [out, in], one that can be packed; kinds: the form to use for 1, 2, ... rows."""
        forms: dict[type, Linear] = {kind: kind(weight, bias) for kind in dict.fromkeys((*kinds, PackedLinear))}
        self._few, self._many = [forms[kind] for kind in kinds], forms[PackedLinear]
        self.bias, self.num_bytes = bias, self._many.num_bytes

    def _form(self, rows: int) -> Linear:
        return self._few[rows - 1] if 0 < rows <= len(self._few) else self._many

    def __call__(self, x: Tensor) -> Tensor:
        return self._form(x.size(0))(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._form(x.size(0)).add_to(residual, x)


def fastest_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The form, or forms, of this weight that decode fastest on this machine."""
    if not can_pack(weight) or weight.numel() * weight.element_size() < _SMALL_BYTES:
        return DenseLinear(weight, bias)
    kinds = fastest_kinds(tuple(weight.shape), weight.dtype, torch.get_num_threads())
    if all(kind is PackedLinear for kind in kinds):
        return PackedLinear(weight, bias)
    return FewRowsLinear(weight, bias, kinds)


# Smaller weights stay in the caches, where the plain path is fastest; this much memory never does.
_SMALL_BYTES, MORE_THAN_CACHES = 2**19, 2**26
# Which rows are timed, how often, and how much faster than packed another form must be to be worth its memory. (It also
# keeps the choice the same from run to run, and with it the last bits of the results.)
_FEW_ROWS, _REPETITIONS, _MUCH_FASTER = (1, 2), 4, 0.85


@functools.cache
@torch.inference_mode()
def fastest_kinds(shape: tuple[int, int], dtype: torch.dtype, num_threads: int) -> tuple[type[Linear], ...]:
    """Which form of a packable weight [out, in] is fastest for 1 and for 2 rows: measured, over so many weights that
    they come from memory, as they do when decoding. It differs by processor more than anything else does: 0.9 to 2.7
    times the speed of the packed form (docs/decisions.md)."""
    if dtype == torch.bfloat16:
        return (PackedLinear,) * len(_FEW_ROWS)  # nothing came near it
    num_weights = -(-MORE_THAN_CACHES // (shape[0] * shape[1] * dtype.itemsize))
    best: dict[int, list[tuple[float, type[Linear]]]] = {rows: [] for rows in _FEW_ROWS}
    for kind in (PackedLinear, DenseLinear, WeightFirstLinear):
        forms = [kind(torch.full(shape, 0.01, dtype=dtype)) for _ in range(num_weights)]
        for rows in _FEW_ROWS:
            x = torch.full((rows, shape[1]), 0.01, dtype=dtype)
            best[rows].append((_seconds(forms, x), kind))
    kinds: list[type[Linear]] = []
    for times in best.values():
        packed = times[0][0]
        seconds, fastest = min(times, key=lambda one: one[0])
        kinds.append(fastest if seconds < _MUCH_FASTER * packed else PackedLinear)
    return tuple(kinds)


def _seconds(forms: Sequence[Linear], x: Tensor) -> float:
    times = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        for form in forms:
            form(x)
        times.append(time.perf_counter() - started)
    return min(times)


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
        y: Tensor
        if x.size(0) <= MAX_INT8_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self._weight, self._scales)
        else:
            y = self._wide(x.to(self._wide_type))
        return y if self.bias is None else y + self.bias

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + self(x)

    def _wide(self, x: Tensor) -> Tensor:
        parts = zip(self._weight.split(_PIECE), self._scales.split(_PIECE), strict=True)
        return torch.cat([F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype) for weight, scales in parts], dim=1)

    def dequantised(self, rows: slice = slice(None)) -> Tensor:
        """[rows of `out`, in] fp32: the weight that it stands for."""
        return self._weight[rows].float() * self._scales[rows].float()[:, None]


# Beyond this many rows converting the weights is cheaper; rows of the weight that are converted at once.
MAX_INT8_ROWS, _PIECE = 8, 4096
