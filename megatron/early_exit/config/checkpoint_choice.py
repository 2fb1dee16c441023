"""Which checkpoint is meant by a folder given as --load, and what to load instead if there is none."""

from __future__ import annotations

import os
from pathlib import Path

from megatron.early_exit.config.checkpoint_files import (
    DESCRIPTION_FILE,
    LATEST_FILE,
    REPLACED,
    finished_iterations,
    is_checkpoint,
    iteration_folder,
    names_latest,
    read_latest,
)
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.formats import other_content


def checkpoint_folder(load: str | Path, load_iteration: int | None = None, flag: str = "--load") -> Path:
    """Folder of a checkpoint below the folder `load`: of the last finished one, or of `load_iteration`. flag: which
    gave `load`.

    Raises ConfigError with what is missing and what to load instead."""
    if not Path(load).is_dir():
        raise ConfigError([f"{flag} {load}: no such folder"])
    if other := other_content(load):
        raise ConfigError([f"{flag} {load} holds {other}"])
    iteration = load_iteration or _latest_iteration(Path(load), flag)
    folder = iteration_folder(load, iteration)
    if is_checkpoint(folder):
        return folder
    replaced = folder.with_name(folder.name + REPLACED)
    if not folder.exists() and is_checkpoint(replaced):
        return replaced  # the run was killed between two renames
    if folder.exists():
        what = f"no finished checkpoint ({folder / DESCRIPTION_FILE} is missing)"
    elif load_iteration:
        what = f"--load-iteration {load_iteration}: {folder} does not exist"
    else:
        what = f"{Path(load) / LATEST_FILE} names iteration {iteration}, but {folder} does not exist"
    raise ConfigError([f"{flag} {load}: {what}. {_instead(Path(load))}"])


def find_checkpoint(load: str | None, load_iteration: int | None, flag: str = "--load") -> Path | None:
    """`checkpoint_folder`, or None if `load` has none yet (a run that starts where it will save)."""
    if load is None or (load_iteration is None and not names_latest(Path(load))):
        return None
    return checkpoint_folder(load, load_iteration, flag)


def has_checkpoint(load: str) -> bool:
    """Whether a folder of checkpoints holds a finished one."""
    return missing_checkpoint(load, None) is None


def missing_checkpoint(load: str, load_iteration: int | None) -> str | None:
    """What is not there of the checkpoint to load, in words, or None. Looks at names alone."""
    if not os.path.isdir(load):
        is_file = os.path.exists(load)
        return "this is a file; give the folder that holds the checkpoints" if is_file else "no such folder"
    if other := other_content(load):
        return f"it holds {other}"
    wanted = iteration_folder(load, load_iteration) if load_iteration else Path(load) / LATEST_FILE
    return None if wanted.exists() else f"no checkpoint in it ({wanted.name} is missing)"


def _latest_iteration(load: Path, flag: str) -> int:
    latest = load / LATEST_FILE
    try:
        text = read_latest(load)
    except OSError:
        raise ConfigError([f"{flag} {load}: {latest} is missing. {_instead(load)}"]) from None
    if not text.isdecimal():
        raise ConfigError(
            [f"{flag} {load}: {latest} should hold an iteration, it holds {text[:40]!r}. {_instead(load)}"]
        )
    return int(text)


def _instead(load: Path) -> str:
    newest = max(finished_iterations(load), default=None)
    if newest is None:
        return f"There is no finished checkpoint in {load}"
    return (
        f"The newest finished checkpoint there is that of iteration {newest}: load it with --load-iteration {newest}, "
        f"or write {newest} into {LATEST_FILE} to go on from it"
    )
