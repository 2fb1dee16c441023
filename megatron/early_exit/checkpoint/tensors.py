"""Tensors that are read when they are written: a conversion holds one of them in memory, not a model.

A model is a mapping from parameter names to lazy tensors; conversions are functions from such mappings to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

EXIT_HEAD = ".exit_head."
"""In the names of all parameters of exits, and of no others."""


class Origin(NamedTuple):
    """A tensor that lies unchanged in one of our checkpoints."""

    folder: Path
    key: str


@dataclass(frozen=True)
class LazyTensor:
    """Shape and type of a tensor, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    origin: Origin | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def then(self, shape: Sequence[int], function: Callable[[Tensor], Tensor]) -> LazyTensor:
        """`function` of it, which has `shape`."""
        return LazyTensor(tuple(shape), self.dtype, lambda: function(self.read()))

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """In another type."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))

    def transposed(self) -> LazyTensor:
        """Of a matrix."""
        return self.then(self.shape[::-1], lambda tensor: tensor.t())


Tensors = dict[str, LazyTensor]


def below(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def combined(parts: Sequence[LazyTensor], shape: Sequence[int], function: Callable[..., Tensor]) -> LazyTensor:
    """`function` of several tensors of one type; it has `shape`."""
    return LazyTensor(tuple(shape), parts[0].dtype, lambda: function(*(part.read() for part in parts)))


def concatenated(parts: Sequence[LazyTensor]) -> LazyTensor:
    """One after the other, along the first dimension."""
    rows = sum(part.shape[0] for part in parts)
    return combined(parts, (rows, *parts[0].shape[1:]), lambda *tensors: torch.cat(tensors))


def with_rows(tensor: LazyTensor, rows: int) -> LazyTensor:
    """With zeros behind its last row, or without its last rows, so that it has `rows`."""
    if rows == tensor.shape[0]:
        return tensor

    def resize(value: Tensor) -> Tensor:
        return torch.cat([value[:rows], value.new_zeros(max(rows - value.size(0), 0), *value.shape[1:])])

    return tensor.then((rows, *tensor.shape[1:]), resize)


def without_exits(tensors: Tensors) -> Tensors:
    """The parameters of the plain model."""
    return {name: tensor for name, tensor in tensors.items() if EXIT_HEAD not in name}


def merge_gate_and_up(*parts: Tensor) -> Tensor:
    """The gate, then up, of an MLP of which every tensor-parallel rank has its part of the gate, then of up."""
    halves = [part.chunk(2) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
