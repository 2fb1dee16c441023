"""Core's lists of samples (`*_index.npy`) in files: read only if they are whole, written under another name first.

Core reads them with `allow_pickle`, by which a file that somebody put there could run code, and takes a file that a
killed run cut short for a whole one.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import MAGIC_PREFIX

Arrays = Mapping[str, np.ndarray]


class IndexCacheError(ValueError):
    """Lists of samples that cannot be kept, or that this rank cannot use."""


def cached_indices(dataset: Any, folder: str, names: Sequence[str], build: Callable[[], Any]) -> Any:
    """What `build` returns, core's method that makes the indices of `dataset` or reads them from files in `folder`.

    names: of the files, without `.npy`. Rank 0 makes all of them again if one is not whole; other ranks come after it.
    Raises IndexCacheError if they cannot be written, or are damaged after that."""
    base = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{_split(dataset).name}"
    files = [Path(folder) / f"{base}-{name}.npy" for name in names]
    description = Path(folder) / f"{base}-description.txt"
    problem = _problem(files)
    if not _is_rank_zero():
        if problem is not None:
            raise IndexCacheError(f"{problem}. All ranks must see the folder; or give another --data-cache-path.")
        return build()
    if problem is None and description.is_file():
        return _build_in(dataset, folder, build)
    if any(path.exists() for path in files):
        warnings.warn(f"{problem or f'{description} is missing'}: made again", stacklevel=2)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _remove_left_behind(Path(folder), f".{base}.")
        with tempfile.TemporaryDirectory(prefix=f".{base}.", dir=folder) as partial:
            indices = _build_in(dataset, partial, build)
            for path in (*files, description):  # the description last: with it, core takes the others as there
                os.replace(Path(partial) / path.name, path)
    except OSError as error:
        raise IndexCacheError(
            f"the lists of samples cannot be written in {folder} ({error.strerror or error}): give --data-cache-path, "
            "a folder with room that can be written"
        ) from error
    return indices


def _remove_left_behind(folder: Path, prefix: str) -> None:
    """Remove what killed runs began to write a day ago or earlier."""
    for path in folder.iterdir():
        if path.name.startswith(prefix) and time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _split(dataset: Any) -> Any:
    """The split of a dataset of core's, which names it in two ways."""
    return dataset.index_split if hasattr(dataset, "index_split") else dataset.split


def _is_rank_zero() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _build_in(dataset: Any, folder: str, build: Callable[[], Any]) -> Any:
    config = dataset.config
    dataset.config = copy.copy(config)  # the configuration is shared by all datasets
    dataset.config.path_to_cache = str(folder)
    try:
        return build()
    finally:
        dataset.config = config


def _problem(files: Sequence[Path]) -> str | None:
    """What is wrong with the first file that is not a whole array of integers; None if all are."""
    arrays = {}
    for path in files:
        try:
            with path.open("rb") as file:
                if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
                    return f"{path} is damaged (it is no array)"
            arrays[path.stem.rpartition("-")[2]] = array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return f"{path} is missing"
        except (ValueError, OSError, EOFError, SyntaxError) as error:
            return f"{path} is damaged ({' '.join(str(error).split())})"
        if array.dtype.kind not in "iu" or path.stat().st_size != array.offset + array.nbytes:
            return f"{path} is damaged (it does not hold what its header says)"
    mismatch = _mismatch(arrays)
    return None if mismatch is None else f"{files[0].parent}: {mismatch} (damaged)"


def _mismatch(arrays: Arrays) -> str | None:
    """What in the arrays of one dataset cannot be."""
    if "sample_index" not in arrays:  # of a blend: which dataset, and which of its samples
        datasets, samples = arrays["dataset_index"], arrays["dataset_sample_index"]
        if datasets.ndim != 1 or datasets.shape != samples.shape or datasets.min() < 0 or samples.min() < 0:
            return "dataset_index and dataset_sample_index do not belong together"
        return None
    documents, samples, order = arrays["document_index"], arrays["sample_index"], arrays["shuffle_index"]
    if documents.ndim != 1 or order.ndim != 1 or samples.shape != (len(order) + 1, 2) or not len(order):
        return "document_index, sample_index and shuffle_index do not belong together"
    if documents.min() < 0 or samples.min() < 0:
        return "document_index or sample_index holds negative numbers"
    first_documents = samples[:, 0]
    if first_documents[-1] >= len(documents) or np.any(first_documents[1:] < first_documents[:-1]):
        return "sample_index points outside of document_index"
    if order.max() >= len(order) or int(order.sum(dtype=np.uint64)) != len(order) * (len(order) - 1) // 2:
        return "shuffle_index is no order of the samples"
    return None
