"""Which rows a step computes, and how they attend: everything that is the same for all layers of a range.

A row is one position of one slot. A batch of rows is made of segments, each some consecutive positions of one slot, in
the order of slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.inference.worker.kv_cache import KVCache
from megatron.early_exit.platform.device import to_device


class Segment(NamedTuple):
    """Positions first, first + 1, ..., first + num_rows - 1 of a slot."""

    slot: int
    first: int
    num_rows: int

    @property
    def stop(self) -> int:
        return self.first + self.num_rows


class RotaryTable:
    """Rotary embeddings as multiplication by complex numbers: channels 2i and 2i + 1 of a head are one number.

    (The usual form, with channels i and i + d/2 as a pair, takes several times as many small operations. `weights.py`
    puts the channels in this order.) What is not rotated, values and the rest of the channels, is multiplied by 1."""

    def __init__(
        self,
        num_positions: int,
        head_size: int,
        frequencies: Tensor,
        num_heads: int,
        num_values: int,
        device: torch.device,
    ) -> None:
        """frequencies: [rotated channels / 2], angle between one position and the next; num_heads: of queries, keys and
        values, in this order; num_values: of values."""
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies.float().cpu())
        angles = F.pad(angles, (0, head_size // 2 - frequencies.numel()))
        rotation = torch.polar(torch.ones_like(angles), angles)
        self._table = torch.stack([rotation, torch.ones_like(rotation)], 1).to(device)  # [positions, 2, d / 2]
        self._is_value = torch.tensor([0] * (num_heads - num_values) + [1] * num_values, device=device)

    def at(self, positions: Tensor) -> Tensor:
        """[rows, heads, d / 2], complex. positions: [rows]"""
        return self._table.index_select(0, positions).index_select(1, self._is_value)

    def between(self, first: int, stop: int) -> Tensor:
        """As `at`, of positions first, first + 1, ..., stop - 1."""
        return self._table[first:stop].index_select(1, self._is_value)


class MaskTable:
    """Additive masks: 0 where a row sees a key, else -inf.

    The mask of a row is a window on one vector, some zeros followed by -inf, so it is one copy."""

    def __init__(self, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        vector = torch.zeros(2 * num_positions, dtype=dtype, device=device)
        vector[num_positions:] = -torch.inf
        self._last = num_positions - 1
        self._windows = vector.as_strided((num_positions, num_positions), (1, 1))

    def at(self, positions: Tensor, num_keys: int) -> Tensor:
        """[rows, keys]: each row sees keys up to its own position. positions: [rows]"""
        return self._windows[:, :num_keys].index_select(0, self._last - positions)


class Attention:
    """What the attention of all rows of one decoder shares: the cache and the tables."""

    def __init__(self, cache: KVCache, num_heads: int, frequencies: Tensor | None) -> None:
        """num_heads: of queries, on this rank; frequencies: as of `RotaryTable`, None: no rotary embeddings."""
        self.cache, self.num_heads = cache, num_heads
        self.queries_per_kv_head = num_heads // cache.num_kv_heads
        self.masks = MaskTable(cache.num_positions, cache.dtype, cache.device)
        self.rotary = None
        if frequencies is not None:
            self.rotary = RotaryTable(
                cache.num_positions,
                cache.head_size,
                frequencies,
                num_heads=num_heads + 2 * cache.num_kv_heads,
                num_values=cache.num_kv_heads,
                device=cache.device,
            )


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """[rows, heads, d] after the rotation, in place where that can be done. rotation: [rows, heads, d / 2], complex"""
    pairs = heads.float().view(*rotation.shape, 2)
    torch.view_as_complex(pairs).mul_(rotation)
    return pairs.view(heads.shape).to(heads.dtype)


class _Span(NamedTuple):
    """Segments that attend in one call: all slots from the first on, each with as many rows as the longest segment.
    Rows that are not there are copies of others."""

    segments: tuple[Segment, ...]
    num_slots: int
    rows_per_slot: int

    @classmethod
    def of(cls, segments: tuple[Segment, ...]) -> _Span:
        num_slots = segments[-1].slot + 1 - segments[0].slot
        return cls(segments, num_slots, max(one.num_rows for one in segments))

    @property
    def num_computed(self) -> int:
        """Rows, copies included."""
        return self.num_slots * self.rows_per_slot

    @property
    def num_rows(self) -> int:
        return sum(one.num_rows for one in self.segments)

    @property
    def num_keys(self) -> int:
        return max(one.stop for one in self.segments)


@dataclass(frozen=True)
class _Group:
    """A call of attention."""

    first_row: int
    num_rows: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    """Of each layer [slots, kv heads, keys, d]"""
    mask: Tensor | None
    """As of `attend`; None: every row sees all keys."""
    is_causal: bool
    """The rows are the first of their slot: plain causal attention."""
    computed: Tensor | None = None
    """[slots * rows per slot]: of each row that is computed the row, of those from `first_row` on, that it is or is a
    copy of; None: there are no copies."""
    wanted: Tensor | None = None
    """[rows]: which of those are no copies."""


# Rows of a segment from which on plain causal attention pays.
_MANY_ROWS = 16

# Products of attention that a call takes as long as, measured on two cores of an EPYC; so much may be computed in vain
# to save one.
_PRODUCTS_OF_A_CALL = 2**15


class AttentionMetadata:
    """A batch of rows: where they are written, how they are rotated, what they attend to.

    Everything but `segments` and `num_rows` is made when a layer first needs it, and then shared by all layers: rows
    whose layers run as CUDA graphs need none of it."""

    def __init__(self, segments: Sequence[Segment], attention: Attention) -> None:
        self.segments = tuple(segments)
        self.num_rows = sum(segment.num_rows for segment in self.segments)
        self._attention = attention
        self._is_one_segment = len(self.segments) == 1

    def prepare(self) -> None:
        """Make what the layers share now."""
        _ = self.rotation, self._groups

    @cached_property
    def positions(self) -> Tensor:
        """[rows]"""
        if self._is_one_segment:
            (segment,) = self.segments
            return torch.arange(segment.first, segment.stop, device=self._attention.cache.device)
        return self._positions_and_cache_rows[0]

    @cached_property
    def rotation(self) -> Tensor | None:
        """As of `RotaryTable.at`; None: no rotary embeddings."""
        if self._attention.rotary is None:
            return None
        if self._is_one_segment:
            (segment,) = self.segments
            return self._attention.rotary.between(segment.first, segment.stop)
        return self._attention.rotary.at(self.positions)

    @cached_property
    def _write_views(self) -> tuple[Tensor, ...]:
        (segment,) = self.segments
        return self._attention.cache.write_views(segment.slot, segment.first, segment.stop)

    @cached_property
    def _positions_and_cache_rows(self) -> tuple[Tensor, Tensor]:
        """Each [rows]: positions, and indices into `KVCache.rows`. In one copy to the device."""
        cache = self._attention.cache
        positions = [position for s in self.segments for position in range(s.first, s.stop)]
        cache_rows = [row for s in self.segments for row in cache.row_numbers(s.slot)[s.first : s.stop]]
        both = to_device([*positions, *cache_rows], cache.device).view(2, -1)
        return both[0], both[1]

    @cached_property
    def _groups(self) -> list[_Group]:
        groups, first_row = [], 0
        for span in self._spans():
            groups.append(self._group(span, first_row))
            first_row += span.num_rows
        return groups

    def _spans(self) -> list[_Span]:
        """Spans without copies, joined where what is computed in vain then takes no longer than another call."""
        products = self._attention.num_heads * self._attention.cache.head_size
        spans: list[_Span] = []
        for one in self._even_spans():
            if spans:
                joined = _Span.of(spans[-1].segments + one.segments)
                in_vain = joined.num_computed - spans[-1].num_computed - one.num_computed
                if in_vain * joined.num_keys * products <= _PRODUCTS_OF_A_CALL:
                    spans[-1] = joined
                    continue
            spans.append(one)
        return spans

    def _even_spans(self) -> Iterator[_Span]:
        """Of consecutive slots with equally many rows each."""
        start = 0
        for index, segment in enumerate(self.segments):
            following = self.segments[index + 1] if index + 1 < len(self.segments) else None
            if following is None or following.slot != segment.slot + 1 or following.num_rows != segment.num_rows:
                yield _Span.of(self.segments[start : index + 1])
                start = index + 1

    def _group(self, span: _Span, first_row: int) -> _Group:
        members, count, num_keys = span.segments, span.rows_per_slot, span.num_keys
        is_causal = len(members) == 1 and members[0].first == 0 and count >= _MANY_ROWS
        sees_all = count == 1 and min(one.stop for one in members) == num_keys
        positions, computed, wanted = self.positions[first_row : first_row + span.num_rows], None, None
        if span.num_computed > span.num_rows:
            computed, wanted = _padded(span, self._attention.cache.device)
            positions = positions[computed]
        mask = None
        if not (is_causal or sees_all):
            mask = attention_mask(self._attention, positions.view(span.num_slots, count), num_keys)
        keys, values = self._attention.cache.keys_and_values(members[0].slot, span.num_slots, num_keys)
        return _Group(first_row, span.num_rows, keys, values, mask, is_causal, computed, wanted)

    def write(self, layer: int, rows: Tensor) -> None:
        """Put keys and values of the rows into a layer's cache. rows: [rows, 2 * kv heads, d], keys first"""
        if self._is_one_segment:
            self._write_views[layer].copy_(rows)
        else:
            self._attention.cache.rows[layer].index_copy_(0, self._positions_and_cache_rows[1], rows)

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
        if group.computed is None:
            return attend(queries, keys, values, group.mask)
        return attend(queries[group.computed], keys, values, group.mask)[group.wanted]


