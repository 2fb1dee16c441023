"""The greedy token of a head from its weights in int8: the plain head's own token, or none.

Reading a quarter of the bytes costs a third to a half of the time for one row, but int8 scores are not the head's
logits. They say which few ids can be the largest; those rows of the untouched weight are read as well:

1. **Scores and bounds.** For row i of the weight, w_i, let q_i be the int8 row times its scale, h' the hidden state in
   bf16, s_i the kernel's score. p_i is the logit that the plain head would give. Then |s_i - p_i| <= r_i, the sum of

   - `2^-8 |s_i|`: the kernel rounds its sum, x_i, to bf16 (8 bits): half a unit of the last place of s_i at most
   - `g (|w_i| + |e_i|) |h'|`: it multiplies and adds n numbers in fp32, in whatever order: at most g sum_k |q_ik h'_k|,
     with g = n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability, section 3.1), for fused products as well; the
     sum is at most |q_i| |h'| (Cauchy-Schwarz), and |q_i| <= |w_i| + |e_i|. int8 numbers times a scale of 8 bits are
     exact in fp32
   - `|e_i| |h'|`: q_i = w_i + e_i: what was lost with int8
   - `|w_i| |h - h'|`: what was lost of the hidden state (nothing, if it is bf16)
   - `g |w_i| |h|`: the plain head adds in fp32 as well
   - `2^-8 (|s_i| + r_i)`: only where the plain head gives bf16: it rounds its sum

   and of what processors flush to zero, which is below 2^-126 for each of the n products and sums, and times |h_k| or
   |w_ik| where it was a factor. Norms |w_i|, |e_i| are stored rounded up.
2. **Candidates.** The id with the largest s_j - r_j has a logit of at least that. Ids with s_i + r_i below it are not
   the largest.
3. **Intervals.** Of each candidate the dot product is computed in fp64, t_i, and with it the bound of the plain head's
   own rounding, m_i = g sum_k |w_ik h_k|: its logit lies between t_i - m_i and t_i + m_i, both rounded, and divided by
   the temperature, as the plain head does it (rounding keeps order).
4. **The token.** The id w with the largest lower end is the plain head's token if every other candidate's upper end is
   smaller, or equal and of a larger id: of equal logits the smallest id is taken. If not, two logits are closer than
   the plain head's rounding, and it alone can tell what it would say: there is no answer, and the plain head is asked.

So an answer is bit for bit the plain head's argmax, whatever kernel the plain head uses for these rows. What is not
finite or nearly too large for fp32 gives no answer either. Under tensor parallelism each rank does this for its ids,
and the ranks compare intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.inference.worker.linear import Int8Linear
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

# Unit roundoffs: an operation's relative error is at most this.
_FP32, _BF16 = 2.0**-24, 2.0**-8
_SMALLEST_NORMAL = 2.0**-126
# More than what the bound's own arithmetic in fp32, and a division of logits by a temperature, may be wrong by.
_SLACK = 1.0 + 2.0**-10
# Logits, and all sums on the way, stay below this: nothing overflows, in bf16 neither.
_LARGEST = 2.0**100
# With more candidates a row the head is too flat to be certified.
_MOST_CANDIDATES = 256
# Rows of the weight of which norms are computed at once, in fp64.
_PIECE = 4096


class _Interval(NamedTuple):
    """Where the plain head's largest logit of a row lies, of one rank's ids."""

    lower: float
    """Of the id with the largest lower end."""
    token: int
    """That id."""
    upper: float
    """The largest upper end, of any id. Infinite: there is no answer."""
    is_certain: bool
    """Whether no other id of this rank can be the plain head's token."""


_UNKNOWN = _Interval(-math.inf, 0, math.inf, False)
_NO_IDS = _Interval(-math.inf, 0, -math.inf, True)


