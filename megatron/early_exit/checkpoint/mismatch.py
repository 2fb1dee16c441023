"""Finds why a run cannot load a checkpoint, before core tries: core's own errors would say that its files are damaged.

Knows settings and metadata alone: nothing of the model or the optimizer that is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron.early_exit.config.run import RunConfig

_SHOWN = 3
"""Names of parameters in a message; of the others only the number."""


def optimizer_mismatch(config: RunConfig, saved: RunConfig) -> str | None:
    """Why the optimizer of a run with `config` cannot take the state of one with `saved`, or None if it can.

    The text follows the words 'the optimizer state is' and needs no more than flags to be understood."""
    training, saved_training = config.training, saved.training
    kind, saved_kind = config.optimizer, saved.optimizer
    if training.tune_exit != saved_training.tune_exit:
        return (
            "of a run that tuned exits alone (--tune-exit)" if saved_training.tune_exit
            else "of a run that trained the whole model, not exits alone (--tune-exit)"
        )  # fmt: skip
    if kind.optimizer != saved_kind.optimizer:
        return f"that of --optimizer {saved_kind.optimizer}, not of {kind.optimizer}"
    if kind.optimizer == "sgd" and bool(kind.sgd_momentum) != bool(saved_kind.sgd_momentum):
        return f"that of --sgd-momentum {saved_kind.sgd_momentum:g}, not of {kind.sgd_momentum:g}"
    is_distributed = config.parallel.use_distributed_optimizer
    if is_distributed != saved.parallel.use_distributed_optimizer:
        return f"of a run {'without' if is_distributed else 'with'} --use-distributed-optimizer, in another form"
    # The distributed optimizer keeps fp32 weights for all types, the others for half precision alone.
    if not is_distributed and is_half(config) != is_half(saved):
        return f"of a run in {precision(saved)}, not in {precision(config)}"
    return None


def is_half(config: RunConfig) -> bool:
    """Whether weights are kept in 16 bits, beside copies in 32 bits that the optimizer changes."""
    return config.training.bf16 or config.training.fp16


def precision(config: RunConfig) -> str:
    """Type of the weights, in words."""
    if config.training.bf16:
        return "bf16 (--bf16)"
    return "fp16 (--fp16)" if config.training.fp16 else "fp32 (neither --bf16 nor --fp16)"


def missing_files(folder: Path, metadata: Metadata) -> list[str]:
    """Names of files that the metadata of the checkpoint in `folder` speak of and that are not there."""
    names = {info.relative_path for info in metadata.storage_data.values()}
    return sorted(name for name in names if not (folder / name).exists())


def tensor_mismatches(wanted: Mapping[str, tuple[int, ...] | None], metadata: Metadata) -> list[str]:
    """What the tensors of a checkpoint lack or have otherwise, one clause a kind: 'it has no NAME'.

    wanted: shapes by key; None where any shape will do."""
    stored = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    missing = sorted(name for name in wanted if name not in stored)
    other = [
        f"{name} has the shape {list(stored[name])}, not {list(shape)}"
        for name, shape in sorted(wanted.items())
        if shape is not None and stored.get(name, shape) != shape
    ]
    clauses = [f"it has no {_some(missing)}"] if missing else []
    return clauses + ([_some(other)] if other else [])


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