def _padded(span: _Span, device: torch.device) -> tuple[Tensor, Tensor]:
    """`_Group.computed` and `_Group.wanted` of segments that leave places of their span empty."""
    computed, row = [0] * span.num_computed, 0
    wanted: list[int] = []
    for segment in span.segments:
        place = (segment.slot - span.segments[0].slot) * span.rows_per_slot
        computed[place : place + segment.num_rows] = range(row, row + segment.num_rows)
        wanted += range(place, place + segment.num_rows)
        row += segment.num_rows
    both = to_device([*computed, *wanted], device)
    return both[: len(computed)], both[len(computed) :]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of slots with equally many rows each.

    queries: [slots * rows per slot, heads, d]; keys, values: [slots, kv heads, keys, d]; mask: as of `attention_mask`,
    or None: every row sees all keys. Returns [slots * rows per slot, heads * d]."""
    num_rows, num_heads, d = queries.shape
    slots, num_kv_heads = keys.shape[:2]
    count, per_kv = num_rows // slots, num_heads // num_kv_heads
    # The queries that share a key/value head take the part of query rows, so that no key is repeated.
    if count == 1:
        heads = queries.unflatten(1, (-1, per_kv))  # [slots, kv heads, queries, d]
        out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
        return out.reshape(slots, num_heads * d)
    heads = queries.reshape(slots, count, -1, per_kv, d).transpose(1, 2).reshape(slots, -1, count * per_kv, d)
    out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
    out = out.view(slots, -1, count, per_kv, d).transpose(1, 2)
    return out.reshape(num_rows, num_heads * d)


def attention_mask(attention: Attention, positions: Tensor, num_keys: int) -> Tensor:
    """[slots, 1, query rows, keys], additive, as `attend` takes it: 1 query row if there is one row per slot (all its
    heads see the same), else rows per slot * queries per key/value head.

    positions: [slots, rows per slot]"""
    num_slots, count = positions.shape
    query_rows = positions.flatten()
    if count > 1:
        query_rows = query_rows.repeat_interleave(attention.queries_per_kv_head)
    return attention.masks.at(query_rows, num_keys).view(num_slots, 1, -1, num_keys)
