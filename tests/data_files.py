"""Small .bin/.idx files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch


def write_token_files(folder: Path, vocab_size: int, num_documents: int = 60, name: str = "tokens") -> str:
    """Documents of a simple Markov chain over `vocab_size` ids, which a model can learn; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    folder.mkdir(parents=True, exist_ok=True)
    prefix = str(folder / name)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=numpy.int32)
    generator = numpy.random.default_rng(0)
    for _ in range(num_documents):
        steps = generator.integers(1, 4, size=int(generator.integers(20, 90)))
        builder.add_document(torch.from_numpy(numpy.cumsum(steps) % (vocab_size - 1)), [len(steps)])
    builder.finalize(get_idx_path(prefix))
    return prefix
