"""What is known of a model's exits from running it over text: which tokens are frequent, how sure exits are, how right.

`tools/calibrate_exits.py` measures it; it lies beside the weights, in the folder of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import HeadOutput

CALIBRATION_FILE = "exit_calibration.npz"


@dataclass(frozen=True)
class ExitCalibration:
    """Counts over a corpus, and every exit's word on some tokens of it."""

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


def frequent_tokens(counts: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """(the `size` most frequent ids, ascending; the share of all counts that they have). counts: [ids]"""
    if counts.sum() == 0:
        raise ValueError("the corpus is empty: no token can be counted")
    ids = np.sort(np.argsort(-counts, kind="stable")[:size])
    return ids.astype(np.int64), float(counts[ids].sum() / counts.sum())


@torch.inference_mode()
def outputs_over(decoder: Decoder, tokens: list[int]) -> list[HeadOutput]:
    """What every exit's own head, in order, and then the final head say about each row of a sequence. Uses slot 0."""
    layout = decoder.attention_metadata([Segment(0, 0, len(tokens))])
    hidden, residual, depth = decoder.embed(tokens, layout), None, 0
    outputs = []
    for index, one in enumerate(decoder.exits):
        hidden, residual = decoder.run_layers(hidden, layout, depth, one.depth)
        depth = one.depth
        states = residual if one.mlp is not None else hidden
        if one.block is not None:
            states = decoder.run_exit_block(index, hidden, layout)
        outputs.append(decoder.exit_output(index, states))
    hidden, _ = decoder.run_layers(hidden, layout, depth, decoder.num_layers)
    return [*outputs, decoder.final_output(hidden)]


def observe_exits(
    decoder: Decoder, sequences: list[list[int]], progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[np.ndarray, np.ndarray]:
    """(confidences, agrees) of `ExitCalibration` over `sequences` of ids. Uses slot 0. progress: (done, all)"""
    confidences, agrees = [], []
    for number, tokens in enumerate(sequences):
        *outputs, final = outputs_over(decoder, tokens)
        for row in range(len(tokens)):
            confidences.append([output.confidence(row) for output in outputs])
            agrees.append([output.token(row) == final.token(row) for output in outputs])
        progress(number + 1, len(sequences))
    return np.array(confidences, dtype=np.float32), np.array(agrees, dtype=bool)
