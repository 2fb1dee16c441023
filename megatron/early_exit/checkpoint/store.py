"""Reads and writes the weights of our checkpoints tensor by tensor, without building a model or starting processes.

The files are those that `training/saving.py` writes: core's `torch_dist` format, that is PyTorch's distributed
checkpoint with a metadata file of core. A checkpoint written here is one of iteration 0 with weights alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from megatron.early_exit.checkpoint import folders
from megatron.early_exit.checkpoint.checksums import Checksums, DamagedFileError, Extent
from megatron.early_exit.checkpoint.safe_pickle import SafeReader, UnsafeFileError, first_failure, read_metadata
from megatron.early_exit.checkpoint.tensors import LazyTensor, Origin, Tensors
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder as checkpoint_folder
from megatron.early_exit.config.checkpoint_files import (
    COMMON_FILE,
    FORMAT_FILE,
    METADATA_FILE,
    TOKENIZER_FOLDER,
    iteration_folder,
    iteration_folders,
    names_latest,
)
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.saved_description import read_description, save_description
from megatron.early_exit.data.tokenizer import save_tokenizer
from megatron.early_exit.model.key_names import check_keys, key_of, name_of
from megatron.early_exit.platform.folder_lock import FolderLock

# How core lays out the state: layers with exits are not alike; optimizer state readable under any layout.
CONTENT_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}

# What else lies beside the parameters.
_NOT_PARAMETERS = ("optimizer.", "rng_state", "opt_param_scheduler")

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


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


def write_checkpoint(
    save: Path,
    description: ModelDescription,
    tensors: Tensors,
    *,
    check: Callable[[Path], None] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write iteration 0 of `save` and make it the latest. Returns its folder.

    Tensors that lie unchanged in another checkpoint of weights alone are not written again: their file is linked.
    The checkpoint has a copy of the tokenizer and gets its name when it is complete. check: raises what is wrong with
    the checkpoint in the folder that it is given, before that.
    Raises FileExistsError if `save` holds a checkpoint and not `force`, OSError if there is no room."""
    check_target(save, force)
    linked = _linked(tensors, save)
    new = {name: tensor for name, tensor in tensors.items() if name not in linked}
    partial = folders.partial_folder(save, 0)
    with written_whole(partial, sum(tensor.num_bytes for tensor in new.values())):
        _write_tensors(partial, new, progress)
        checksums = _checksums_of_tensors(partial)
        if linked:
            checksums |= _link(partial, linked)
        write_common({"content_metadata": dict(CONTENT_METADATA)}, partial)
        write_description(description, partial)
        write_checksums(partial, checksums)
        if check is not None:
            check(partial)
        return folders.publish(partial, 0)


@contextmanager
def written_whole(partial: Path, num_bytes: int) -> Iterator[None]:
    """Have the folder of a run for one writer alone and `partial` in it empty, to be published at the end; whatever
    fails, nothing half-written is left. num_bytes: what will be written.

    Raises OSError if there is no room, or if somebody else writes there."""
    save = partial.parent
    _check_room(save, num_bytes)
    save.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(save)
    try:
        folders.clean_up(save)
        folders.empty(partial)
        yield
    except BaseException as error:
        reason = folders.why_not_written(error, partial)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError):  # of PyTorch's writer
            raise OSError(f"{partial} cannot be written: {reason}") from error
        raise
    finally:
        lock.release()


def write_common(common: dict[str, Any], folder: Path) -> None:
    """Write what core wants beside the tensors of `torch_dist` into `folder`. common: for all ranks."""
    (folder / FORMAT_FILE).write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
                    "common_backend_version": 1})
    )  # fmt: skip
    torch.save(common, folder / COMMON_FILE)


def _checksums_of_tensors(folder: Path) -> Checksums:
    """Of all that lies in the `.distcp` files of `folder`."""
    stored = read_metadata(folder).storage_data.values()
    return Checksums.of_extents(folder, [Extent(info.relative_path, info.offset, info.length) for info in stored])


def write_checksums(folder: Path, of_tensors: Checksums) -> None:
    """Write `of_tensors` and the checksums of the other files that are no text into `folder`."""
    names = [name for name in (METADATA_FILE, COMMON_FILE) if (folder / name).exists()]
    (of_tensors | Checksums.of_files(folder, names)).write(folder)


def write_description(description: ModelDescription, folder: Path) -> None:
    """Let the checkpoint that is being made in `folder` say what it is, and have its tokenizer."""
    save_tokenizer(description.tokenizer, folder / TOKENIZER_FOLDER)
    save_description(description, folder)


def check_target(save: Path, force: bool) -> None:
    """Raise FileExistsError if `save` holds a checkpoint that must not be replaced."""
    if names_latest(save) and not force:
        raise FileExistsError(f"{save} already holds a checkpoint; choose another folder, or --force to replace it")
    others = [folder for folder in iteration_folders(save) if folder != iteration_folder(save, 0)]
    if force and others:
        raise FileExistsError(
            f"{save} holds checkpoints of a training run ({others[0].name}, ...), which are never replaced"
        )


