"""Files of legacy checkpoints: which there are, and their content, read without running code of theirs.

The files are pickles, which PyTorch's restricted unpickler reads: it knows the few classes below and refuses a file
that names another. Files are memory-mapped, so tensors are read when they are written.
"""

from __future__ import annotations

import _codecs
import argparse
import enum
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.early_exit.config.checkpoint_files import chosen_folder

RANK_FILE = "model_optim_rng.pt"


class ModelType(enum.Enum):
    """Stands for Megatron's enum of this name, which the settings in a checkpoint hold."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
    retro_encoder = 3
    retro_decoder = 4


def _known_classes() -> torch.serialization.safe_globals:
    reconstruct: Any = np.empty(0).__reduce__()[0]  # a function of a module that NumPy has moved
    return torch.serialization.safe_globals([
        argparse.Namespace,
        (ModelType, "megatron.core.enums.ModelType"),
        (ModelType, "megatron.model.enums.ModelType"),
        (ModelType, "megatron.model.ModelType"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("uint8", "uint32", "int64", "float32", "float64")},
        _codecs.encode,
    ])  # fmt: skip


def is_legacy(folder: Path) -> bool:
    """Whether `folder` is one iteration of a legacy checkpoint."""
    return any(folder.glob(f"mp_rank_*/{RANK_FILE}"))


def holds_legacy(load: Path) -> bool:
    """Whether `load` is a legacy checkpoint: one iteration, or the folder of several."""
    return is_legacy(load) or any(load.glob("*/mp_rank_*"))


def find_legacy(load: Path, iteration: int | None = None) -> Path:
    """Folder of the iteration to read: the given one, else the last. Raises FileNotFoundError with what is missing."""
    if is_legacy(load):
        return load
    folder = chosen_folder(load, iteration)
    if not is_legacy(folder):
        raise FileNotFoundError(f"{folder} holds no legacy checkpoint (mp_rank_*/{RANK_FILE})")
    return folder


def read_ranks(folder: Path) -> list[list[dict[str, Any]]]:
    """Contents of all files, by pipeline stage and tensor-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?", path.name)
        if match:
            found[int(match[2] or 0), int(match[1])] = path / RANK_FILE
    num_stages, num_ranks = (max(key[i] for key in found) + 1 for i in (0, 1))
    missing = [(pp, tp) for pp in range(num_stages) for tp in range(num_ranks) if (pp, tp) not in found]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the files of (pipeline stage, tensor rank) {missing[:4]}")
    ranks = [[read_file(found[pp, tp]) for tp in range(num_ranks)] for pp in range(num_stages)]
    args = ranks[0][0]["args"]
    if args.tensor_model_parallel_size != num_ranks:
        raise FileNotFoundError(
            f"{folder} was saved by {args.tensor_model_parallel_size} tensor-parallel ranks; found are {num_ranks}"
        )
    return ranks


def read_file(path: Path) -> dict[str, Any]:
    """Raises ValueError if it names other classes than those above, OSError if it is damaged."""
    try:
        with _known_classes():
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return content
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than weights and settings, and is not read: {error}") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise OSError(f"{path} cannot be read, it may be damaged: {error}") from error