@dataclass
class ArgmaxCounts:
    """How often a head was asked, and what came of it."""

    batches: int = 0
    refused: int = 0
    """Batches without an answer."""
    rows: int = 0
    candidates: int = 0
    """Of these rows, on this rank."""


class ExactArgmax:
    """The plain head's greedy tokens, where they can be certified. On the CPU.

    All tensor-parallel ranks make the same calls and get the same answers."""

    def __init__(self, weight: Tensor, tp: TensorParallel | None = None) -> None:
        """weight: [vocabulary / tp, h], this rank's, fp32 or bf16; it is kept, so a copy costs memory."""
        self.weight, self.tp = weight, tp or TensorParallel()
        self.counts = ArgmaxCounts()
        self._int8 = Int8Linear(weight)
        norms = [self._norms_of(slice(start, start + _PIECE)) for start in range(0, len(weight), _PIECE)]
        self._norms = torch.cat(norms, 1)
        """[2, vocabulary / tp] fp32: |e_i|, |w_i|"""
        self._largest_norm = float(self._norms.sum(0).amax())  # NaN if a weight is
        n = weight.size(1)
        self._gamma = n * _FP32 / (1.0 - n * _FP32)

    def _norms_of(self, rows: slice) -> Tensor:
        weight = self.weight[rows].double()
        errors = self._int8.dequantised(rows).double().sub_(weight)
        return torch.stack([errors.norm(dim=1), weight.norm(dim=1)]).mul_(1.0 + 2.0**-22).float()

    @property
    def num_bytes(self) -> int:
        """Memory beside the weight."""
        return self._int8.num_bytes + self._norms.nbytes

    def __call__(self, hidden: Tensor, num_ids: int | None = None, temperature: float = 1.0) -> list[int] | None:
        """The most probable id of each row, or None if one of them cannot be certified.

        hidden: [rows, h] as the plain head reads it, at most `MAX_INT8_ROWS`; num_ids: of all ranks, the others are
        padding; temperature: the plain head's logits are divided by it. A batch has an answer or has none: where the
        plain head must be asked it is asked for the whole batch, as it may use another kernel for fewer rows."""
        intervals = self._intervals(hidden, num_ids, temperature)
        local = torch.tensor(intervals, dtype=torch.float64)  # [rows, 4]
        ranks = [[_Interval(*row) for row in one.tolist()] for one in self.tp.gather(local)]
        winners = [_winner(of_row) for of_row in zip(*ranks, strict=True)]
        self.counts.batches += 1
        self.counts.rows += len(winners)
        tokens = [token for token in winners if token is not None]
        if len(tokens) < len(winners):
            self.counts.refused += 1
            return None
        return tokens

    def _intervals(self, hidden: Tensor, num_ids: int | None, temperature: float) -> list[_Interval]:
        """Of each row, over this rank's ids."""
        first_id, num_rows = self.tp.rank * len(self.weight), hidden.size(0)
        count = len(self.weight) if num_ids is None else min(max(num_ids - first_id, 0), len(self.weight))
        if count == 0:
            return [_NO_IDS] * num_rows
        norms = _Norms.of(hidden)
        if not all(norm * self._largest_norm < _LARGEST for norm in (*norms.hidden, *norms.rounded)):  # as with NaN
            return [_UNKNOWN] * num_rows
        scores, bounds = self.scores_and_bounds(hidden, norms)
        scores, bounds = scores[:, :count], bounds[:, :count]
        least = (scores - bounds).amax(1, keepdim=True)
        rows, columns = (scores.add_(bounds) >= least).nonzero(as_tuple=True)
        self.counts.candidates += len(rows)
        if len(rows) > _MOST_CANDIDATES * num_rows:
            return [_UNKNOWN] * num_rows
        lower, upper = (end.double().tolist() for end in self._ends(hidden, rows, columns, temperature))
        of_rows: list[list[tuple[float, int, float]]] = [[] for _ in range(num_rows)]
        for row, column, low, high in zip(rows.tolist(), columns.tolist(), lower, upper, strict=True):
            of_rows[row].append((low, first_id + column, high))
        return [_interval(candidates) for candidates in of_rows]

    def scores_and_bounds(self, hidden: Tensor, norms: _Norms | None = None) -> tuple[Tensor, Tensor]:
        """(s, r), each [rows, vocabulary / tp] fp32, of the docstring above: no logit of the plain head is further from
        its score than its bound. norms: of `hidden`, if they are known."""
        norms = norms or _Norms.of(hidden)
        n, gamma = hidden.size(1), self._gamma
        of_error = [(1.0 + gamma) * rounded for rounded in norms.rounded]
        of_weight = [
            gamma * rounded + lost + gamma * whole
            for rounded, lost, whole in zip(norms.rounded, norms.lost, norms.hidden, strict=True)
        ]
        flushed = [
            _SMALLEST_NORMAL * (4 * n + 4 * math.sqrt(n) * (whole + self._largest_norm)) for whole in norms.hidden
        ]
        of_score, factor = _BF16 * _SLACK, _SLACK
        if self.weight.dtype == torch.bfloat16:  # the plain head's logits are as well
            of_score, factor = of_score * (2.0 + _BF16), factor * (1.0 + _BF16)
        scores = self._int8(hidden).float()
        coefficients = torch.tensor([of_error, of_weight]).mul_(factor).t()  # [rows, 2]
        bounds = torch.mm(coefficients, self._norms).add_(torch.tensor(flushed)[:, None])
        return scores, bounds.add_(scores.abs(), alpha=of_score)

    def _ends(self, hidden: Tensor, rows: Tensor, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Ends of the intervals in which the plain head's logits of some (row, column) lie, [candidates] each."""
        products = self.weight[columns].double() * hidden.double()[rows]  # exact
        exact = products.sum(1)
        # The sum in fp64 is wrong by far less than the slack.
        margins = products.abs_().sum(1) * (self._gamma * _SLACK) + _SMALLEST_NORMAL * 8 * hidden.size(1)
        margins += _SMALLEST_NORMAL * 4 * (hidden.double().abs().sum(1)[rows] + self._largest_norm * hidden.size(1))
        ends = (exact - margins, exact + margins)
        lower, upper = (end.float().to(self.weight.dtype).float() for end in ends)
        return (lower, upper) if temperature == 1.0 else (lower / temperature, upper / temperature)


class _Norms(NamedTuple):
    """Euclidean norms of each row of a batch of hidden states h, which the kernel reads as h', in bf16."""

    hidden: list[float]
    """|h|"""
    rounded: list[float]
    """|h'|"""
    lost: list[float]
    """|h - h'|"""

    @classmethod
    def of(cls, hidden: Tensor) -> _Norms:
        whole, rounded = hidden.double(), hidden.bfloat16().double()
        return cls(*(x.norm(dim=1).tolist() for x in (whole, rounded, whole - rounded)))


def _interval(candidates: list[tuple[float, int, float]]) -> _Interval:
    """candidates: (lower end, id, upper end) of one row on one rank, with ascending ids"""
    lower, token, _ = max(candidates, key=lambda one: one[0])  # the first of equals
    others = [(high, other) for _, other, high in candidates if other != token]
    is_certain = all(high < lower or (high == lower and token < other) for high, other in others)
    return _Interval(lower, token, max(high for *_, high in candidates), is_certain)


def _winner(ranks: Sequence[_Interval]) -> int | None:
    """The plain head's token, of the intervals of all ranks, whose ids ascend; None: it is not certain."""
    best = max(range(len(ranks)), key=lambda rank: ranks[rank].lower)  # the first of equals
    lower = ranks[best].lower
    beaten = lambda rank: ranks[rank].upper < lower or (ranks[rank].upper == lower and best < rank)
    if not ranks[best].is_certain or not all(beaten(rank) for rank in range(len(ranks)) if rank != best):
        return None
    return int(ranks[best].token)
