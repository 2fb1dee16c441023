"""Keys and values of all requests: a preallocated slot for each request that runs, one cache for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.inference.stage_layers import layer_ranges

DEFAULT_SLOTS, DEFAULT_POSITIONS = 16, 4096
"""At most so many slots, and of at most so many tokens each, unless others are asked for."""

GIB = 2**30


@dataclass(frozen=True)
class CacheSize:
    """Memory for keys and values, on one rank."""

    num_slots: int
    """Requests that run at once."""
    num_positions: int
    """Tokens of the longest sequence."""
    bytes_per_token: int

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.num_positions * self.bytes_per_token

    def __str__(self) -> str:
        return (
            f"{self.num_slots} slots x {self.num_positions:,} tokens x {self.bytes_per_token:,} bytes a token = "
            f"{self.num_bytes / GIB:.2f} GiB"
        )


def bytes_per_token(
    description: ModelDescription, tp_size: int, bytes_per_element: int, layers: range | None = None
) -> int:
    """What the keys and values of one token take on each rank, in `layers` (indices from 0, default all) and the
    blocks of their exits."""
    model, exits = description.model, description.exits
    layers = range(model.num_layers) if layers is None else layers
    numbers = range(layers.start + 1, layers.stop + 1)
    num_blocks = sum(head.block for head in exits.heads_of(numbers))
    num_kv_heads = max(model.num_kv_heads // tp_size, 1)
    return (len(layers) + num_blocks) * 2 * num_kv_heads * model.head_size * bytes_per_element


def largest_bytes_per_token(
    description: ModelDescription, tp_size: int, bytes_per_element: int, layers_per_stage: Sequence[int]
) -> int:
    """`bytes_per_token` of the pipeline stage where it is largest. layers_per_stage: empty: one stage has all."""
    ranges = layer_ranges(layers_per_stage or (description.model.num_layers,))
    return max(bytes_per_token(description, tp_size, bytes_per_element, layers) for layers in ranges)


@dataclass(frozen=True)
class CacheMemory:
    """Bytes that a rank has for keys and values."""

    share: int
    """To be taken unless certain sizes are asked for."""
    limit: int
    """To be taken at most."""


def cache_memory(free: int, is_gpu: bool, stated_gib: float | None = None) -> CacheMemory:
    """What keys and values may take of `free` bytes, which are left beside the weights.

    stated_gib: take this much (GiB). By default it is most of a GPU, whose memory serves nothing else, and little of a
    machine's main memory. Raises ValueError if more is stated than is free."""
    if stated_gib is not None:
        if stated_gib * GIB > free:
            raise ValueError(f"kv_cache_gib is {stated_gib:g}, but {free / GIB:,.2f} GiB are free beside the weights")
        return CacheMemory(int(stated_gib * GIB), int(stated_gib * GIB))
    if is_gpu:
        return CacheMemory(int(_GPU_SHARE * free), int(_GPU_SHARE * free))
    return CacheMemory(min(_MAIN_MEMORY_BYTES, free // 2), free)


# Of what is free beside the weights; the rest is for what a step computes, and for graphs.
_GPU_SHARE = 0.9
_MAIN_MEMORY_BYTES = 4 * GIB


def choose_cache_size(
    token_bytes: int, memory: CacheMemory, longest: int, max_requests: int | None = None, max_length: int | None = None
) -> CacheSize:
    """As many slots as the share of `memory` holds, at most `max_requests` (default `DEFAULT_SLOTS`).

    token_bytes: of `bytes_per_token`. longest: sequence that the model takes. max_length: of the slots, default that or
    `DEFAULT_POSITIONS`, whichever is less. With both given, there are as many slots as asked for.
    Raises ValueError if the limit holds no slot, or fewer than that; it says which sizes fit."""
    num_positions = min(longest, DEFAULT_POSITIONS) if max_length is None else max_length
    most = DEFAULT_SLOTS if max_requests is None else max_requests
    least = 1 if max_requests is None or max_length is None else max_requests
    slot_bytes, num_tokens = num_positions * token_bytes, memory.limit // token_bytes
    if least * slot_bytes <= memory.limit:
        return CacheSize(max(least, min(most, memory.share // slot_bytes)), num_positions, token_bytes)
    fits = [f"{least} request{'s' * (least > 1)} of {num_tokens // least} tokens"] if num_tokens >= least else []
    fits += [f"{num_tokens // num_positions} of {num_positions}"] if num_tokens >= num_positions else []
    raise ValueError(
        f"max_requests {least} and max_length {num_positions} need {_in_units(least * slot_bytes)} for keys and "
        f"values, but {_in_units(memory.limit)} of memory are free for them (kv_cache_gib, what the weights leave); "
        + (f"at most {' or '.join(fits)} fit" if fits else f"at most {num_tokens} tokens fit")
    )


def _in_units(num_bytes: int) -> str:
    if num_bytes < GIB // 10:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / GIB:,.1f} GiB"


class KVCache:
    """[layers, slots, positions, 2, kv heads / tp, d]: keys (rotated) at index 0 of the fourth dimension, values at 1.

    Whoever writes a row says where; which rows of a slot are valid is known to the engine alone.

    A view of one layer costs as much as a small computation, so rows of a step take theirs for all layers at once."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_positions: int,
        num_kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_slots, num_positions, 2, num_kv_heads, head_size)
        # Zeros: what lies behind a slot's last row is masked, and masked NaN would still spoil a sum. The memory of
        # rows that no request reaches is never touched.
        self._cache = torch.zeros(shape, dtype=dtype, device=device)
        self.num_slots, self.num_positions = num_slots, num_positions
        self.num_kv_heads, self.head_size, self.dtype, self.device = num_kv_heads, head_size, dtype, device
        self.rows = tuple(layer.flatten(0, 1) for layer in self.layers())
        """Of each layer [slots * positions, 2 * kv heads / tp, d]; see `row_numbers`."""
        self.size = CacheSize(num_slots, num_positions, self._cache.nbytes // (num_slots * num_positions))

    def layers(self) -> tuple[Tensor, ...]:
        """Of each layer [slots, positions, 2 * kv heads / tp, d]."""
        return self._cache.flatten(3, 4).unbind(0)

    def row_numbers(self, slot: int) -> range:
        """Indices into `rows` of the positions of a slot."""
        return range(slot * self.num_positions, (slot + 1) * self.num_positions)

    def write_views(self, slot: int, first: int, stop: int) -> tuple[Tensor, ...]:
        """Of each layer [stop - first, 2 * kv heads / tp, d]: where rows of one slot are written."""
        return self._cache[:, slot, first:stop].flatten(2, 3).unbind(0)

    def keys_and_values(
        self, first_slot: int, num_slots: int, num_keys: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of each layer the first `num_keys` keys, and values, of some slots: [slots, kv heads / tp, keys, d]."""
        cached = self._cache[:, first_slot : first_slot + num_slots, :num_keys]
        keys, values = cached.permute(3, 0, 1, 4, 2, 5)
        return keys.unbind(0), values.unbind(0)

    def copy_of_keys_and_values(self, layer: int, slots: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """As `keys_and_values`, of one layer and of slots wherever they are."""
        cached = self._cache[layer, :, :num_keys].index_select(0, slots)
        keys, values = cached.permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values

    def copy_slot(self, source: int, target: int, count: int) -> None:
        """Give `target` the first `count` positions of `source`, in all layers."""
        self._cache[:, target, :count] = self._cache[:, source, :count]

    def clear(self, slot: int, first: int, stop: int) -> None:
        """Make these positions of a slot finite again, in all layers."""
        self._cache[:, slot, first:stop] = 0

    def gather_slots(self, first: int, sources: Tensor, count: int) -> None:
        """Slot `first` + i gets the first `count` positions of slot `sources[i]`, all at once (beam search)."""
        stop = first + sources.numel()
        self._cache[:, first:stop, :count] = self._cache[:, sources, :count]
