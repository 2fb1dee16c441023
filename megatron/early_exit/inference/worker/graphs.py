"""Parts of the model as CUDA graphs.

A layer over a few rows is some fifteen kernels of a few microseconds each, and starting them one by one takes longer
than they run. A graph starts all kernels of a part of the model at once (the layers between two exits, the block of an
exit), but its shapes and addresses are fixed. So the rows of a step are put into a larger batch of one of few shapes:
the same number of rows for each of some slots, and the same number of keys for all. Slots and positions are data. Rows
that only fill the batch are copies of another row, and write behind the last position of a slot.

All graphs are captured before the first step, over one set of buffers. What they do not hold runs kernel by kernel.

On the CPU the same batches run kernel by kernel: it saves nothing there, and is how tests see what a graph would do.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.inference.worker.attention import attend, attention_mask
from megatron.early_exit.platform.device import free_memory_bytes, to_device

if TYPE_CHECKING:
    from megatron.early_exit.inference.worker.attention import Attention, AttentionMetadata, Segment

log = logging.getLogger(__name__)

# Most steps have one row per slot. Several come with drafts that are verified and with rows that were deferred. A slot
# has more of those at most once in as many steps, or has a prompt, whose kernels are long enough.
_ROWS_PER_SLOT = (1, 4, 16)
MOST_ROWS_PER_SLOT = _ROWS_PER_SLOT[-1]
# From about this many rows on a GPU computes longer than it reads weights, and filling a batch costs time.
_MAX_ROWS = 256
# Key counts grow by four: masked keys are read too, but even this many, of all slots, are read in the time in which a
# layer's kernels are started (64 Ki keys of an 8B model are 256 MiB a layer).
_MIN_KEYS, _KEYS_FACTOR = 512, 4
_MAX_KEYS_OF_ALL_SLOTS = 2**16

_LOG_EVERY = 10


class GraphShape(NamedTuple):
    """Rows of some slots, and the keys that each of them may see."""

    num_slots: int
    rows_per_slot: int
    num_keys: int

    @property
    def num_rows(self) -> int:
        """Rows, those that fill it included."""
        return self.num_slots * self.rows_per_slot

    def holds(self, needed: GraphShape) -> bool:
        """Whether rows that need this many slots, rows per slot and keys fit."""
        return all(ours >= theirs for ours, theirs in zip(self, needed))


def graph_shapes(num_slots: int, num_positions: int) -> tuple[GraphShape, ...]:
    """The shapes for which graphs are captured, smallest first; at most 64, whatever the sizes.

    They hold every step with up to 16 rows per slot of up to 16 slots of up to 4,096 positions, and of more slots or
    positions those steps in which fixed shapes save time."""
    # Keys of some slots are copied beside each other first, which takes about three times as long as to read them where
    # they are: for more than a quarter of the slots all are read.
    slots = [size for size in _powers(1, 2, num_slots) if 4 * size <= num_slots] + [num_slots]
    keys = _powers(min(_MIN_KEYS, num_positions), _KEYS_FACTOR, num_positions)
    shapes = [GraphShape(*sizes) for sizes in itertools.product(slots, _ROWS_PER_SLOT, keys)]
    return tuple(
        shape
        for shape in shapes
        if shape.num_rows <= _MAX_ROWS and shape.num_slots * shape.num_keys <= _MAX_KEYS_OF_ALL_SLOTS
    )


def _powers(smallest: int, factor: int, largest: int) -> list[int]:
    """`smallest` times powers of `factor`, up to `largest`, which is the last."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(sizes[-1] * factor, largest))
    return sizes


def smallest_shape(shapes: Sequence[GraphShape], segments: Sequence[Segment]) -> GraphShape | None:
    """The first of `shapes`, in the order of `graph_shapes`, that holds the rows of `segments`, if one does."""
    needed = GraphShape(
        len(segments),
        max(segment.num_rows for segment in segments),
        max(segment.stop for segment in segments),
    )
    return next((shape for shape in shapes if shape.holds(needed)), None)


class _Buffers:
    """What graphs read and write, at fixed addresses: one set for all shapes, each of which uses the first part."""

    def __init__(self, shapes: Sequence[GraphShape], hidden_size: int, attention: Attention) -> None:
        cache = attention.cache
        num_rows = max(shape.num_rows for shape in shapes)
        self.hidden = torch.zeros(num_rows, hidden_size, dtype=cache.dtype, device=cache.device)
        self.residual = torch.zeros_like(self.hidden)
        num_slots = max(shape.num_slots for shape in shapes)
        self.numbers = torch.zeros(4 * num_rows + num_slots, dtype=torch.long, device=cache.device)
        """See `_Numbers`."""
        self.rotation = None if attention.rotary is None else attention.rotary.between(0, 1).repeat(num_rows, 1, 1)
        mask_size = max(_num_query_rows(shape, attention) * shape.num_keys for shape in shapes)
        self.mask = torch.zeros(mask_size, dtype=cache.dtype, device=cache.device)


