"""Pairs of `.bin/.idx` files, checked before anything is made of them: missing, cut, damaged, of another tokenizer.

An `.idx` file: a header, length (int32) and then byte offset (int64) of every sequence, the first sequence of every
document and the end of the last (int64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1

BLOCK = 1 << 22
"""Sequences that are checked at once, so that memory does not grow with the file."""

NUM_LOOKED_AT, TOKENS_LOOKED_AT = 16, 1 << 16
"""Places all over a `.bin` file, and tokens at each, that are looked at before training: what a whole corpus can have
by the million, an id of another tokenizer, shows in these."""

_AGAIN = "copy both files again, or preprocess the data again"


@dataclass(frozen=True)
class TokenFile:
    """A pair of files whose index is whole."""

    prefix: str
    num_sequences: int
    num_tokens: int
    dtype: np.dtype
    sequence_lengths: np.ndarray
    """[num_sequences] int32, in tokens; read from disk only where it is looked at."""

    def num_tokens_between(self, bounds: tuple[float, float]) -> int:
        """Tokens of a split, given as shares of the sequences."""
        first, last = (round(bound * self.num_sequences) for bound in bounds)
        return int(self.sequence_lengths[first:last].sum(dtype=np.int64))

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError, naming the document, if an id is not of a tokenizer with `vocab_size` ids. Looks at all
        tokens of a small file, at some from all over a large one."""
        count = NUM_LOOKED_AT * TOKENS_LOOKED_AT
        if self.num_tokens <= count:
            self._check_ids_from(0, count, vocab_size)
            return
        for first in np.linspace(0, self.num_tokens - TOKENS_LOOKED_AT, NUM_LOOKED_AT, dtype=np.int64):
            self._check_ids_from(int(first), TOKENS_LOOKED_AT, vocab_size)

    def _check_ids_from(self, first: int, count: int, vocab_size: int) -> None:
        tokens = self._tokens[first : first + count]
        for position in (int(tokens.argmax()), int(tokens.argmin())):
            if not 0 <= tokens[position] < vocab_size:
                ends = np.cumsum(self.sequence_lengths, dtype=np.int64)
                document = int(np.searchsorted(ends, first + position, side="right"))
                raise ValueError(foreign_id(f"document {document} of {self.prefix}", int(tokens[position]), vocab_size))

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(f"{self.prefix}.bin", self.dtype, "r")


def foreign_id(where: str, token: int, vocab_size: int) -> str:
    """What is said of an id that is none of the tokenizer's."""
    return (
        f"{where} (counted from 0) has the token id {token}, but the ids of this tokenizer are 0 to {vocab_size - 1}: "
        "the data were made with another tokenizer. Preprocess the text again with this one, or give theirs."
    )


def check_token_file(prefix: str) -> TokenFile:
    """Check that PREFIX.bin and PREFIX.idx are there, whole, and belong together. Reads the index, not the tokens.

    Raises ValueError naming the file and, when a size is wrong, the expected and the actual bytes.
    """
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx_path, bin_path):
        if not path.is_file():
            hint = "; give the path without .bin or .idx" if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(f"{path} does not exist; tools/preprocess_data.py writes it{hint}")
    idx_bytes, bin_bytes = idx_path.stat().st_size, bin_path.stat().st_size
    if idx_bytes < IDX_HEADER.size:
        kind = "truncated" if idx_bytes else "empty"
        raise ValueError(f"{idx_path} is {kind}: expected at least {IDX_HEADER.size} bytes, it has {idx_bytes}")
    with idx_path.open("rb") as stream:
        magic, version, code, num_sequences, num_documents = IDX_HEADER.unpack(stream.read(IDX_HEADER.size))
    dtype = _token_dtype(code)
    if magic != IDX_MAGIC or version != 1 or dtype is None:
        header = f"header {magic!r}, version {version}, type {code}"
        raise ValueError(f"{idx_path} is not an index that Megatron reads ({header})")
    expected = IDX_HEADER.size + 12 * num_sequences + 8 * num_documents
    if idx_bytes < expected:
        raise ValueError(
            f"{idx_path} is truncated: expected {expected} bytes for {num_sequences} sequences, it has {idx_bytes}"
        )
    if num_sequences == 0:
        raise ValueError(f"{idx_path} holds no sequences; the data are empty")

    lengths = np.memmap(idx_path, np.int32, "r", IDX_HEADER.size, (num_sequences,))
    offsets = np.memmap(idx_path, np.int64, "r", IDX_HEADER.size + 4 * num_sequences, (num_sequences,))
    expected = _check_sequences(idx_path, lengths, offsets, dtype.itemsize)
    _check_documents(idx_path, num_sequences, num_documents)
    if bin_bytes != expected:
        kind = "empty" if bin_bytes == 0 else "truncated" if bin_bytes < expected else "too long"
        raise ValueError(f"{bin_path} is {kind}: {idx_path} expects {expected} bytes, it has {bin_bytes}; {_AGAIN}")
    if bin_bytes == 0:
        raise ValueError(f"{bin_path} holds no tokens")
    return TokenFile(prefix, num_sequences, bin_bytes // dtype.itemsize, dtype, lengths)


def _token_dtype(code: int) -> np.dtype | None:
    """The type of ids that an index says; None if they are no integers."""
    if code not in {dtype.value for dtype in DType}:
        return None
    dtype = np.dtype(DType.dtype_from_code(code))
    return dtype if dtype.kind in "iu" else None


def _check_sequences(path: Path, lengths: np.ndarray, offsets: np.ndarray, token_bytes: int) -> int:
    """Check that each sequence begins where the one before it ends; returns the byte where the last one does."""
    end = 0
    for first in range(0, len(lengths), BLOCK):
        sizes = lengths[first : first + BLOCK].astype(np.int64) * token_bytes
        if sizes.min() < 0:
            index = first + int(sizes.argmin())
            raise ValueError(f"{path} is damaged: sequence {index} has a length of {lengths[index]} tokens; {_AGAIN}")
        ends = end + np.cumsum(sizes)
        wrong = np.flatnonzero(ends - sizes != offsets[first : first + BLOCK])
        if wrong.size:
            index = first + int(wrong[0])
            raise ValueError(
                f"{path} is damaged: sequence {index} begins at byte {offsets[index]}, but those before it end at byte "
                f"{(ends - sizes)[wrong[0]]}; {_AGAIN}"
            )
        end = int(ends[-1])
    return end


def _check_documents(path: Path, num_sequences: int, num_documents: int) -> None:
    """Check that documents are ranges of sequences, one after the other. num_documents: with the end of the last."""
    if num_documents == 0:
        raise ValueError(f"{path} is damaged: it has no list of documents; {_AGAIN}")
    documents = np.memmap(path, np.int64, "r", IDX_HEADER.size + 12 * num_sequences, (num_documents,))
    if documents[0] != 0 or documents[-1] != num_sequences or np.any(documents[1:] < documents[:-1]):
        raise ValueError(
            f"{path} is damaged: the documents do not divide its {num_sequences} sequences (they run from "
            f"{documents[0]} to {documents[-1]}); {_AGAIN}"
        )
