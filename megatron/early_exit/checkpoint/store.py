"""Reads the weights of our checkpoints tensor by tensor, without building a model or starting processes.

The files are those that `training/saving.py` writes: core's `torch_dist` format, that is PyTorch's distributed
checkpoint with a metadata file of core. `writing.py` writes such checkpoints, of weights alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron.early_exit.checkpoint.checksums import Checksums, DamagedFileError, Extent
from megatron.early_exit.checkpoint.safe_pickle import SafeReader, UnsafeFileError, first_failure, read_metadata
from megatron.early_exit.checkpoint.tensors import LazyTensor, Origin, Tensors
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder as checkpoint_folder
from megatron.early_exit.config.checkpoint_files import COMMON_FILE
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.model.key_names import check_keys, name_of

# What else lies beside the parameters.
_NOT_PARAMETERS = ("optimizer.", "rng_state", "opt_param_scheduler")


def read_checkpoint(folder: Path) -> tuple[ModelDescription, Tensors]:
    """Description and parameters, by name, of the checkpoint in `folder`; parameters are read when asked for.

    Raises OSError if its files cannot be read, ValueError for exits that can no longer be built."""
    tensors: Tensors = {}
    reader = SafeReader(folder)
    stored_by_key = reader.read_metadata().state_dict_metadata
    check_keys(stored_by_key, folder)
    for key, stored in stored_by_key.items():
        if isinstance(stored, TensorStorageMetadata) and not key.startswith(_NOT_PARAMETERS):
            shape, dtype = tuple(stored.size), stored.properties.dtype
            read = lambda key=key, shape=shape, dtype=dtype: _read_tensor(reader, key, shape, dtype)
            tensors[name_of(key)] = LazyTensor(shape, dtype, read, Origin(folder, key))
    return read_description(folder), tensors


def has_training_state(folder: Path) -> bool:
    """Whether the checkpoint holds more than weights."""
    return any(name.startswith(_NOT_PARAMETERS) for name in read_metadata(folder).state_dict_metadata)


def _read_tensor(reader: SafeReader, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    state = {key: torch.empty(shape, dtype=dtype)}
    with reading(reader, key):
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state[key]


@contextmanager
def reading(reader: SafeReader, key: str) -> Iterator[None]:
    """Turn what PyTorch raises into an OSError that names the tensor and the folder."""
    try:
        with warnings.catch_warnings():
            # Which PyTorch says of every tensor that is read with `no_dist`, as here is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except (Exception, CheckpointException) as error:
        cause = first_failure(error)
        if isinstance(cause, KeyboardInterrupt | UnsafeFileError | DamagedFileError):
            raise cause from None
        raise OSError(f"{key} of the checkpoint {reader.path} cannot be read, it may be damaged: {cause}") from error


def verify_checkpoint(folder: Path) -> str:
    """Read all files of the checkpoint in `folder` and compare them with their checksums. Returns what was found.

    Raises DamagedFileError that names every tensor and object that is not what was written, and in which file."""
    checksums = Checksums.read(folder)
    stored = read_metadata(folder).storage_data
    extents = {Extent(info.relative_path, info.offset, info.length): index.fqn for index, info in stored.items()}
    damaged = [f"{folder / extent.file}: {extents[extent]}" for extent in checksums.damaged(folder, list(extents))]
    if (folder / COMMON_FILE).exists():
        checksums.check_file(folder, COMMON_FILE)
    if damaged:
        raise DamagedFileError(
            f"{len(damaged)} of {len(extents)} tensors and objects are not what was written:\n  " + "\n  ".join(damaged)
        )
    known = sum(extent in checksums for extent in extents)
    if known == len(extents):
        return f"all {known} tensors and objects are what was written"
    return f"{known} of {len(extents)} tensors and objects are what was written; the others have no checksum"
