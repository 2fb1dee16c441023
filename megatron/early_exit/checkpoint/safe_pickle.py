"""Reads checkpoints of core's and PyTorch's `torch_dist` format without running code that somebody put into them.

`.metadata` and the objects inside `.distcp` files are pickles, which PyTorch and core load without limits: a pickle can
name any function and have it called. Here the first knows PyTorch's few classes of metadata alone, and the second are
read as `torch.load(weights_only=True)` does. Everything that reads such a folder uses `SafeReader` for it.
"""

from __future__ import annotations

import collections
import functools
import io
import pathlib
import pickle
import zipfile
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from megatron.early_exit.checkpoint.checksums import Checksums, DamagedFileError, Extent
from megatron.early_exit.config.checkpoint_files import METADATA_FILE


class UnsafeFileError(OSError):
    """A file that would run code if it were loaded as its format is usually loaded."""


def _refusal(file: str | Path, wanted: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{file} is not loaded: it asks for {wanted}, which no checkpoint needs, and could run any command that way. "
        "Do not use this file; get the checkpoint again from a source that you trust"
    )


def first_failure(error: BaseException) -> BaseException:
    """What went wrong in the first place, on the first rank where something did.

    PyTorch's CheckpointException, which is no Exception, holds the errors of all ranks and prints their tracebacks."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    return error


class _OldMetadata(Metadata):
    """What core 0.15 wrote in place of PyTorch's class."""


class _OldSavePlan(planner.SavePlan):
    """What core 0.15 wrote in place of PyTorch's class."""


_CORE_STRATEGIES = "megatron.core.dist_checkpointing.strategies.torch"

_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (metadata, ("Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                        "ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
            (planner, ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
            (filesystem, ("_StorageInfo", "_StoragePrefix")),
            (torch.serialization, ("_get_layout",)),
            (torch, ("Size",)),
            (collections, ("OrderedDict",)),
        )
        for name in names
    },
    # Where a checkpoint was written. Python 3.13 has another name for the module, and the pure ones are written where
    # metadata that were read here are written again, with links to what lies in another checkpoint.
    **{
        (module, prefix + name): getattr(pathlib, "Pure" + name)
        for module in ("pathlib", "pathlib._local")
        for prefix in ("", "Pure")
        for name in ("PosixPath", "WindowsPath")
    },
    (_CORE_STRATEGIES, "MCoreMetadata"): _OldMetadata,
    (_CORE_STRATEGIES, "MCoreSavePlan"): _OldSavePlan,
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype | torch.layout):
            return value
        raise _refusal(self._file, f"{module}.{name}")

    def _enum_member(self, kind: Any, name: str) -> Enum:
        """What Python 3.11.0 to 3.11.3 writes for a member of an enumeration: a call of getattr."""
        if isinstance(kind, EnumType) and name in kind.__members__:
            return kind[name]
        raise _refusal(self._file, f"builtins.getattr of {getattr(kind, '__name__', kind)}")


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the checkpoint in `folder`.

    Raises UnsafeFileError if its pickle names more than metadata need, OSError if it cannot be read."""
    file = Path(folder) / METADATA_FILE
    Checksums.read(folder).check_file(folder, METADATA_FILE)
    try:
        with file.open("rb") as stream:
            read: Metadata = _MetadataUnpickler(stream, file).load()
        paths = {info.relative_path for info in read.storage_data.values()}
        dict(read.state_dict_metadata)
    except OSError:
        raise
    except Exception as error:  # pickles fail in all ways
        raise OSError(f"{file} cannot be read, it is damaged ({type(error).__name__}: {error})") from error
    if outside := sorted(path for path in paths if path in ("", ".", "..") or Path(path).name != path):
        raise _refusal(file, f"the file {outside[0]} outside its folder")
    return read


def load_object(data: bytes, file: str | Path) -> Any:
    """The object that `torch.save` wrote as `data`, which lies in `file`: tensors, NumPy arrays and plain values.

    Raises UnsafeFileError if it is made of more, OSError if it cannot be read."""
    with torch.serialization.safe_globals(_numpy_globals()):
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            names = _unsafe_names(data)
            if names:
                raise _refusal(file, ", ".join(names)) from error
            if not zipfile.is_zipfile(io.BytesIO(data)):
                # PyTorch's old format would be a pickle from its first byte on, which neither we nor core write.
                raise OSError(f"{file} cannot be read, it is damaged") from error
            raise OSError(f"{file} cannot be read, it is damaged ({type(error).__name__})") from error


def _unsafe_names(data: bytes) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # not a file of PyTorch at all
        return []


def _numpy_globals() -> list[Any]:
    """What the state of NumPy's generator is made of."""
    import numpy

    reconstruct = numpy.empty(0).__reduce__()[0]
    kinds = {type(numpy.dtype(kind)) for kind in "?bhilqBHILQefd"}
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return [numpy.ndarray, numpy.dtype, *kinds, *((reconstruct, name) for name in names), io.BytesIO]


def _check_extra_state(value: Any, file: str) -> None:
    """Raise UnsafeFileError if a layer of Transformer Engine would unpickle `value`: its state of FP8, else empty."""
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, io.BytesIO) and part.getbuffer().nbytes:
            load_object(part.getvalue(), file)
        elif isinstance(part, torch.Tensor) and part.numel():
            raise _refusal(file, "Transformer Engine's unpickling of FP8 state")


class SafeReader(FileSystemReader):
    """PyTorch's reader of checkpoint folders, for PyTorch's functions and core's strategies, which runs no code that
    lies in them, and raises DamagedFileError where a checksum says that the bytes are not those that were written.

    It reads metadata and checksums once, and can be used for many loads."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)

    @functools.cached_property
    def _content(self) -> tuple[Metadata, Checksums]:
        return read_metadata(Path(self.path)), Checksums.read(Path(self.path))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._content[0]

    def _slice_file(self, file: BinaryIO, sinfo: Any) -> Any:
        """Called by PyTorch for each tensor or object that is read."""
        _, checksums = self._content
        if checksums.is_damaged(file, Extent(sinfo.relative_path, sinfo.offset, sinfo.length)):
            name = next(index.fqn for index, info in self.storage_data.items() if info == sinfo)
            path = Path(self.path) / sinfo.relative_path
            raise DamagedFileError(f"{path} is damaged: the bytes of {name} are not those that were written")
        return super()._slice_file(file, sinfo)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        # It has all methods of a planner: those that it has not itself are the other's.
        return super().read_data(plan, cast(LoadPlanner, _SafeObjects(planner, self)))

    def file_of(self, item: ReadItem) -> Path:
        """The file in which `item` lies."""
        name: str = self.storage_data[item.storage_index].relative_path
        return Path(self.path) / name


class _SafeObjects:
    """A load planner that is handed objects only after they were read safely and written anew."""

    def __init__(self, planner: LoadPlanner, reader: SafeReader) -> None:
        self._planner, self._reader = planner, reader

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        file = self._reader.file_of(read_item)
        name = f"{read_item.storage_index.fqn} in {file}"
        loaded = load_object(value.getvalue(), name)
        if "_extra_state" in read_item.storage_index.fqn:
            _check_extra_state(loaded, name)
        clean = io.BytesIO()
        torch.save(loaded, clean)
        clean.seek(0)
        self._planner.load_bytes(read_item, clean)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)
