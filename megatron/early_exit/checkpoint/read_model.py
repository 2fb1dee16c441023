"""The parameters of a checkpoint, to be read one by one, after it was checked that all are there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron.early_exit.checkpoint.parameters import expected_shapes
from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.checkpoint.start import check_holds_model, check_is_whole, reading
from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.checkpoint.tensors import Tensors
from megatron.early_exit.checkpoint.vocabulary import OUTPUT_WEIGHT
from megatron.early_exit.config.checkpoint_files import CHECKSUMS_FILE, DESCRIPTION_FILE, METADATA_FILE, RUN_CONFIG_FILE
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.model.key_names import key_of, stored_key


def read_model(folder: Path) -> tuple[ModelDescription, Tensors]:
    """What `read_checkpoint` gives, of a checkpoint that holds all parameters of the model that it describes.

    Raises FileNotFoundError or OSError if files are missing or damaged, MismatchError if parameters are missing or of
    other shapes, ConfigError for a description that is none."""
    description = read_description(folder)
    check_is_whole(folder)
    with reading(folder):
        stored = read_metadata(folder)
        wanted: dict[str, tuple[int, ...] | None] = {}
        for name, shape in expected_shapes(description.model, description.exits).items():
            # Rows that pad the vocabulary may be more or fewer in the weights of exits and heads, as core allows.
            key = stored_key(key_of(name), stored.state_dict_metadata)
            wanted[key] = None if name.endswith(OUTPUT_WEIGHT) else shape
        check_holds_model(folder, wanted, stored)
        return read_checkpoint(folder)


def fingerprint(folder: Path) -> str:
    """Hexadecimal digits that differ if another checkpoint lies in `folder`: of what lists its tensors, with their
    checksums where it has these, and of its settings."""
    digest = hashlib.sha256()
    for name in (METADATA_FILE, CHECKSUMS_FILE, DESCRIPTION_FILE, RUN_CONFIG_FILE):
        file = folder / name
        content = file.read_bytes() if file.is_file() else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
