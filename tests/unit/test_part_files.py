"""Parts of results: what is written is read, and a damaged part is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.early_exit.platform.part_files import Parts, read_parts, write_part


def test_items_come_back_with_their_own_values(tmp_path: Path) -> None:
    ids = [np.arange(3), np.arange(0), np.arange(10, 14)]
    scores = [np.full((len(one), 2), 0.1 * len(one)) for one in ids]
    for part in (slice(0, 2), slice(2, 3), slice(3, 3)):
        numbers = {"numbers": [7, 4, 9][part], "reasons": ["eod", "", "stop"][part]}
        write_part(tmp_path, "numbers", numbers, {"ids": ids[part], "scores": scores[part]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part_000004_2.npz", "part_000009_1.npz"]
    found = list(read_parts(tmp_path, ("numbers", "reasons"), ("ids", "scores"), "do it again"))
    assert [one[:2] for one in found] == [(7, "eod"), (4, ""), (9, "stop")]
    for (_, _, *read), *written in zip(found, ids, scores, strict=True):
        assert all((one == other).all() and one.shape == other.shape for one, other in zip(read, written, strict=True))


def test_parts_are_kept_when_they_are_full_or_old_and_when_they_end() -> None:
    kept: list[list[int]] = []
    with pytest.raises(KeyboardInterrupt), Parts(lambda items: kept.append(list(items)), 3, 60.0) as parts:
        for item in range(4):
            parts.add(item)
        raise KeyboardInterrupt
    assert kept == [[0, 1, 2], [3]]
    with Parts(lambda items: kept.append(list(items)), 3, -1.0) as parts:
        parts.add(4)
        assert kept[2:] == [[4]]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "part_000000_1.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"part_000000_1.npz cannot be read .*; remove it, and do it again"):
        list(read_parts(tmp_path, ("numbers",), ("ids",), "do it again"))
