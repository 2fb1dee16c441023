"""For which shapes graphs are captured: few, and all that decoding needs at the default sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.graphs import GraphShape, graph_shapes, smallest_shape

DEFAULT_SLOTS, DEFAULT_POSITIONS = 16, 4096


@given(st.integers(1, 2000), st.integers(1, 2**20))
def test_shapes_are_few_and_small_whatever_the_sizes(num_slots: int, num_positions: int) -> None:
    shapes = graph_shapes(num_slots, num_positions)
    assert len(shapes) == len(set(shapes)) <= 64
    for shape in shapes:
        assert shape.num_slots <= num_slots and shape.num_keys <= num_positions
        assert shape.num_rows <= 256 and shape.num_slots * shape.num_keys <= 2**16


@given(st.data())
def test_the_smallest_shape_holds_the_rows(data: st.DataObject) -> None:
    num_slots, num_positions = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5000))
    slots = data.draw(st.sets(st.integers(0, num_slots - 1), min_size=1))
    segments = []
    for slot in sorted(slots):
        first = data.draw(st.integers(0, num_positions - 1))
        segments.append(Segment(slot, first, data.draw(st.integers(1, min(20, num_positions - first)))))
    shapes = graph_shapes(num_slots, num_positions)
    shape = smallest_shape(shapes, segments)
    holding = [
        one
        for one in shapes
        if len(segments) <= one.num_slots
        and all(s.num_rows <= one.rows_per_slot and s.stop <= one.num_keys for s in segments)
    ]
    assert shape == (min(holding) if holding else None)


@pytest.mark.parametrize("rows", [1, 2, 13, 16])
def test_every_decode_step_of_the_default_sizes_has_a_shape(rows: int) -> None:
    """One row per request: `full`, rows before an exit, drafts. Several: 12 drafts that are verified, deferred rows."""
    shapes = graph_shapes(DEFAULT_SLOTS, DEFAULT_POSITIONS)
    for slot in range(DEFAULT_SLOTS):
        for stop in (rows, 511, 512, 513, 2048, 2049, DEFAULT_POSITIONS):
            assert smallest_shape(shapes, [Segment(slot, stop - rows, rows)]) is not None


@pytest.mark.parametrize(("num_slots", "num_positions"), [(1, 1), (3, 100), (16, 4096), (64, 32768), (100, 700)])
def test_one_row_of_each_slot_has_a_shape_unless_there_are_very_many_keys(num_slots: int, num_positions: int) -> None:
    shapes = graph_shapes(num_slots, num_positions)
    for used in {1, num_slots // 2 + 1, num_slots}:
        for stop in {1, min(512, num_positions), min(num_positions, 2**16 // num_slots)}:
            segments = [Segment(slot, stop - 1, 1) for slot in range(used)]
            # A shape has up to four times the slots, or keys, that are used.
            if 16 * used * stop <= 2**16:
                assert smallest_shape(shapes, segments) is not None, (used, stop)


def test_what_has_no_shape() -> None:
    shapes = graph_shapes(DEFAULT_SLOTS, DEFAULT_POSITIONS)
    assert smallest_shape(shapes, [Segment(0, 0, 17)]) is None, "a prompt"
    assert smallest_shape(graph_shapes(64, 32768), [Segment(slot, 30000, 1) for slot in range(64)]) is None, "many keys"


def test_positions_and_slots_are_data_within_a_shape() -> None:
    shapes = graph_shapes(16, 2048)
    for slot in range(16):
        for stop in (1, 2, 511, 512):
            assert smallest_shape(shapes, [Segment(slot, stop - 1, 1)]) == GraphShape(1, 1, 512)
    assert smallest_shape(shapes, [Segment(3, 513, 4), Segment(9, 0, 1)]) == GraphShape(2, 4, 2048)
