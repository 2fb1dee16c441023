"""How the folder of a run and the checkpoints in it look: the names of all files, and paths made of them.

    RUN/                                        what --save and --load name
        latest_checkpointed_iteration.txt       number of the last finished checkpoint
        run.lock                                who writes here (`platform/folder_lock.py`)
        iter_0000100/                           a finished checkpoint
            model.yaml                          what the model is; checkpoints of earlier versions have none
            run_config.yaml                     all settings of the run; a converted checkpoint has none
            tokenizer/                          so that the checkpoint needs no other files
                tokenizer_settings.json         how it is read
                tokenizer.model, or ...         its own files
            .metadata, metadata.json            core's: which tensor lies in which file
            __0_0.distcp, ...                   core's: tensors
            common.pt                           core's: what is the same on all ranks
            linked_0.distcp, ...                links to files of another checkpoint, for unchanged tensors
            checksums.json                      of core's files
            exit_shortlist.npz                  frequent tokens, of which exits are evaluated first
            exit_probes.safetensors             probes, trained on
            exit_probe_answers/                     answers of the model
            exit_certificates.json              certified thresholds, computed from
            exit_records/                           what exits say along answers
            evaluation/                         results of tools/evaluate.py
        iter_0000100.partial/                   one that is being written, or whose writer was killed
        iter_0000100.replaced/                  one whose name another is getting
        iter_0000100.removed/                   an old one that is being removed

Names of the latest iteration, of `iter_...` and of core's files are Megatron-LM's, which has `release` in place of a
number for weights alone. Which checkpoint --load means: `checkpoint_choice.py`; renames: `checkpoint/folders.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

# In the folder of a run.

LATEST_FILE = "latest_checkpointed_iteration.txt"
LOCK_FILE = "run.lock"
RELEASE = "release"
"""Megatron-LM's name for the one checkpoint of weights alone: in LATEST_FILE, and of its folder."""

PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"
"""Behind the name of a checkpoint that is being written, while another gets its name, while it is removed."""

# In the folder of a checkpoint.

DESCRIPTION_FILE = "model.yaml"
RUN_CONFIG_FILE = "run_config.yaml"
TOKENIZER_FOLDER = "tokenizer"
CHECKSUMS_FILE = "checksums.json"
METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
"""Which says that the format is `torch_dist`."""
COMMON_FILE = "common.pt"
SHORTLIST_FILE = "exit_shortlist.npz"
PROBES_FILE = "exit_probes.safetensors"
PROBE_ANSWERS_FOLDER = "exit_probe_answers"
CERTIFICATE_FILE = "exit_certificates.json"
RECORDS_FOLDER = "exit_records"
RESULTS_FOLDER = "evaluation"

# In the folder of its tokenizer.

TOKENIZER_SETTINGS_FILE = "tokenizer_settings.json"
SENTENCEPIECE_FILE = "tokenizer.model"


def iteration_folder(run: str | Path, iteration: int) -> Path:
    """Folder of one checkpoint: `RUN/iter_0000123`."""
    return Path(run) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """The iteration of a checkpoint's folder, also of one whose name another is getting."""
    match = re.match(r"iter_(\d+)", folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named as the checkpoint of an iteration is (iter_0000123)")
    return int(match[1])


def iteration_folders(run: Path) -> list[Path]:
    """Folders in that of a run that are named as the checkpoint of an iteration is, in order of iterations."""
    return sorted((path for path in run.glob("iter_*") if is_iteration_name(path.name)), key=iteration_of)


def is_iteration_name(name: str) -> bool:
    return re.fullmatch(r"iter_\d{7,}", name) is not None


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` says what model it holds, as every finished checkpoint does."""
    return any((folder / name).is_file() for name in (DESCRIPTION_FILE, RUN_CONFIG_FILE))


def finished_iterations(run: Path) -> list[int]:
    """Iterations of all finished checkpoints in the folder of a run, in order."""
    return [iteration_of(folder) for folder in iteration_folders(run) if is_checkpoint(folder)]


def names_latest(run: Path) -> bool:
    """Whether the folder of a run says which checkpoint is the latest."""
    return (run / LATEST_FILE).exists()


def read_latest(run: Path) -> str:
    """What the folder of a run says of its latest checkpoint: an iteration, of Megatron-LM also `release`, or whatever
    else a damaged file holds. Raises OSError if it says nothing."""
    return (run / LATEST_FILE).read_text(encoding="utf-8").strip()


def chosen_folder(run: Path, iteration: int | None) -> Path:
    """Where the checkpoint of `iteration` should be, or the latest one, whoever wrote it (`release` too).

    Raises FileNotFoundError if nothing says which is the latest."""
    if iteration is not None:
        return iteration_folder(run, iteration)
    if not names_latest(run):
        raise FileNotFoundError(f"{run} holds no checkpoint: {LATEST_FILE} is missing")
    latest = read_latest(run)
    return iteration_folder(run, int(latest)) if latest.isdecimal() else run / latest
