"""What lies in files and folders: checkpoints and tokenizers that a run reads, places that it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron.early_exit.config.checkpoint import CheckpointConfig
from megatron.early_exit.config.checkpoint_choice import missing_checkpoint
from megatron.early_exit.config.data import TOKENIZERS_WITHOUT_MODEL, DataConfig
from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.settings import RunSettings


def missing_inputs(cfg: RunSettings) -> Iterator[str]:
    """Checkpoints and tokenizers that are not where the flags say."""
    checkpoint, pretrained = cfg.checkpoint, cfg.checkpoint.pretrained_checkpoint
    if pretrained is not None and (missing := missing_checkpoint(pretrained, None)):
        yield f"--pretrained-checkpoint {pretrained}: {missing}; correct the path"
    if checkpoint.load is not None and not _may_be_empty(checkpoint):
        missing = missing_checkpoint(checkpoint.load, checkpoint.load_iteration)
        if missing:
            yield (
                f"--load {checkpoint.load}: {missing}; correct the path, or drop --load to train from scratch (a folder"
                " that is both --load and --save may be empty at first)"
            )
    yield from _tokenizer_problems(cfg.data)


def _may_be_empty(checkpoint: CheckpointConfig) -> bool:
    """Whether a run may begin here that goes on from its own checkpoints when it is started again."""
    return (
        checkpoint.load is not None
        and checkpoint.save is not None
        and os.path.realpath(checkpoint.load) == os.path.realpath(checkpoint.save)
        and not checkpoint.exit_on_missing_checkpoint
        and not checkpoint.load_iteration
    )


def _tokenizer_problems(data: DataConfig) -> Iterator[str]:
    path = data.tokenizer_model
    if path is None or data.tokenizer_type in TOKENIZERS_WITHOUT_MODEL:
        return
    if not os.path.exists(path):
        yield f"--tokenizer-model {path}: no such file or folder"
    elif data.tokenizer_type == "HuggingFaceTokenizer" and not os.path.isdir(path):
        yield f"--tokenizer-model {path}: HuggingFaceTokenizer needs the folder (with tokenizer.json), this is a file"
    elif data.tokenizer_type != "HuggingFaceTokenizer" and not os.path.isfile(path):
        yield f"--tokenizer-model {path}: {data.tokenizer_type} needs the .model file, this is a folder"


OUTPUT_FOLDERS = ("save", "cache_hidden_states", "data_cache_path", "tensorboard_dir", "wandb_save_dir")

OUTPUT_FILES = ("metrics_file", "profile_pipeline")


def output_problems(cfg: RunSettings) -> Iterator[str]:
    """Files and folders of the run that cannot be written."""
    values = {name: value for section in vars(cfg).values() for name, value in vars(section).items()}
    for name in (*OUTPUT_FOLDERS, *OUTPUT_FILES):
        if values[name] is None:
            continue
        try:
            problem = unwritable(Path(values[name]), is_folder=name in OUTPUT_FOLDERS)
        except OSError as error:  # a name that is too long, a loop of links
            problem = (error.strerror or str(error)).lower()
        if problem:
            yield f"{flag_of(name)} {values[name]}: {problem}"


def unwritable(path: Path, is_folder: bool) -> str | None:
    """Why `path`, or what is missing of it, cannot be written; None if it can."""
    present = path
    while not present.exists():
        if present.is_symlink():
            return f"{present} is a link to something that is not there; correct it, or choose another place"
        present = present.parent
    if present == path and is_folder != path.is_dir():
        return "this is a file; give a folder" if is_folder else "this is a folder; give the name of a file in it"
    if present != path and not present.is_dir():
        return f"{present} is a file, in which nothing can be created; choose another place"
    if not os.access(present, os.W_OK | (os.X_OK if present.is_dir() else 0)):
        return f"{present} cannot be written; change its permissions, or choose another place"
    return None
