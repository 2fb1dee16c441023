"""Loads sharded checkpoints through core's `dist_checkpointing`, with files read by `SafeReader`."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

from megatron.early_exit.checkpoint.checksums import Checksums
from megatron.early_exit.checkpoint.safe_pickle import SafeReader, load_object, read_metadata
from megatron.early_exit.config.checkpoint_files import COMMON_FILE
from megatron.early_exit.model.key_names import check_keys, stored_key

_FACTORY = "_get_filesystem_reader"


def load_sharded(sharded_state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What core's `dist_checkpointing.load` gives for `sharded_state`. All ranks call it together.

    Raises UnsafeFileError for a checkpoint that could run code, ValueError for one of an exit that can no longer be
    built, and whatever core raises."""
    with _core_reads_safely():
        # What is wrong with the metadata comes out as it is here, not wrapped in PyTorch's error of all ranks.
        stored = read_metadata(folder).state_dict_metadata
        check_keys(stored, folder)
        dict_list_map_inplace(lambda value: _as_stored(value, stored), sharded_state)
        loaded: dict[str, Any] = dist_checkpointing.load(sharded_state, str(folder))
        return loaded


def _as_stored(value: Any, stored: Container[str]) -> Any:
    """What to ask the checkpoint for instead of `value`: the same under the key that it has there. Of a layer's state
    beside its parameters, which is empty but for FP8, only what layers of this kind have and the checkpoint holds."""
    if isinstance(value, ShardedObject) and value.key.endswith("._extra_state"):
        return value if value.data is not None and value.unique_key in stored else LocalNonpersistentObject(None)
    if isinstance(value, ShardedBase):
        value.key = stored_key(value.key, stored)
    return value


def load_common(folder: Path) -> dict[str, Any]:
    """The part of the checkpoint that is the same on all ranks: plain values, and the names of what else there is."""
    file = folder / COMMON_FILE
    if file.exists():  # core 0.19 keeps it among the sharded objects
        Checksums.read(folder).check_file(folder, COMMON_FILE)
        load_object(file.read_bytes(), file)
    with _core_reads_safely():
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
        return common


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
