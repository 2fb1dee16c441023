"""Keys and values of all requests: a preallocated slot for each request that runs, one cache for each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.platform.device import free_memory_bytes


def check_cache_fits(
    description: ModelDescription, num_slots: int, num_positions: int | None, tp_size: int, bytes_per_element: int
) -> None:
    """Raise ValueError with the largest sizes that fit, if the keys and values of `num_slots` sequences of
    `num_positions` tokens (None: as many as the model takes) take more than this rank's free memory."""
    model, exits = description.model, description.exits
    num_positions = description.max_position_embeddings if num_positions is None else num_positions
    num_layers = model.num_layers + (len(exits.exit_layer_nums) if exits.use_exit_block else 0)
    num_kv_heads = max(model.num_kv_heads // tp_size, 1)
    bytes_per_token = num_layers * 2 * num_kv_heads * model.head_size * bytes_per_element
    needed, free = num_slots * num_positions * bytes_per_token, free_memory_bytes()
    if needed <= free:
        return
    num_tokens = free // bytes_per_token
    fits = [f"{num_slots} requests of {num_tokens // num_slots} tokens"] if num_tokens >= num_slots else []
    fits += [f"{num_tokens // num_positions} of {num_positions}"] if num_tokens >= num_positions else []
    raise ValueError(
        f"max_requests {num_slots} and max_length {num_positions} need {needed / 2**30:,.1f} GiB for keys and values, "
        f"but {free / 2**30:,.1f} GiB of memory are free; "
        + (f"at most {' or '.join(fits)} fit" if fits else f"at most {num_tokens} tokens fit")
    )


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

    def clear_slot(self, slot: int) -> None:
        """Make all of a slot's keys and values finite again."""
        self._cache[:, slot] = 0

    def gather_slots(self, first: int, sources: Tensor, count: int) -> None:
        """Slot `first` + i gets the first `count` positions of slot `sources[i]`, all at once (beam search)."""
        stop = first + sources.numel()
        self._cache[:, first:stop, :count] = self._cache[:, sources, :count]