def _num_query_rows(shape: GraphShape, attention: Attention) -> int:
    """Rows of the mask: see `attention_mask`."""
    return shape.num_rows * (1 if shape.rows_per_slot == 1 else attention.queries_per_kv_head)


class _Numbers:
    """What the host says of the rows of a batch of `shape`: views of the first part of a buffer."""

    def __init__(self, shape: GraphShape, buffer: Tensor) -> None:
        sizes = (shape.num_rows, shape.num_rows, shape.num_rows, shape.num_slots)
        self.positions, self.cache_rows, self.copied, self.slots = buffer[: sum(sizes)].split(sizes)
        """[rows] position in its slot, index into `KVCache.rows`, row of the step that it is a copy of; [slots] slot"""
        self.step_rows = buffer[sum(sizes) :]
        """[rows of the step] the row of the batch"""


class FixedAttentionMetadata:
    """`AttentionMetadata` of a shape, at fixed addresses: made by `update` of the numbers in the buffers."""

    def __init__(self, shape: GraphShape, buffers: _Buffers, attention: Attention) -> None:
        self.num_rows = num_rows = shape.num_rows
        self._shape, self._attention, self._cache = shape, attention, attention.cache
        self._numbers = _Numbers(shape, buffers.numbers)
        self.rotation = None if buffers.rotation is None else buffers.rotation[:num_rows]
        num_query_rows = _num_query_rows(shape, attention)
        mask = buffers.mask[: num_query_rows * shape.num_keys]
        self._mask = mask.view(shape.num_slots, 1, num_query_rows // shape.num_slots, shape.num_keys)
        self._has_all_slots = shape.num_slots == self._cache.num_slots
        if self._has_all_slots:
            self._keys, self._values = self._cache.keys_and_values(0, shape.num_slots, shape.num_keys)

    def update(self) -> None:
        """Make what layers share."""
        positions = self._numbers.positions
        rotary = self._attention.rotary
        if self.rotation is not None and rotary is not None:
            self.rotation.copy_(rotary.at(positions))
        per_slot = positions.view(self._shape.num_slots, -1)
        self._mask.copy_(attention_mask(self._attention, per_slot, self._shape.num_keys))

    def write(self, layer: int, rows: Tensor) -> None:
        """As of `AttentionMetadata`."""
        self._cache.rows[layer].index_copy_(0, self._numbers.cache_rows, rows)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """As of `AttentionMetadata`."""
        if self._has_all_slots:
            keys, values = self._keys[layer], self._values[layer]
        else:
            keys, values = self._cache.copy_of_keys_and_values(layer, self._numbers.slots, self._shape.num_keys)
        return attend(queries, keys, values, self._mask)


Part = Hashable

Launch = Callable[[Tensor, FixedAttentionMetadata], tuple[Tensor, Tensor]]
"""Runs a part of the model kernel by kernel over hidden states [rows, h]; returns them behind it, and the residual
after attention, each [rows, h]."""


class _ShapeGraphs(NamedTuple):
    """What starts the graphs of one shape."""

    update: Callable[[], None]
    """`FixedAttentionMetadata.update`"""
    parts: dict[Part, Callable[[], None]]
    """From the hidden states in the buffers to what the part returns, there."""


class ModelGraphs:
    """Runs parts of a model as graphs, one for each part and shape. Of one rank: no part exchanges anything."""

    def __init__(self, parts: Mapping[Part, Launch], hidden_size: int, attention: Attention) -> None:
        """parts: what can be run. The cache of `attention` must have one position more than sequences have."""
        self._parts, self._attention = parts, attention
        self._filler_position = attention.cache.num_positions - 1
        self._shapes = graph_shapes(attention.cache.num_slots, self._filler_position)
        self._buffers = _Buffers(self._shapes, hidden_size, attention)
        self._graphs: dict[GraphShape, _ShapeGraphs] = {}
        # The batch that the buffers describe: a step runs several parts with it.
        self._current: AttentionMetadata | None = None
        self._shape: GraphShape | None = None
        self.seconds, self.num_bytes = 0.0, 0
        """What `capture` took on a GPU."""

    @property
    def num_graphs(self) -> int:
        """Graphs that are there: all from `capture` on."""
        return sum(1 + len(graphs.parts) for graphs in self._graphs.values())

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all graphs; nothing else ever does. Raises ValueError if the GPU's memory does not hold them."""
        device = self._attention.cache.device
        if device.type != "cuda":
            self._capture_all(None)
            return
        torch.cuda.empty_cache()  # as a capture does: what it gives back is not what graphs take
        started, free = time.perf_counter(), free_memory_bytes()
        try:
            self._capture_all(_CudaCapture(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)))
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(
                f"{free / 2**30:.1f} GiB of the GPU's memory are free beside weights, keys and values, too little for "
                "CUDA graphs; choose fewer max_requests or a smaller max_length, or switch the graphs off"
            ) from error
        self.seconds, self.num_bytes = time.perf_counter() - started, free - free_memory_bytes()
        log.info(
            "captured %d CUDA graphs (%d shapes, %d parts of the model) in %.1f s; they take %.2f GiB",
            self.num_graphs, len(self._shapes), len(self._parts), self.seconds, self.num_bytes / 2**30,
        )  # fmt: skip

    def _capture_all(self, cuda: _CudaCapture | None) -> None:
        # The largest first: the others then find room in its memory.
        for number, shape in enumerate(reversed(self._shapes), 1):
            self._graphs[shape] = self._capture_shape(shape, cuda)
            if cuda is not None and number % _LOG_EVERY == 0:
                log.info("capturing CUDA graphs: %d of %d shapes", number, len(self._shapes))

    def _capture_shape(self, shape: GraphShape, cuda: _CudaCapture | None) -> _ShapeGraphs:
        metadata = FixedAttentionMetadata(shape, self._buffers, self._attention)
        self._buffers.numbers.zero_()
        _Numbers(shape, self._buffers.numbers).cache_rows.fill_(self._filler_position)  # of slot 0: of no sequence
        update = _graph(metadata.update, cuda)
        parts = {part: _graph(self._over_buffers(launch, metadata), cuda) for part, launch in self._parts.items()}
        return _ShapeGraphs(update, parts)

    def _over_buffers(self, launch: Launch, metadata: FixedAttentionMetadata) -> Callable[[], None]:
        hidden = self._buffers.hidden[: metadata.num_rows]
        residual = self._buffers.residual[: metadata.num_rows]

        def launch_over_buffers() -> None:
            outputs = launch(hidden, metadata)
            hidden.copy_(outputs[0])
            residual.copy_(outputs[1])

        return launch_over_buffers

    def run(self, parts: Sequence[Part], hidden: Tensor, attention: AttentionMetadata) -> tuple[Tensor, Tensor] | None:
        """As `Launch`, of parts one after the other. None if there is no graph for so many rows, slots or keys."""
        if attention is not self._current:
            self._current, self._shape = attention, smallest_shape(self._shapes, attention.segments)
            if self._shape is not None:
                self._describe(attention.segments, self._shape)
        if self._shape is None:
            return None
        numbers = _Numbers(self._shape, self._buffers.numbers)
        torch.index_select(hidden, 0, numbers.copied, out=self._buffers.hidden[: self._shape.num_rows])
        for part in parts:
            self._graphs[self._shape].parts[part]()
        # Copies: the next run overwrites the buffers, and rows that are deferred keep their hidden states.
        rows = numbers.step_rows[: hidden.size(0)]
        return self._buffers.hidden.index_select(0, rows), self._buffers.residual.index_select(0, rows)

    def _describe(self, segments: Sequence[Segment], shape: GraphShape) -> None:
        """Write into the buffers which rows of the batch are those of `segments`, and what layers share."""
        cache, count = self._attention.cache, shape.rows_per_slot
        # All slots are where they are, some are those that are used; one of them is taken several times to fill it.
        slots = [segment.slot for segment in segments]
        slots = list(range(shape.num_slots)) if shape.num_slots == cache.num_slots else slots
        slots += slots[:1] * (shape.num_slots - len(slots))
        positions, copied = [self._filler_position] * shape.num_rows, [0] * shape.num_rows
        step_rows: list[int] = []
        cache_rows = [cache.row_numbers(slot)[self._filler_position] for slot in slots for _ in range(count)]
        for segment in segments:
            start = slots.index(segment.slot) * count
            used = slice(start, start + segment.num_rows)
            positions[used] = range(segment.first, segment.stop)
            cache_rows[used] = cache.row_numbers(segment.slot)[segment.first : segment.stop]
            copied[used] = range(len(step_rows), len(step_rows) + segment.num_rows)
            step_rows += range(start, start + segment.num_rows)
        numbers = to_device([*positions, *cache_rows, *copied, *slots, *step_rows], cache.device)
        self._buffers.numbers[: numbers.numel()].copy_(numbers)
        self._graphs[shape].update()


class _CudaCapture(NamedTuple):
    pool: torch.cuda._POOL_HANDLE
    """The memory that graphs share, although they run in any order: what outlives one is in the buffers."""
    stream: torch.cuda.Stream


def _graph(launch: Callable[[], None], cuda: _CudaCapture | None) -> Callable[[], None]:
    """What starts the kernels that `launch` starts: their graph; on the CPU `launch` itself."""
    if cuda is None:
        return launch
    # Libraries set themselves up when they are first called, which a capture must not see: everything runs once before.
    current = torch.cuda.current_stream()
    cuda.stream.wait_stream(current)
    with torch.cuda.stream(cuda.stream):
        launch()
    current.wait_stream(cuda.stream)
    graph = torch.cuda.CUDAGraph()
    # What other threads do meanwhile is no concern of this capture.
    with torch.cuda.graph(graph, pool=cuda.pool, stream=cuda.stream, capture_error_mode="thread_local"):
        launch()
    return graph.replay
