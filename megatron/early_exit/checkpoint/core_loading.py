"""Loads sharded checkpoints through core's `dist_checkpointing`, with files read by `SafeReader`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

from megatron.early_exit.checkpoint.safe_pickle import SafeReader, load_object, read_metadata

_FACTORY = "_get_filesystem_reader"


def load_sharded(sharded_state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What core's `dist_checkpointing.load` gives for `sharded_state`. All ranks call it together.

    Raises UnsafeFileError for a checkpoint that could run code, and whatever core raises."""
    with _core_reads_safely():
        read_metadata(folder)  # what is wrong with it comes out as it is, not wrapped in PyTorch's error of all ranks
        return dist_checkpointing.load(sharded_state, str(folder))


def load_common(folder: Path) -> dict[str, Any]:
    """The part of the checkpoint that is the same on all ranks: plain values, and the names of what else there is."""
    file = folder / "common.pt"
    if file.exists():  # core 0.19 keeps it among the sharded objects
        load_object(file.read_bytes(), file)
    with _core_reads_safely():
        return dist_checkpointing.load_common_state_dict(str(folder))


@contextmanager
def _core_reads_safely() -> Iterator[None]:
    """Core gets `SafeReader` where it makes a reader of its own, which it does in one function."""
    modules = [module for module in (torch_strategies, serialization) if hasattr(module, _FACTORY)]
    assert torch_strategies in modules, f"this core makes its readers elsewhere than in {_FACTORY}"
    originals = {module: getattr(module, _FACTORY) for module in modules}
    try:
        for module in modules:
            setattr(module, _FACTORY, lambda folder, *_, **__: SafeReader(folder))
        yield
    finally:
        for module, original in originals.items():
            setattr(module, _FACTORY, original)
