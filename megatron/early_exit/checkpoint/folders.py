"""Renames in the folder of a run, which hold whenever its writer is killed.

A checkpoint is written as `iter_0000100.partial`, flushed, renamed, and only then named as the latest; one that had its
name is `.replaced` meanwhile, one that is too old is `.removed` first (all names: `config/checkpoint_files.py`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.early_exit.checkpoint.safe_pickle import first_failure
from megatron.early_exit.config.checkpoint_files import (
    LATEST_FILE,
    PARTIAL,
    REMOVED,
    REPLACED,
    finished_iterations,
    is_iteration_name,
    iteration_folder,
)

_FULL_BYTES = 2**20
"""A disk with less than this free is full: files are written in larger pieces."""
_LINE = 400


def partial_folder(save: Path, iteration: int) -> Path:
    """Where a checkpoint is until it is complete."""
    final = iteration_folder(save, iteration)
    return final.with_name(final.name + PARTIAL)


def begin(save: Path, iteration: int) -> Path:
    """An empty folder to write the checkpoint of `iteration` into, which `publish` gives its name."""
    return empty(partial_folder(save, iteration))


def empty(folder: Path) -> Path:
    """`folder`, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(partial: Path, iteration: int) -> Path:
    """Give a complete checkpoint its name, in place of one that has it, and make it the latest. Returns its folder."""
    return publish_as(partial, iteration_folder(partial.parent, iteration), str(iteration))


def publish_as(partial: Path, final: Path, latest: str) -> Path:
    """`publish` under any name. final: folder beside `partial`; latest: what the file with the latest one says."""
    _flush(partial)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _make_latest(final.parent, latest)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _make_latest(save: Path, latest: str) -> None:
    tracker = save / LATEST_FILE
    temporary = tracker.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(latest)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(tracker)


def _flush(folder: Path) -> None:
    """Have all files on the disk, so that the name of a checkpoint never gets there before its content."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_old(save: Path, keep_last: int, newest: int) -> None:
    """Remove finished checkpoints of iterations before `newest`, but for the last ones."""
    for iteration in [i for i in finished_iterations(save) if i <= newest][:-keep_last]:
        folder = iteration_folder(save, iteration)
        removed = folder.with_name(folder.name + REMOVED)  # half of a checkpoint must not look like one
        folder.rename(removed)
        shutil.rmtree(removed)


def clean_up(save: Path) -> list[str]:
    """Finish the renames of a run that was killed and remove what it left half done. Returns what was done, in words.

    Nobody else may be writing into `save`."""
    done = []
    for path in sorted(save.glob("iter_*")):
        stem, suffix = path.stem, path.suffix
        if not is_iteration_name(stem) or suffix not in (PARTIAL, REPLACED, REMOVED):
            continue
        if suffix == REPLACED and not (save / stem).exists():
            path.rename(save / stem)
            done.append(f"restored {stem}, which a killed run was about to replace")
        else:
            shutil.rmtree(path)
            done.append(f"removed {path.name}, which a killed run left")
    (save / LATEST_FILE).with_suffix(".tmp").unlink(missing_ok=True)
    if not (save / LATEST_FILE).exists() and (iterations := finished_iterations(save)):
        _make_latest(save, str(iterations[-1]))
        done.append(f"made iteration {iterations[-1]} the latest: {LATEST_FILE} was missing")
    return done


def why_not_written(error: BaseException, folder: Path) -> str:
    """What kept a checkpoint from being written into `folder`, in a line.

    Only some of the writers say that a disk is full: PyTorch says which line of its code failed."""
    error = first_failure(error)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    numbers = {getattr(cause, "errno", None) for cause in _causes(error)}
    if errno.EDQUOT in numbers:
        return f"no space is left for it: the disk quota of {existing} is used up"
    if errno.ENOSPC in numbers or "No space left" in str(error) or free < _FULL_BYTES:
        return f"no space is left on its disk ({free / 2**20:,.1f} MiB free)"
    return in_a_line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def in_a_line(error: BaseException) -> str:
    """The error without the pages that PyTorch adds to some."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= _LINE else lines[0][:_LINE] + " ..."
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
