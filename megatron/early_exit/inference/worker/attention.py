"""Which rows a step computes, and how they attend: everything that is the same for all layers of a range.

A row is one position of one slot. A batch of rows is made of segments, each some consecutive positions of one slot, in
the order of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.inference.worker.kv_cache import KVCache


class Segment(NamedTuple):
    """Positions first, first + 1, ..., first + count - 1 of a slot."""

    slot: int
    first: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.count


class RotaryTable:
    """Rotary embeddings as multiplication by complex numbers: channels 2i and 2i + 1 of a head are one number.

    (The usual form, with channels i and i + d/2 as a pair, takes several times as many small operations. `weights.py`
    puts the channels in this order.) What is not rotated, values and the rest of the channels, is multiplied by 1."""

    def __init__(self, num_positions: int, head_size: int, frequencies: Tensor, device: torch.device) -> None:
        """frequencies: [rotated channels / 2], angle between one position and the next"""
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies.float().cpu())
        angles = F.pad(angles, (0, head_size // 2 - frequencies.numel()))
        self._table = torch.polar(torch.ones_like(angles), angles).to(device)  # [positions, d / 2]

    def at(self, positions: Tensor, num_heads: int, num_values: int) -> Tensor:
        """[rows, heads, d / 2], complex: for queries and keys, and for the values behind them."""
        rotation = self._table[positions, None].repeat(1, num_heads, 1)
        rotation[:, num_heads - num_values :] = 1.0
        return rotation


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """[rows, heads, d] after the rotation, in place where that can be done. rotation: [rows, heads, d / 2], complex"""
    pairs = heads.float().view(*rotation.shape, 2)
    torch.view_as_complex(pairs).mul_(rotation)
    return pairs.view(heads.shape).to(heads.dtype)


@dataclass(frozen=True)
class _Group:
    """Segments that attend in one call: consecutive slots, equally many rows each."""

    first_row: int
    num_slots: int
    rows_per_slot: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    """Of each layer [slots, kv heads, keys, d]"""
    mask: Tensor | None
    """As of `additive_mask`; None: every row sees all keys."""
    is_causal: bool
    """The rows are the first of their slot: plain causal attention."""

    @property
    def num_rows(self) -> int:
        return self.num_slots * self.rows_per_slot


# Rows of a segment from which on plain causal attention pays.
_MANY_ROWS = 16


class AttentionMetadata:
    """A batch of rows: where they are written, where they are on the rotary circle, what they attend to."""

    def __init__(
        self,
        segments: Sequence[Segment],
        cache: KVCache,
        *,
        num_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        rotary: RotaryTable | None,
    ) -> None:
        """num_heads, num_kv_heads: of queries, and of keys and values, on this rank."""
        self.segments = tuple(segments)
        self.num_rows = sum(segment.count for segment in self.segments)
        self._per_kv_head = num_heads // num_kv_heads
        self._cache, self._dtype = cache, dtype
        positions = [position for s in self.segments for position in range(s.first, s.stop)]
        self.positions = torch.tensor(positions, device=device)
        self.rotation = None
        if rotary is not None:
            self.rotation = rotary.at(self.positions, num_heads + 2 * num_kv_heads, num_kv_heads)
        if len(self.segments) == 1:
            (segment,) = self.segments
            self._write_views = cache.write_views(segment.slot, segment.first, segment.stop)
        else:
            self._layers = cache.layers()
            self._slots = torch.tensor([s.slot for s in self.segments for _ in range(s.count)], device=device)
        self._groups = self._make_groups()

    def _make_groups(self) -> list[_Group]:
        groups, first_row, start = [], 0, 0
        for index, segment in enumerate(self.segments):
            following = self.segments[index + 1] if index + 1 < len(self.segments) else None
            if following is not None and following.slot == segment.slot + 1 and following.count == segment.count:
                continue
            members = self.segments[start : index + 1]
            groups.append(self._group(members, first_row))
            first_row += groups[-1].num_rows
            start = index + 1
        return groups

    def _group(self, members: Sequence[Segment], first_row: int) -> _Group:
        count = members[0].count
        num_keys = max(member.stop for member in members)
        is_causal = len(members) == 1 and members[0].first == 0 and count >= _MANY_ROWS
        sees_all = count == 1 and all(member.stop == num_keys for member in members)
        mask = None
        if not (is_causal or sees_all):
            positions = self.positions[first_row : first_row + len(members) * count].view(len(members), count)
            mask = additive_mask(positions, num_keys, self._per_kv_head, self._dtype)
        keys, values = self._cache.keys_and_values(members[0].slot, len(members), num_keys)
        return _Group(first_row, len(members), count, keys, values, mask, is_causal)

    def write(self, layer: int, rows: Tensor) -> None:
        """Put keys and values of the rows into a layer's cache. rows: [rows, 2 * kv heads, d], keys first"""
        if len(self.segments) == 1:
            self._write_views[layer].copy_(rows)
        else:
            self._layers[layer][self._slots, self.positions] = rows

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Attention of each row to all positions of its slot up to its own, which must have been written.

        queries: [rows, heads, d]. Returns [rows, heads * d]."""
        if len(self._groups) == 1:
            return self._attend(self._groups[0], layer, queries)
        parts = [
            self._attend(group, layer, queries[group.first_row : group.first_row + group.num_rows])
            for group in self._groups
        ]
        return torch.cat(parts)

    def _attend(self, group: _Group, layer: int, queries: Tensor) -> Tensor:
        keys, values = group.keys[layer], group.values[layer]
        if group.is_causal:
            heads = queries.transpose(0, 1)[None]  # [1, heads, rows, d]
            out = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1).reshape(group.num_rows, -1)
        return attend(queries, keys, values, group.mask)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of slots with equally many rows each.

    queries: [slots * rows per slot, heads, d]; keys, values: [slots, kv heads, keys, d]; mask: as of `additive_mask`,
    or None: every row sees all keys. Returns [slots * rows per slot, heads * d]."""
    num_rows, num_heads, d = queries.shape
    slots, num_kv_heads = keys.shape[:2]
    count, per_kv = num_rows // slots, num_heads // num_kv_heads
    # The queries that share a key/value head stand in the place of query rows, so that no key is repeated.
    if count == 1:
        heads = queries.unflatten(1, (-1, per_kv))  # [slots, kv heads, queries, d]
        out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
        return out.reshape(slots, num_heads * d)
    heads = queries.reshape(slots, count, -1, per_kv, d).transpose(1, 2).reshape(slots, -1, count * per_kv, d)
    out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
    out = out.view(slots, -1, count, per_kv, d).transpose(1, 2)
    return out.reshape(num_rows, num_heads * d)


def additive_mask(positions: Tensor, num_keys: int, per_kv_head: int, dtype: torch.dtype) -> Tensor:
    """[slots, 1, rows per slot * queries per kv head, keys]: 0 where a row sees a key, else -inf.

    positions: [slots, rows per slot]"""
    allowed = torch.arange(num_keys, device=positions.device) <= positions[..., None]  # [slots, rows, keys]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device).masked_fill_(~allowed, -torch.inf)
    return mask.repeat_interleave(per_kv_head, dim=1)[:, None]
