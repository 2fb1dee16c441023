"""Links to tensors that lie unchanged in another checkpoint, in place of copies.

A file of tensors gets a second name, `linked_N.distcp`, in the folder of the new checkpoint; its metadata say which of
the tensors in it are meant.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

from megatron.early_exit.checkpoint.checksums import Checksums
from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.checkpoint.store import has_training_state, read_checkpoint
from megatron.early_exit.checkpoint.tensors import Origin, Tensors
from megatron.early_exit.config.checkpoint_files import METADATA_FILE
from megatron.early_exit.model.key_names import extra_state_key, has_extra_state, key_of, name_of


def unchanged_tensors(tensors: Tensors, save: Path) -> dict[str, Origin]:
    """Tensors that need not be written: those of the checkpoint that most come from, if files can be linked."""
    origins = {name: t.origin for name, t in tensors.items() if t.origin is not None and name_of(t.origin.key) == name}
    folders = {origin.folder for origin in origins.values()}
    if len(folders) != 1:
        return {}
    (folder,) = folders
    existing = next(path for path in (save, *save.absolute().parents) if path.exists())
    can_link = os.stat(folder).st_dev == os.stat(existing).st_dev and not has_training_state(folder)
    return origins if can_link else {}


def link_rest(target: Path, base: Path) -> Checksums:
    """Let the checkpoint that is being made in `target` have all parameters of `base` that it does not have itself.

    Returns the checksums of what it has from there."""
    present = read_metadata(target).state_dict_metadata
    _, tensors = read_checkpoint(base)
    absent = {name: tensor.origin for name, tensor in tensors.items() if key_of(name) not in present}
    return link_tensors(target, {name: origin for name, origin in absent.items() if origin is not None})


def link_tensors(target: Path, linked: dict[str, Origin]) -> Checksums:
    """Let the checkpoint in `target` have the tensors `linked` (by name) as well, from the files they lie in."""
    ours, source = read_metadata(target), next(iter(linked.values())).folder
    theirs = read_metadata(source)
    keys = {origin.key: key_of(name) for name, origin in linked.items()}  # in the source -> here
    keys |= {extra_state_key(key): extra_state_key(key) for key in keys if has_extra_state(key)}
    keys = {key: here for key, here in keys.items() if key in theirs.state_dict_metadata}
    renamed: dict[str, str] = {}
    for index, info in theirs.storage_data.items():
        if index.fqn not in keys:
            continue
        if info.relative_path not in renamed:
            renamed[info.relative_path] = f"linked_{len(renamed)}.distcp"
            _link_file(source / info.relative_path, target / renamed[info.relative_path])
        here = replace(index, fqn=keys[index.fqn])
        ours.storage_data[here] = replace(info, relative_path=renamed[info.relative_path])
    ours.state_dict_metadata |= {here: theirs.state_dict_metadata[key] for key, here in keys.items()}
    with (target / METADATA_FILE).open("wb") as file:
        pickle.dump(ours, file)
    return Checksums.read(source).renamed(renamed)


def _link_file(source: Path, target: Path) -> None:
    """The same file under another name; on another file system, one that points to it."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.resolve())
