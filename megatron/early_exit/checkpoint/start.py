"""The checkpoint that a run starts from: which one it is, and why it could not be loaded.

Core finds only while it reads that the settings and a checkpoint do not belong together, and says it as if files were
damaged; here it is found first, from settings and metadata alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron.early_exit.checkpoint.checksums import DamagedFileError
from megatron.early_exit.checkpoint.folders import in_a_line
from megatron.early_exit.checkpoint.safe_pickle import UnsafeFileError, first_failure, read_metadata
from megatron.early_exit.config.checkpoint_choice import find_checkpoint
from megatron.early_exit.config.checkpoint_files import COMMON_FILE, FORMAT_FILE, METADATA_FILE, RUN_CONFIG_FILE
from megatron.early_exit.config.description import MismatchError, architecture_differences
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.config.serialize import load_run_config
from megatron.early_exit.config.settings import RunSettings

_SHOWN = 3
"""Names in a message; of the others only the number."""


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn any failure to read the checkpoint in `folder` into an OSError in one line; others are passed on."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = first_failure(error)
        if isinstance(cause, UnsafeFileError | MismatchError):
            raise cause from error
        if isinstance(cause, DamagedFileError):
            raise OSError(f"{cause}. Choose another checkpoint with --load-iteration.") from error
        raise OSError(
            f"the checkpoint {folder} cannot be read ({in_a_line(cause)}). It may be damaged: choose another with "
            "--load-iteration."
        ) from error


def find_start(config: RunConfig) -> tuple[RunConfig, Path | None]:
    """The checkpoint to start from, if any, and the settings: a pretrained model gives its weights alone.

    Raises ValueError or OSError if the run cannot start from it."""
    checkpoint = config.checkpoint
    folder = find_checkpoint(checkpoint.load, checkpoint.load_iteration)
    if folder is None and checkpoint.pretrained_checkpoint is not None:
        config = replace(config, checkpoint=replace(checkpoint, finetune=True))
        folder = find_checkpoint(checkpoint.pretrained_checkpoint, None, "--pretrained-checkpoint")
    if folder is not None:
        _check(folder, config)
    return config, folder


def loads_optimizer(config: RunConfig) -> bool:
    """Whether a run with these settings goes on with the optimizer state of its checkpoint."""
    return not (config.checkpoint.finetune or config.checkpoint.no_load_optim)


def _check(folder: Path, config: RunConfig) -> None:
    """Raise MismatchError or OSError with the reason if a run with these settings cannot load the checkpoint."""
    from megatron.early_exit.checkpoint.core_loading import load_common  # core: not for the tools that only look

    present = read_description(folder)
    if differences := architecture_differences(config.describe(present.padded_vocab_size, present), present):
        raise MismatchError(
            f"{folder} holds another architecture:\n  " + "\n  ".join(differences)
            + "\nChange the flags, or take the architecture from the checkpoint with --use-checkpoint-args."
        )  # fmt: skip
    check_is_whole(folder)
    if not loads_optimizer(config):
        return
    with reading(folder):
        common = load_common(folder)
    if "optimizer" not in common:
        raise MismatchError(
            f"{folder} has no optimizer state. Load weights only with --finetune, or --no-load-optim to go on counting."
        )
    saved = load_run_config(folder / RUN_CONFIG_FILE)
    if config.training.tune_exit != saved.training.tune_exit:
        did = "tuned exits alone" if saved.training.tune_exit else "trained the whole model"
        raise MismatchError(
            f"{folder} is of a run that {did}, so its optimizer state is of no use here. Start from its weights: give "
            "it as --pretrained-checkpoint, and another folder as --load."
        )
    if reason := optimizer_mismatch(config, saved):
        raise MismatchError(
            f"the optimizer state of {folder} is {reason}. Resume with the settings of the run that saved it, or go on "
            "without its optimizer state with --no-load-optim."
        )


def check_is_whole(folder: Path) -> None:
    """Raise FileNotFoundError if files of the checkpoint in `folder` are missing, OSError if it cannot be read."""
    with reading(folder):
        missing = _missing_files(folder)
    if missing:
        raise FileNotFoundError(
            f"the checkpoint {folder} is not whole: {_some(missing)} {'is' if len(missing) == 1 else 'are'} missing. "
            "Copy it again, or choose another with --load-iteration."
        )


def _missing_files(folder: Path) -> list[str]:
    """Names of files that a checkpoint has and that are not in `folder`."""
    names = [FORMAT_FILE, METADATA_FILE]
    if (folder / METADATA_FILE).exists():
        metadata = read_metadata(folder)
        if not any(name.startswith("common") for name in metadata.state_dict_metadata):
            names.append(COMMON_FILE)  # core 0.19 keeps it among the sharded objects
        names += sorted({info.relative_path for info in metadata.storage_data.values()})
    return [name for name in names if not (folder / name).exists()]


def optimizer_mismatch(config: RunSettings, saved: RunSettings) -> str | None:
    """Why the optimizer of a run with `config` cannot take the state of one with `saved`, or None if it can.

    The text follows the words 'the optimizer state is'."""
    kind, saved_kind = config.optimizer, saved.optimizer
    if kind.optimizer != saved_kind.optimizer:
        return f"that of --optimizer {saved_kind.optimizer}, not of {kind.optimizer}"
    if kind.optimizer == "sgd" and bool(kind.sgd_momentum) != bool(saved_kind.sgd_momentum):
        return f"that of --sgd-momentum {saved_kind.sgd_momentum:g}, not of {kind.sgd_momentum:g}"
    is_distributed = config.parallel.use_distributed_optimizer
    if is_distributed != saved.parallel.use_distributed_optimizer:
        return f"that of a run {'without' if is_distributed else 'with'} --use-distributed-optimizer, in another form"
    # The distributed optimizer keeps fp32 weights for all types, the others for half precision alone.
    if not is_distributed and _is_half(config) != _is_half(saved):
        return f"that of a run in {_precision(saved)}, not in {_precision(config)}"
    return None


def _is_half(config: RunSettings) -> bool:
    return config.training.bf16 or config.training.fp16


def _precision(config: RunSettings) -> str:
    if config.training.bf16:
        return "bf16 (--bf16)"
    return "fp16 (--fp16)" if config.training.fp16 else "fp32 (neither --bf16 nor --fp16)"


def tensor_mismatches(wanted: Mapping[str, tuple[int, ...] | None], metadata: Metadata) -> list[str]:
    """What the tensors of a checkpoint lack or have otherwise, in clauses such as 'it has no NAME'.

    wanted: shapes by name; None where any shape will do."""
    stored = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    missing = sorted(name for name in wanted if name not in stored)
    others = [
        f"{name} has the shape {list(stored[name])}, not {list(shape)}"
        for name, shape in sorted(wanted.items())
        if shape is not None and stored.get(name, shape) != shape
    ]
    return ([f"it has no {_some(missing)}"] if missing else []) + ([_some(others)] if others else [])


def check_holds_model(folder: Path, wanted: Mapping[str, tuple[int, ...] | None], metadata: Metadata) -> None:
    """Raise MismatchError if the checkpoint in `folder`, which has `metadata`, lacks parameters of the model, or has
    others. wanted: as of `tensor_mismatches`"""
    if clauses := tensor_mismatches(wanted, metadata):
        raise MismatchError(
            f"{folder} does not hold the model that its settings describe: {'; '.join(clauses)}. Its files "
            "may be those of another checkpoint: choose another with --load-iteration."
        )


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
