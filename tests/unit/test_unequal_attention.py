"""Attention of slots with unequal numbers of rows: what each row sees, and in how many calls."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.early_exit.inference.worker import attention as module
from megatron.early_exit.inference.worker.attention import Attention, AttentionMetadata, Segment
from megatron.early_exit.inference.worker.kv_cache import KVCache

NUM_SLOTS, NUM_POSITIONS, KV_HEADS, HEADS, SIZE = 9, 24, 2, 4, 8


@pytest.fixture(scope="module")
def attention() -> Attention:
    cache = KVCache(
        1, NUM_SLOTS, NUM_POSITIONS, KV_HEADS, SIZE, dtype=torch.float32, device=torch.device("cpu")
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    cache.rows[0].copy_(torch.randn(cache.rows[0].shape, generator=generator))
    return Attention(cache, HEADS, None)


def one_by_one(attention: Attention, segments: Sequence[Segment], queries: Tensor) -> Tensor:
    """Softmax over the keys of each row's slot up to its own position."""
    outputs, row = [], 0
    for slot, first, count in segments:
        for position in range(first, first + count):
            keys, values = (
                of[0][0, :, : position + 1] for of in attention.cache.keys_and_values(slot, 1, position + 1)
            )
            heads = []
            for head in range(HEADS):
                of_head = head * KV_HEADS // HEADS
                weights = torch.softmax(keys[of_head] @ queries[row, head] / SIZE**0.5, 0)
                heads.append(weights @ values[of_head])
            outputs.append(torch.cat(heads))
            row += 1
    return torch.stack(outputs)


@st.composite
def segments_of(draw: st.DrawFn) -> list[Segment]:
    slots = sorted(draw(st.sets(st.integers(0, NUM_SLOTS - 1), min_size=1)))
    counts = [draw(st.sampled_from([1, 1, 1, 2, 5])) for _ in slots]
    return [
        Segment(slot, draw(st.integers(0, NUM_POSITIONS - count)), count)
        for slot, count in zip(slots, counts, strict=True)
    ]


@settings(deadline=None)
@given(segments_of(), st.sampled_from([0, 300, 2**15, 2**40]))
def test_rows_see_their_own_slot_however_slots_are_put_together(
    attention: Attention, segments: list[Segment], products: int
) -> None:
    queries = torch.randn(
        sum(one.num_rows for one in segments), HEADS, SIZE, generator=torch.Generator().manual_seed(len(segments))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PRODUCTS_OF_A_CALL", products)
        metadata = AttentionMetadata(segments, attention)
        ours, calls = metadata.attend(0, queries), len(metadata._groups)
    torch.testing.assert_close(ours, one_by_one(attention, segments, queries), rtol=1e-5, atol=1e-5)
    assert calls == 1 if products == 2**40 else calls <= len(segments)


@pytest.mark.parametrize(
    ("slots_and_rows", "num_copies", "calls"),
    [
        ([(0, 1), (1, 1), (2, 1)], 0, 1),
        ([(0, 1), (1, 1), (3, 1)], 1, 1),  # the row of a slot between them
        ([(0, 1), (1, 1), (3, 1)], 0, 2),
        ([(0, 1), (1, 3), (2, 1)], 1, 3),
        ([(0, 1), (1, 3), (2, 1)], 2, 1),  # two copies for each of the others
        ([(0, 2), *((slot, 1) for slot in range(1, 9))], 4, 2),  # one for each of eight: more than a call
    ],
)
def test_calls_are_saved_where_few_rows_are_computed_in_vain(
    attention: Attention, slots_and_rows: list[tuple[int, int]], num_copies: int, calls: int
) -> None:
    """num_copies: rows that are allowed in place of a call."""
    segments = [Segment(slot, 10 - rows, rows) for slot, rows in slots_and_rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PRODUCTS_OF_A_CALL", num_copies * 10 * HEADS * SIZE)
        assert len(AttentionMetadata(segments, attention)._groups) == calls
