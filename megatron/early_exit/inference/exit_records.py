"""What exits say along the full model's answers, decision by decision: the data behind certificates and planned exits.

`tools/evaluate.py calibrate` takes them while `full` decodes: every exit is evaluated and none is taken. Keys and
values are exact whatever exits, so what any thresholds and any choice of exits do up to their first difference from the
full model follows from them.

A folder in that of the checkpoint holds the records of one model and one set of prompts, in parts of some prompts each:
an interrupted calibration goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from megatron.early_exit.config.checkpoint_files import RECORDS_FOLDER
from megatron.early_exit.inference.certificates import AnswerSettings
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.platform.files import replaced
from megatron.early_exit.platform.part_files import read_parts, write_part

_ABOUT_FILE = "about.json"


@dataclass(frozen=True)
class PromptRecord:
    """The decisions of one answer: T tokens, E exits that tokens may leave at, in the order of layers."""

    prompt: int
    """Number of the prompt in its set."""
    tokens: np.ndarray
    """[T] int64: the full model's answer, the token that ended it included."""
    scores: np.ndarray
    """[T, E] float64: what each exit's threshold would have been compared with."""
    choices: np.ndarray
    """[T, E] int64: each exit's token."""
    final_confidences: np.ndarray
    """[T] float64: the final head's largest probability."""

    @property
    def is_wrong(self) -> np.ndarray:
        """[T, E] bool: where an exit's token is not the full model's."""
        wrong: np.ndarray = self.choices != self.tokens[:, None]
        return wrong


@dataclass(frozen=True)
class AboutRecords:
    """What a folder of records holds."""

    fingerprint: ExitFingerprint
    answers: AnswerSettings
    prompts: str
    """Digest of the prompts' ids, in order."""
    num_prompts: int


class RecordsFolder:
    """Records of one model and one set of prompts, as they come."""

    def __init__(self, checkpoint: Path, about: AboutRecords) -> None:
        answers = f"{about.answers.max_tokens}{'-ignore-eod' if about.answers.ignore_eod else ''}"
        key = f"{about.fingerprint.digest[:12]}-{about.prompts[:12]}-{answers}"
        self.path = checkpoint / RECORDS_FOLDER / key
        self.about = about

    def open(self) -> list[PromptRecord]:
        """What earlier runs have recorded, in the order of prompts. Raises ValueError if it cannot be read, or is of
        something else."""
        about = self.path / _ABOUT_FILE
        if about.exists():
            if _read_about(self.path) != self.about:
                raise ValueError(f"{self.path} holds records of another model or other prompts; remove it")
            return read_records(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        with replaced(about) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(self.about), indent=1))
        return []

    def add(self, records: Sequence[PromptRecord]) -> None:
        """Write a part, at once or not at all."""
        joined = {name: [getattr(one, name) for one in records] for name in _OF_DECISIONS}
        write_part(self.path, "prompts", {"prompts": [one.prompt for one in records]}, joined)


_OF_DECISIONS = ("tokens", "scores", "choices", "final_confidences")


def read_records(folder: Path) -> list[PromptRecord]:
    """All parts of a folder, in the order of prompts. Raises ValueError for one that cannot be read."""
    parts = read_parts(folder, ("prompts",), _OF_DECISIONS, "calibrate the exits again")
    found = {prompt: PromptRecord(prompt, *values) for prompt, *values in parts}
    return [found[prompt] for prompt in sorted(found)]


def recorded_scores(checkpoint: Path, fingerprint: ExitFingerprint) -> np.ndarray | None:
    """[decisions, exits] of the newest complete records of this model, for planning exits; None if there are none.

    Raises ValueError if they cannot be read."""
    complete = []
    for file in checkpoint.glob(f"{RECORDS_FOLDER}/*/{_ABOUT_FILE}"):
        about = _read_about(file.parent)
        if about.fingerprint == fingerprint:
            records = read_records(file.parent)
            # Of an interrupted calibration there are those whose answers ended first, which are short.
            complete += [(file.stat().st_mtime, records)] if len(records) == about.num_prompts else []
    if not complete:
        return None
    _, records = max(complete, key=lambda one: one[0])
    return np.concatenate([one.scores for one in records])


def _read_about(folder: Path) -> AboutRecords:
    try:
        return msgspec.json.decode((folder / _ABOUT_FILE).read_bytes(), type=AboutRecords)
    except msgspec.DecodeError as error:
        raise ValueError(f"{folder / _ABOUT_FILE} cannot be read ({error}); remove the folder") from error
