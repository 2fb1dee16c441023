"""Samples of token files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.early_exit.data.text_samples import sample_sequences
from tests.data_files import write_documents


@pytest.mark.parametrize(("num_tokens", "expected"), [(10_000, 100), (700, 70), (500, 50), (30, 3)])
def test_short_documents_are_sampled_from_all_over(num_tokens: int, expected: int, tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "text", [[index] * 10 for index in range(100)])
    sequences = sample_sequences(prefix, 100, num_tokens, 256)
    firsts = [sequence[0] for sequence in sequences]
    assert len(firsts) == expected and all(len(sequence) == 10 for sequence in sequences)
    gaps = [second - first for first, second in zip(firsts, [*firsts[1:], 100], strict=True)]
    assert firsts[0] == 0 and max(gaps) <= -(-100 // expected)


def test_long_documents_are_cut(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "text", [list(range(90)), [7], list(range(50)), list(range(50))])
    assert [len(one) for one in sample_sequences(prefix, 100, 1000, 40)] == [40, 40, 40]
    assert [len(one) for one in sample_sequences(prefix, 100, 61, 40)] == [40, 21]
