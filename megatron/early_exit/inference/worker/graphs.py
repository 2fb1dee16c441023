"""Ranges of layers as CUDA graphs.

A layer over a few rows is some fifteen kernels of a few microseconds each, and starting them one by one takes longer
than they run. A graph starts all kernels of a range of layers at once, but its shapes are fixed. So the rows of a step
are put into a larger batch of one of few shapes: the same number of rows for each slot from the first on, and the same
number of keys for all. Rows that are only there to fill it compute something that nobody reads, and write behind the
last position of their slot.

On the CPU the same batches run kernel by kernel: it saves nothing there, and is how tests see what a graph would do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.inference.worker.attention import additive_mask, attend

if TYPE_CHECKING:
    from megatron.early_exit.inference.worker.attention import AttentionMetadata, RotaryTable
    from megatron.early_exit.inference.worker.kv_cache import KVCache

# More rows of one slot are a prompt, whose kernels are long enough.
_MAX_ROWS_PER_SLOT = 8

_MIN_KEYS = 256


class _Shape(NamedTuple):
    num_slots: int
    rows_per_slot: int
    num_keys: int

    @property
    def num_rows(self) -> int:
        return self.num_slots * self.rows_per_slot


class _Inputs(NamedTuple):
    """What a graph reads, at fixed addresses."""

    hidden: Tensor
    """[rows, h]"""
    positions: Tensor
    """[slots, rows per slot]"""


class FixedAttentionMetadata:
    """`AttentionMetadata` of the rows of a graph: made of operations on `positions` alone."""

    def __init__(
        self,
        positions: Tensor,
        num_keys: int,
        cache: KVCache,
        *,
        num_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        rotary: RotaryTable | None,
    ) -> None:
        """positions: [slots, rows per slot], from slot 0 on"""
        num_slots = positions.size(0)
        self.num_rows = positions.numel()
        self._positions = positions.flatten()
        self._slots = torch.arange(num_slots, device=positions.device).repeat_interleave(positions.size(1))
        self.rotation = None
        if rotary is not None:
            self.rotation = rotary.at(self._positions, num_heads + 2 * num_kv_heads, num_kv_heads)
        self._layers = cache.layers()
        self._keys, self._values = cache.keys_and_values(0, num_slots, num_keys)
        self._mask = additive_mask(positions, num_keys, num_heads // num_kv_heads, dtype)

    def write(self, layer: int, rows: Tensor) -> None:
        """As of `AttentionMetadata`."""
        self._layers[layer][self._slots, self._positions] = rows

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """As of `AttentionMetadata`."""
        return attend(queries, self._keys[layer], self._values[layer], self._mask)


Launch = Callable[[Tensor, FixedAttentionMetadata, int, int], tuple[Tensor, Tensor]]
"""Runs layers kernel by kernel; as `Decoder.run_layers`."""


class LayerGraphs:
    """Runs ranges of layers; a graph is captured when its range and shape are first needed."""

    def __init__(
        self,
        launch_layers: Launch,
        fixed_attention_metadata: Callable[[Tensor, int], FixedAttentionMetadata],
        *,
        num_slots: int,
        num_positions: int,
        device: torch.device,
    ) -> None:
        """fixed_attention_metadata: of rows at positions [slots, rows per slot], with a number of keys. Its cache must
        have a place behind position `num_positions` - 1."""
        self._launch_layers, self._fixed_attention_metadata = launch_layers, fixed_attention_metadata
        self._num_slots, self._num_positions, self._device = num_slots, num_positions, device
        self._pool: tuple[int, int] | None = None
        self._inputs: dict[_Shape, _Inputs] = {}
        self._graphs: dict[tuple[int, int, _Shape], Callable[[], tuple[Tensor, Tensor]]] = {}
        # The attention whose positions are in place: a step runs several ranges with it.
        self._placed: AttentionMetadata | None = None
        self._rows = torch.empty(0)

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @staticmethod
    def can_run(attention: AttentionMetadata) -> bool:
        """Whether no slot has more rows than graphs take."""
        return max(segment.count for segment in attention.segments) <= _MAX_ROWS_PER_SLOT

    def run(self, hidden: Tensor, attention: AttentionMetadata, first: int, last: int) -> tuple[Tensor, Tensor]:
        """As `Decoder.run_layers`."""
        shape = self._shape_of(attention)
        if shape not in self._inputs:
            self._inputs[shape] = _Inputs(
                torch.zeros(shape.num_rows, hidden.size(1), dtype=hidden.dtype, device=self._device),
                torch.zeros(shape[:2], dtype=torch.long, device=self._device),
            )
        inputs = self._inputs[shape]
        if attention is not self._placed:
            self._place(attention, shape, inputs.positions)
        inputs.hidden.index_copy_(0, self._rows, hidden)
        key = (first, last, shape)
        if key not in self._graphs:
            self._graphs[key] = self._make(*key)
        out, residual = self._graphs[key]()
        # Copies: the next run of a graph overwrites its outputs, and rows that wait keep theirs.
        return out[self._rows], residual[self._rows]

    def _shape_of(self, attention: AttentionMetadata) -> _Shape:
        segments = attention.segments
        return _Shape(
            _bucket(max(segment.slot for segment in segments) + 1, 1, self._num_slots),
            _bucket(max(segment.count for segment in segments), 1, _MAX_ROWS_PER_SLOT),
            _bucket(max(segment.stop for segment in segments), _MIN_KEYS, self._num_positions),
        )

    def _place(self, attention: AttentionMetadata, shape: _Shape, positions: Tensor) -> None:
        """Say which rows of the fixed batch are those of `attention`, and where all of them are."""
        rows, places = [], [self._num_positions] * shape.num_rows
        for segment in attention.segments:
            start = segment.slot * shape.rows_per_slot
            rows += range(start, start + segment.count)
            places[start : start + segment.count] = range(segment.first, segment.stop)
        numbers = torch.tensor(places + rows).to(self._device)  # one copy for both
        positions.copy_(numbers[: shape.num_rows].view_as(positions))
        self._rows, self._placed = numbers[shape.num_rows :], attention

    def _make(self, first: int, last: int, shape: _Shape) -> Callable[[], tuple[Tensor, Tensor]]:
        inputs = self._inputs[shape]

        def launch() -> tuple[Tensor, Tensor]:
            attention = self._fixed_attention_metadata(inputs.positions, shape.num_keys)
            return self._launch_layers(inputs.hidden, attention, first, last)

        if self._device.type != "cuda":
            return launch
        # Libraries set themselves up on their first calls, which a capture must not see. Running the layers twice over
        # the same rows writes the same keys and values twice.
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            launch()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = launch()
        self._pool = graph.pool()  # graphs run one after the other and share their memory

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay


def _bucket(count: int, smallest: int, largest: int) -> int:
    """`smallest` times a power of two that holds `count`, at most `largest`."""
    size = smallest
    while size < count:
        size *= 2
    return min(size, largest)
