"""Writes pairs of `.bin` and `.idx` files, which get their names when all are complete."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.early_exit.data.encoding import MARKS, EncodedChunk
from megatron.early_exit.data.loss_masks import mask_prefix


class PreprocessResult(NamedTuple):
    """What was written under one prefix (for --data-path)."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_skipped: int
    """Documents without a single token."""
    num_answer_tokens: int | None = None
    """Those that have a loss, of conversations."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have errors of the file system say where they happened: those of writing do not."""
    try:
        yield
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {error.filename or path}: {reason}") from error


def remove_left_behind(prefix: str) -> None:
    """Remove the files that killed runs began to write. Raises ValueError if a run that is alive writes them."""
    beginning = f"{Path(prefix).name}.partial-"
    partial = [path for path in Path(prefix).parent.iterdir() if path.name.startswith(beginning)]
    for path in partial:
        if path.suffix == ".bin" and _is_locked(path):
            raise ValueError(
                f"another run is writing {prefix} ({path.name}): wait for it, or give another --output-prefix"
            )
    for path in partial:
        path.unlink(missing_ok=True)
    if partial:
        names = ", ".join(sorted(path.name for path in partial))
        print(f"removed what a killed run left behind: {names}", file=sys.stderr)


def _is_locked(path: Path) -> bool:
    """Whether the process that made the file is alive: locks end with their processes, on other machines too."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


class PairWriter:
    """Writes one pair of files under temporary names; `publish` gives them their final names."""

    def __init__(self, key: str, prefix: str, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        dtype = np.uint8 if key == MARKS else DType.optimal_dtype(vocab_size)

        self.key = key
        self.prefix = prefix
        self.partial = f"{prefix}.partial-{os.getpid()}"
        with naming(self.partial):
            self.builder = IndexedDatasetBuilder(f"{self.partial}.bin", dtype=dtype)
            self._lock = open(f"{self.partial}.bin", "r+b")  # noqa: SIM115
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.num_documents = self.num_tokens = self.num_skipped = 0

    def add(self, chunk: EncodedChunk, key: str) -> None:
        # One write for the whole chunk; every document is one sequence.
        first = len(self.builder.sequence_lengths)
        lengths = chunk.lengths[key]
        if lengths:
            with naming(f"{self.partial}.bin"):
                self.builder.add_document(chunk.tokens[key], lengths)
            self.builder.document_indices[-1:] = range(first + 1, first + len(lengths) + 1)
        self.num_documents += len(lengths)
        self.num_tokens += len(chunk.tokens[key])
        self.num_skipped += chunk.num_skipped[key]

    def finish(self) -> PreprocessResult:
        """Complete both files, still under their temporary names."""
        if not self.num_documents:
            raise ValueError(
                f"no documents with text for key {self.key!r} in the input ({self.num_skipped} were empty)"
            )
        with naming(self.partial):
            self.builder.data_file.flush()
            self.builder.finalize(f"{self.partial}.idx")
        return PreprocessResult(self.prefix, self.num_documents, self.num_tokens, self.num_skipped)

    def publish(self, has_mask: bool) -> None:
        """has_mask: whether a loss mask has been written too; one of earlier tokens goes otherwise."""
        # The index goes first and comes last: at no moment does an old one, or an old mask, stand beside new tokens.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        if not has_mask:
            for suffix in (".idx", ".bin"):
                Path(f"{mask_prefix(self.prefix)}{suffix}").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(f"{self.partial}{suffix}", f"{self.prefix}{suffix}")

    def discard(self) -> None:
        with suppress(OSError):  # a full disk takes the last bytes no better than those before
            self.builder.data_file.close()
        self._lock.close()
        for suffix in (".bin", ".idx"):
            Path(f"{self.partial}{suffix}").unlink(missing_ok=True)


@contextmanager
def partial_outputs(prefixes: dict[str, str], vocab_size: int) -> Iterator[dict[str, PairWriter]]:
    """Writers that are published together when the block succeeds, and leave nothing when it does not."""
    writers: dict[str, PairWriter] = {}
    try:
        for key, prefix in prefixes.items():
            writers[key] = PairWriter(key, prefix, vocab_size)
        yield writers
        for writer in writers.values():
            writer.publish(has_mask=MARKS in writers)
    finally:
        for writer in writers.values():
            writer.discard()
