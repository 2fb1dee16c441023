"""What is known of a model's exits from running it over text: which tokens are frequent, how confident exits
are, how often they are right.

`tools/calibrate_exits.py` measures it; it lies beside the weights, in the folder of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.early_exit.inference.results import ScoreResult

CALIBRATION_FILE = "exit_calibration.npz"


@dataclass(frozen=True)
class ExitCalibration:
    """Counts over a corpus, and every exit's predictions for some tokens of it."""

    shortlist: np.ndarray
    """The most frequent ids, ascending, int64."""
    coverage: float
    """Share of the corpus that the shortlist covers."""
    exit_layers: tuple[int, ...]
    """Layer numbers of the exits, ascending."""
    confidences: np.ndarray
    """[tokens, exits] fp32: largest probability at each exit."""
    agrees: np.ndarray
    """[tokens, exits] bool: whether the exit's most probable token is that of the final head."""

    def save(self, folder: Path) -> None:
        """Write `CALIBRATION_FILE` into `folder`, at once or not at all."""
        partial = folder / f"{CALIBRATION_FILE}.partial"
        with partial.open("wb") as file:
            np.savez_compressed(
                file, shortlist=self.shortlist, confidences=self.confidences, agrees=self.agrees,
                about=json.dumps({"coverage": self.coverage, "exit_layers": self.exit_layers}),
            )  # fmt: skip
        partial.rename(folder / CALIBRATION_FILE)

    @classmethod
    def load(cls, folder: Path) -> ExitCalibration | None:
        """What `save` wrote, or None if there is none. Raises ValueError if it cannot be read."""
        path = folder / CALIBRATION_FILE
        if not path.exists():
            return None
        try:
            with np.load(path) as arrays:
                about = json.loads(str(arrays["about"]))
                return cls(
                    arrays["shortlist"], about["coverage"], tuple(about["exit_layers"]), arrays["confidences"],
                    arrays["agrees"],
                )  # fmt: skip
        except Exception as error:  # of the archive, of an array in it, of what should be in it
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); remove it, or calibrate the exits again"
            ) from error

    def table(self, thresholds: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)) -> list[tuple[str, ...]]:
        """For every exit how often it agrees with the final head, and for each threshold how often it would be taken
        and how often it agrees then. With a head line."""
        rows = [("exit", "agrees", *(f"from {t:g}: taken, agrees" for t in thresholds))]
        for index, layer in enumerate(self.exit_layers):
            cells = []
            for threshold in thresholds:
                taken = self.confidences[:, index] >= threshold
                agrees = f"{self.agrees[taken, index].mean():.1%}" if taken.any() else "-"
                cells.append(f"{taken.mean():.1%}, {agrees}")
            rows.append((str(layer), f"{self.agrees[:, index].mean():.1%}", *cells))
        return rows


def observations(results: Sequence[ScoreResult]) -> tuple[np.ndarray, np.ndarray]:
    """(confidences, agrees) of `ExitCalibration` from the scores of all exits and the final head."""
    confidences, agrees = [], []
    for result in results:
        *exits, final = result.heads
        confidences.append(np.array([head.confidences for head in exits], dtype=np.float32).T)
        agrees.append(np.array(final.tokens)[:, None] == np.array([head.tokens for head in exits]).T)
    return np.concatenate(confidences), np.concatenate(agrees)


def frequent_tokens(counts: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """(the `size` most frequent ids, ascending; the share of all counts that they have). counts: [ids]"""
    if counts.sum() == 0:
        raise ValueError("the corpus is empty: no token can be counted")
    ids = np.sort(np.argsort(-counts, kind="stable")[:size])
    return ids.astype(np.int64), float(counts[ids].sum() / counts.sum())
