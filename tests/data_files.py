"""Small .bin/.idx files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch


def write_token_files(folder: Path, vocab_size: int, num_documents: int = 60, name: str = "tokens") -> str:
    """Documents of a simple Markov chain over `vocab_size` ids, which a model can learn; returns the prefix."""
    generator = numpy.random.default_rng(0)
    steps = [generator.integers(1, 4, size=int(generator.integers(20, 90))) for _ in range(num_documents)]
    return write_documents(folder / name, [(numpy.cumsum(one) % (vocab_size - 1)).tolist() for one in steps])


def write_documents(prefix: Path, documents: list[list[int]]) -> str:
    """These ids; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=numpy.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(get_idx_path(str(prefix)))
    return str(prefix)
