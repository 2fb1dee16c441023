"""Where an output projection has a certified int8 form besides, and for which numbers of rows that one is asked."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron.early_exit.inference.worker.exact_argmax import ArgmaxCounts, ExactArgmax
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.linear import MAX_INT8_ROWS, MORE_THAN_CACHES, Int8Linear, Linear
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

CertifiedHeadSetting = Literal["auto", "on", "off"]
CERTIFIED_HEAD_SETTINGS = ("auto", "on", "off")
"""auto: where it is faster; on: for all batches of up to `MAX_INT8_ROWS` rows."""

# Below this a weight lies in the caches, and reading less of it saves nothing.
_SMALL_BYTES = 2**22
# The int8 kernel reads so many numbers of a row at once.
_MULTIPLE = 16
# Rows that are timed, how often, and the share of the plain head's time that must be saved.
_TIMED_ROWS, _REPETITIONS, _WORTHWHILE = (1, 2, 4, MAX_INT8_ROWS), 3, 0.03
# Of the share of batches that get no answer: so many batches are imagined beforehand, one of them without.
_PRIOR_BATCHES = 50


class CertifiedHead:
    """An `ExactArgmax` where it is faster than the plain head, which is asked after it if it has no answer."""

    def __init__(self, argmax: ExactArgmax, seconds: dict[int, tuple[float, float]] | None = None) -> None:
        """seconds: for some numbers of rows, what the plain head takes and what `argmax` does, the same on all
        tensor-parallel ranks; None: it is always asked."""
        self._argmax, self._seconds = argmax, seconds

    @property
    def counts(self) -> ArgmaxCounts:
        return self._argmax.counts

    @property
    def num_bytes(self) -> int:
        """Memory beside the weight."""
        return self._argmax.num_bytes

    def pays(self, num_rows: int) -> bool:
        """Whether it is expected to save time for so many rows, by how often it had no answer so far."""
        if num_rows > MAX_INT8_ROWS:
            return False
        return self._seconds is None or self.saved_seconds(num_rows) > 0

    def saved_seconds(self, num_rows: int) -> float:
        """What it is expected to save for so many rows, if that is more than what can be told from noise; else 0, as
        where nothing was measured."""
        if num_rows > MAX_INT8_ROWS or self._seconds is None:
            return 0.0
        timed = sorted(self._seconds)
        plain, certified = self._seconds[timed[bisect_left(timed, num_rows)]]
        refused = (self.counts.refused + 1) / (self.counts.batches + _PRIOR_BATCHES)
        saved = plain - certified - refused * plain
        return saved if saved > _WORTHWHILE * plain else 0.0

    @property
    def most_rows(self) -> int:
        """The largest number of rows for which it pays; 0: for none."""
        return max((rows for rows in range(1, MAX_INT8_ROWS + 1) if self.pays(rows)), default=0)

    def tokens(self, hidden: Tensor, num_ids: int, temperature: float = 1.0) -> list[int] | None:
        """As `ExactArgmax`; None as well where asking it does not pay."""
        return self._argmax(hidden, num_ids, temperature) if self.pays(hidden.size(0)) else None


def can_certify(weight: Tensor, plain: Linear) -> bool:
    """Whether this weight, which `plain` reads, may have a certified form: the plain head must compute in fp32, or in
    bf16 with sums in fp32, on the CPU, where the int8 kernel takes the hidden size."""
    if weight.device.type != "cpu" or weight.size(1) % _MULTIPLE or isinstance(plain, Int8Linear):
        return False
    return weight.dtype in (torch.float32, torch.bfloat16) and torch.get_float32_matmul_precision() == "highest"


def certified_bytes(shape: Sequence[int], dtype: torch.dtype, setting: CertifiedHeadSetting) -> int:
    """Memory that the certified form of a weight [vocabulary / tp, h] of this type may take: its int8 form and two
    norms for each row. (The weight itself, if it is not kept as the embedding as well, is counted by the caller.)"""
    weight_bytes = math.prod(shape) * dtype.itemsize
    if setting == "off" or (setting == "auto" and weight_bytes < _SMALL_BYTES):
        return 0
    return math.prod(shape) + 8 * shape[0]


def certified_head(
    weight: Tensor, plain: Linear, tp: TensorParallel, setting: CertifiedHeadSetting
) -> CertifiedHead | None:
    """The certified form of a weight [vocabulary / tp, h]; None if it cannot have one, or it would not pay.

    plain: what computes logits from it. All tensor-parallel ranks call it together."""
    is_wanted = certified_bytes(weight.shape, weight.dtype, setting) > 0
    if not is_wanted or not can_certify(weight, plain):
        return None
    argmax = ExactArgmax(weight, tp)
    head = CertifiedHead(argmax, _measured(argmax, plain) if setting == "auto" else None)
    return head if head.most_rows else None


@torch.inference_mode()
def _measured(argmax: ExactArgmax, plain: Linear) -> dict[int, tuple[float, float]]:
    """Seconds of the plain head and of `argmax`, for some numbers of rows. All ranks get those of the first."""
    weight, tp = argmax.weight, argmax.tp
    elsewhere = torch.zeros(MORE_THAN_CACHES // 4)
    seconds: list[float] = []
    for num_rows in _TIMED_ROWS:
        # A hidden state like a row of the weight has one best id, as most hidden states of a trained model do.
        hidden = weight[:num_rows] * (
            weight.size(1) ** 0.5 / weight[:num_rows].float().norm(dim=1).clamp(min=1e-6).max()
        )
        hidden = hidden.to(weight.dtype)
        plain_head = lambda: HeadOutput(plain(hidden), vocab_size=tp.size * len(weight), tp=tp)  # noqa: B023
        certified = lambda: argmax(hidden)  # noqa: B023
        seconds += _best_seconds(plain_head, certified, elsewhere)
    argmax.counts = ArgmaxCounts()
    agreed = tp.gather(torch.tensor(seconds, dtype=torch.float64))[0].tolist()
    return {rows: (agreed[2 * i], agreed[2 * i + 1]) for i, rows in enumerate(_TIMED_ROWS)}


def _best_seconds(plain: Callable[[], object], certified: Callable[[], object], elsewhere: Tensor) -> list[float]:
    """Of each, interleaved; the weights come from memory, as they do behind layers."""
    times: list[list[float]] = [[], []]
    for _ in range(_REPETITIONS):
        for action, of_action in zip((plain, certified), times, strict=True):
            elsewhere.add_(1.0)
            started = time.perf_counter()
            action()
            of_action.append(time.perf_counter() - started)
    return [min(one) for one in times]


def certified_in_words(heads: Sequence[CertifiedHead]) -> str:
    """What these heads take, and for how many rows they are asked."""
    mebibytes = sum(head.num_bytes for head in heads) / 2**20
    return (
        f"for up to {max(head.most_rows for head in heads)} rows at once; their int8 weights take {mebibytes:.1f} MiB"
    )
