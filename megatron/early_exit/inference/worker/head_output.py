"""Next-token distributions of one head for a batch of rows, with the vocabulary split over tensor-parallel ranks.

What leaves the device is small: a few numbers a row when the output is made, and what is then asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.inference.worker.sampling import (
    Draw,
    columns_of,
    draw_tokens,
    ordered_keys,
    rows_of,
    values_and_ids,
)
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from megatron.early_exit.platform.device import to_device

# exp of it is still a normal number in fp32.
_SMALLEST = -80.0


class ShortlistColumns(NamedTuple):
    """The ids of the columns of a head that has not one for every id."""

    ids: Tensor
    """[columns] ascending"""
    num_ids: int
    """Columns from here on are padding."""


class HeadOutput:
    """softmax(logits) over the tokenizer's ids, or over a shortlist of them, for each of some rows.

    Ids that pad the embedding have probability 0. Every tensor-parallel rank must make the same calls; all get equal
    numbers, bit for bit, so that all take the same decisions. Of equally probable ids the smallest comes first."""

    def __init__(
        self,
        logits: Tensor,
        *,
        vocab_size: int,
        tp: TensorParallel,
        shortlist: ShortlistColumns | None = None,
    ) -> None:
        """logits: [rows, padded vocabulary / tp], any float type; over a shortlist [rows, shortlist / tp]. vocab_size:
        ids of the tokenizer."""
        self._tp, self._vocab_size, self._shortlist = tp, vocab_size, shortlist
        self._local_logits = logits.float()
        self._first_id = tp.rank * logits.size(1)
        self._num_ids = max(vocab_size - self._first_id, 0) if shortlist is None else shortlist.num_ids
        if self._num_ids < logits.size(1):
            self._local_logits[:, self._num_ids :] = -torch.inf
        max_logit, column = self._local_logits.max(1)
        token = column + self._first_id if shortlist is None else shortlist.ids[column]
        # A rank of padding only has no finite logit. Numbers below the clamp add nothing, but would make exp return
        # denormal numbers, with which processors are slow.
        shifted = self._local_logits - max_logit.clamp(min=torch.finfo(torch.float32).min)[:, None]
        sum_exp = shifted.clamp_(min=_SMALLEST).exp_().sum(1)
        local = torch.stack([max_logit.double(), sum_exp.double(), token.double()], 1)
        # A gather, since the order in which an all-reduce adds may differ by rank.
        ranks = torch.stack(tp.gather(local)).tolist()
        self._rows = [_combine(numbers) for numbers in zip(*ranks, strict=True)]
        self._full_logits: Tensor | None = None

    def is_finite(self, row: int) -> bool:
        """Whether the row's logits are numbers: weights with NaN, or an overflow, make them otherwise."""
        return math.isfinite(self._rows[row][1])

    def token(self, row: int) -> int:
        """The most probable id."""
        return self._rows[row][2]

    def confidence(self, row: int) -> float:
        """The largest probability."""
        return math.exp(self.max_log_prob(row))

    def max_log_prob(self, row: int) -> float:
        """Log-probability (nats) of `token`."""
        return self._log_prob(row, self._rows[row][0])

    def log_probs_of(self, rows: Sequence[int], ids: Sequence[int]) -> list[float]:
        """Log-probability (nats) of one id for each of the rows; -inf for what is not on the shortlist."""
        tokens = to_device(ids, self._ids.device)
        logits = self._logits_of(rows, tokens).tolist()
        return [self._log_prob(row, logit) for row, logit in zip(rows, logits, strict=True)]

    def _logits_of(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """[rows] fp32 on every rank, of one id for each of the rows."""
        if self._tp.size == 1 and self._shortlist is None:
            return self._local_logits[list(rows), tokens]
        columns, is_here = columns_of(tokens, self._ids)
        local = self._local_logits[list(rows), columns].masked_fill_(~is_here, -torch.inf)
        return torch.stack(self._tp.gather(local)).amax(0)

    def top(self, rows: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
        """The `count` most probable (id, log-probability) of each of the rows, fewer if others have probability 0."""
        keys = ordered_keys(rows_of(self._local_logits, rows), self._ids)
        local = keys.topk(min(count, keys.size(1))).values
        keys = torch.cat(self._tp.gather(local), 1).sort(descending=True).values[:, :count]
        values, ids = values_and_ids(keys)
        pairs = torch.stack([ids.double(), values.double()], 2).tolist()
        return [
            [(int(token), self._log_prob(row, logit)) for token, logit in largest if logit != -math.inf]
            for row, largest in zip(rows, pairs, strict=True)
        ]

    def draw(self, draws: Sequence[Draw]) -> list[tuple[int, float]]:
        """(token, its log-probability in the head's own distribution) of each draw; see `sampling.py`.

        A row that is not finite gives token 0 and NaN."""
        results = [(self.token(draw.row), self.max_log_prob(draw.row)) for draw in draws]
        numbers = [number for number, draw in enumerate(draws) if self.is_finite(draw.row) and not draw.is_plain_argmax]
        if numbers:
            sampled = [draws[number] for number in numbers]
            rows = [draw.row for draw in sampled]
            tokens = draw_tokens(rows_of(self._local_logits, rows), self._ids, sampled, self._tp)
            pairs = torch.stack([tokens.double(), self._logits_of(rows, tokens).double()], 1).tolist()
            for number, row, (token, logit) in zip(numbers, rows, pairs, strict=True):
                if token < self._vocab_size:  # else all of a shortlist is excluded, and its best one is as good as any
                    results[number] = int(token), self._log_prob(row, logit)
        return results

    def logits(self, row: int) -> Tensor:
        """[vocabulary] fp32 on the CPU, on every rank; -inf for what is not on the shortlist.

        The first call gathers the rows of all ranks: for scores and tests, not for decoding."""
        if self._full_logits is None:
            logits = torch.cat(self._tp.gather(self._local_logits), 1).cpu()
            if self._shortlist is not None:
                ids = torch.cat(self._tp.gather(self._shortlist.ids)).cpu().clamp(max=self._vocab_size - 1)
                # Padding columns say -inf of any id; another column may know more about it.
                logits = logits.new_full((len(logits), self._vocab_size), -torch.inf).scatter_reduce_(
                    1, ids.expand(len(logits), -1), logits, "amax"
                )
            self._full_logits = logits[:, : self._vocab_size]
        return self._full_logits[row]

    @cached_property
    def _ids(self) -> Tensor:
        """[columns] ascending: the id of each column, of padding one that is no token."""
        if self._shortlist is None:
            return torch.arange(self._first_id, self._first_id + self._num_columns, device=self._local_logits.device)
        ids = self._shortlist.ids
        is_padding = torch.arange(self._num_columns, device=ids.device) >= self._num_ids
        return ids.masked_fill(is_padding, _NO_ID)

    @property
    def _num_columns(self) -> int:
        return self._local_logits.size(1)

    def _log_prob(self, row: int, logit: float) -> float:
        return min(logit - self._rows[row][1], 0.0)


class ArgmaxOutput:
    """The most probable token of some rows, and nothing else: what a certified head says. All logits are finite."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def is_finite(self, row: int) -> bool:
        return True

    def token(self, row: int) -> int:
        """The most probable id."""
        return self._tokens[row]

    def confidence(self, row: int) -> None:
        """Not known."""

    def max_log_prob(self, row: int) -> None:
        """Not known."""


AnyOutput = HeadOutput | ArgmaxOutput
"""Where only tokens are needed it is either."""

# Larger than any id, and below 2^32 (see `ordered_keys`).
_NO_ID = 2**31


def _combine(ranks: tuple[list[float], ...]) -> tuple[float, float, int]:
    """(largest logit, log-sum-exp, most probable id) from each rank's largest logit, sum of exp(logit - it) and id."""
    max_logit, _, token = max(ranks, key=lambda numbers: numbers[0])  # the first of equals, as argmax
    if not math.isfinite(max_logit) or not all(math.isfinite(numbers[1]) for numbers in ranks):
        return math.nan, math.nan, 0
    sum_exp = sum(sum_exp * math.exp(rank_max - max_logit) for rank_max, sum_exp, _ in ranks)
    return max_logit, max_logit + math.log(sum_exp), int(token)