def _check_room(save: Path, num_bytes: int) -> None:
    existing = next(path for path in (save, *save.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(f"{save} has {free / 2**30:.2f} GiB free, the checkpoint takes {num_bytes / 2**30:.2f} GiB")


class _StreamingPlanner(DefaultSavePlanner):
    """Reads a tensor when it is its turn to be written."""

    def __init__(self, tensors: Tensors, progress: Progress | None) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors, self._progress = tensors, progress
        self._total, self._written = sum(tensor.num_bytes for tensor in tensors.values()), 0

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        if name not in self._tensors:
            buffer = io.BytesIO()
            torch.save([None], buffer)
            return buffer
        lazy = self._tensors[name]
        tensor = lazy.read()
        if tuple(tensor.shape) != lazy.shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {lazy.shape}")
        self._written += lazy.num_bytes
        if self._progress is not None:
            self._progress(self._written, self._total)
        return tensor.to(lazy.dtype).contiguous()


def _write_tensors(folder: Path, tensors: Tensors, progress: Progress | None) -> None:
    tensors = {key_of(name): tensor for name, tensor in tensors.items()}
    state: dict[str, Any] = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()
    }
    # Core's linear layers ask for a state beside their parameters, which is empty.
    state |= {_extra_state(key): [None] for key in tensors if _has_extra_state(key)}
    with writing(folder):
        dcp.save(
            state,
            storage_writer=FileSystemWriter(folder, thread_count=1),
            planner=_StreamingPlanner(tensors, progress),
            no_dist=True,
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what PyTorch raises into an OSError that names the folder."""
    try:
        yield
    except CheckpointException as error:  # no Exception, and it hides what happened
        cause = first_failure(error)
        if isinstance(cause, KeyboardInterrupt | ValueError | UnsafeFileError | DamagedFileError):
            raise cause from None  # of what is read meanwhile
        raise OSError(f"{folder} cannot be written: {folders.why_not_written(cause, folder)}") from cause


def _has_extra_state(key: str) -> bool:
    return key.endswith(".weight") and key.split(".")[-2].startswith("linear_")


def _extra_state(key: str) -> str:
    return f"{key.removesuffix('.weight')}._extra_state/shard_0_1"


def _linked(tensors: Tensors, save: Path) -> dict[str, Origin]:
    """Tensors that need not be written: those of the checkpoint that most come from, if files can be linked."""
    origins = {name: t.origin for name, t in tensors.items() if t.origin is not None and name_of(t.origin.key) == name}
    folders = {origin.folder for origin in origins.values()}
    if len(folders) != 1:
        return {}
    (folder,) = folders
    existing = next(path for path in (save, *save.absolute().parents) if path.exists())
    can_link = os.stat(folder).st_dev == os.stat(existing).st_dev and not has_training_state(folder)
    return origins if can_link else {}


def link_rest(target: Path, base: Path) -> Checksums:
    """Let the checkpoint that is being made in `target` have all parameters of `base` that it does not have itself.

    Returns the checksums of what it has from there."""
    present = read_metadata(target).state_dict_metadata
    _, tensors = read_checkpoint(base)
    absent = {name: tensor.origin for name, tensor in tensors.items() if key_of(name) not in present}
    return _link(target, {name: origin for name, origin in absent.items() if origin is not None})


def _link(target: Path, linked: dict[str, Origin]) -> Checksums:
    """Let the checkpoint in `target` have the tensors `linked` (by name) as well, from the files they lie in."""
    ours, source = read_metadata(target), next(iter(linked.values())).folder
    theirs = read_metadata(source)
    keys = {origin.key: key_of(name) for name, origin in linked.items()}  # in the source -> here
    keys |= {_extra_state(key): _extra_state(key) for key in keys if _has_extra_state(key)}
    keys = {key: here for key, here in keys.items() if key in theirs.state_dict_metadata}
    renamed: dict[str, str] = {}
    for index, info in theirs.storage_data.items():
        if index.fqn not in keys:
            continue
        if info.relative_path not in renamed:
            renamed[info.relative_path] = f"linked_{len(renamed)}.distcp"
            _link_file(source / info.relative_path, target / renamed[info.relative_path])
        here = replace(index, fqn=keys[index.fqn])
        ours.storage_data[here] = replace(info, relative_path=renamed[info.relative_path])
    ours.state_dict_metadata |= {here: theirs.state_dict_metadata[key] for key, here in keys.items()}
    with (target / METADATA_FILE).open("wb") as file:
        pickle.dump(ours, file)
    return Checksums.read(source).renamed(renamed)


def _link_file(source: Path, target: Path) -> None:
    """The same file under another name; on another file system, one that points to it."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.resolve())
