"""Writes the weights of a model tensor by tensor, as the checkpoint of iteration 0 that `store.py` reads."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from megatron.early_exit.checkpoint import folders
from megatron.early_exit.checkpoint.checksums import Checksums, DamagedFileError, Extent
from megatron.early_exit.checkpoint.links import link_tensors, unchanged_tensors
from megatron.early_exit.checkpoint.safe_pickle import UnsafeFileError, first_failure, read_metadata
from megatron.early_exit.checkpoint.tensors import Tensors
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
from megatron.early_exit.config.saved_description import save_description
from megatron.early_exit.data.tokenizer_files import save_tokenizer
from megatron.early_exit.model.key_names import extra_state_key, has_extra_state, key_of
from megatron.early_exit.platform.folder_lock import FolderLock

# How core lays out the state: layers with exits are not alike; optimizer state readable under any layout.
CONTENT_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


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
    linked = unchanged_tensors(tensors, save)
    new = {name: tensor for name, tensor in tensors.items() if name not in linked}
    partial = folders.partial_folder(save, 0)
    with written_whole(partial, sum(tensor.num_bytes for tensor in new.values())):
        _write_tensors(partial, new, progress)
        checksums = _checksums_of_tensors(partial)
        if linked:
            checksums |= link_tensors(partial, linked)
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
    state |= {extra_state_key(key): [None] for key in tensors if has_extra_state(key)}
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
