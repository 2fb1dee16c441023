"""The frequent tokens of a corpus, with which exits are evaluated first. `tools/evaluate.py calibrate` counts them;
they lie in the folder of the checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.early_exit.config.checkpoint_files import SHORTLIST_FILE
from megatron.early_exit.platform.files import replaced


@dataclass(frozen=True)
class Shortlist:
    """Ids, and how much of the corpus they are."""

    ids: np.ndarray
    """Ascending, int64."""
    coverage: float
    """Share of the corpus."""

    @classmethod
    def of_counts(cls, counts: np.ndarray, size: int) -> Shortlist:
        """The `size` most frequent ids. counts: [ids]. Raises ValueError if nothing was counted."""
        if counts.sum() == 0:
            raise ValueError("the corpus is empty: no token can be counted")
        ids = np.sort(np.argsort(-counts, kind="stable")[:size])
        return cls(ids.astype(np.int64), float(counts[ids].sum() / counts.sum()))

    @property
    def digest(self) -> str:
        """Differs if the ids differ."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, dtype="<i8").tobytes()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `SHORTLIST_FILE` into `folder`, at once or not at all."""
        with replaced(folder / SHORTLIST_FILE) as partial, partial.open("wb") as file:
            np.savez_compressed(file, ids=self.ids, coverage=self.coverage)

    @classmethod
    def load(cls, folder: Path) -> Shortlist | None:
        """What `save` wrote, or None if there is none. Raises ValueError if it cannot be read."""
        path = folder / SHORTLIST_FILE
        if not path.exists():
            return None
        try:
            with np.load(path) as arrays:
                return cls(arrays["ids"], float(arrays["coverage"]))
        except Exception as error:  # of the archive, of an array in it, of what should be in it
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); remove it, or calibrate the exits again"
            ) from error
