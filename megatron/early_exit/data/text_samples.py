"""Sequences of token ids from all over a .bin/.idx file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def documents_of(prefix: str, vocab_size: int) -> Iterator[np.ndarray]:
    """The documents of a file, one after the other. vocab_size: ids of the tokenizer.

    Raises ValueError for ids beyond it, and for a file that is missing or damaged."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron.early_exit.data.token_files import check_token_file, foreign_id

    check_token_file(prefix)
    documents = IndexedDataset(prefix)
    for index in range(len(documents)):
        tokens = np.asarray(documents[index])
        for token in (tokens.min(), tokens.max()) if tokens.size else ():
            if not 0 <= token < vocab_size:
                raise ValueError(foreign_id(f"document {index} of {prefix}", int(token), vocab_size))
        yield tokens


def sample_sequences(prefix: str, vocab_size: int, num_tokens: int, length: int) -> list[list[int]]:
    """Beginnings of documents from all over the file, of 2 to `length` ids each, together at most `num_tokens`: so many
    where documents are short as well, or all that there are."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron.early_exit.data.token_files import check_token_file

    check_token_file(prefix)
    dataset = IndexedDataset(prefix)  # its lengths lie in a mapped file that closes with it
    available = int(np.minimum(dataset.sequence_lengths, length).sum(dtype=np.int64))
    sequences: list[list[int]] = []
    taken = passed = 0
    for tokens in documents_of(prefix, vocab_size):
        room = num_tokens - taken
        is_behind = taken * available <= passed * num_tokens  # taken as evenly as the file is passed
        if is_behind and tokens.size >= 2 and room >= 2:
            sequences.append(tokens[: min(length, room)].tolist())
            taken += len(sequences[-1])
        passed += min(tokens.size, length)
    if not sequences:
        raise ValueError(f"{prefix} holds no document of two tokens")
    return sequences
