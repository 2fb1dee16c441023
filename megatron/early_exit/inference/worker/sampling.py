"""From logits to tokens: biases, penalties, temperature, top-k, top-p, min-p, and noise from a hash.

A token is the argmax of logits plus Gumbel noise, which draws from softmax(logits) (Maddison et al., arXiv:1411.0030).
The noise of an id depends on the seed, the number of the token in the answer and the id alone. So there is no generator
whose state must travel, and a tensor-parallel rank makes the noise of its own ids. Two heads that draw the same token
of an answer share their noise, so that a drafted token is often the one that the final head draws (Daliri et al.,
arXiv:2408.07978).

Shapes: n = draws, c = columns, the ids whose logits this rank has. Ids of columns ascend, over the ranks as well.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from megatron.early_exit.platform.device import to_device

# Most distributions reach top-p within this many tokens; sorting a whole vocabulary costs more than a small model.
_SENT_FIRST, _MORE = 512, 16

# Numbers that a CPU's cache holds while they are mixed.
_CACHED = 2**16

# exp of it is still a normal number in fp32.
_SMALLEST_LOG = -80.0
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Draw:
    """One token to be drawn from one row of a head's output."""

    row: int
    settings: SamplingSettings
    index: int
    """Number of the token in the answer, from 0."""
    history: Sequence[int]
    """Ids of the prompt and the answer, up to and with this row's."""
    num_prompt_tokens: int
    """How many ids of `history` are the prompt's."""
    excluded: Sequence[int] = ()
    """Ids that cannot be drawn, whatever their logits are."""

    @property
    def is_plain_argmax(self) -> bool:
        """Whether it is the head's most probable token."""
        return self.settings.is_plain_argmax and not self.excluded


def draw_tokens(logits: Tensor, ids: Tensor, draws: Sequence[Draw], tp: TensorParallel) -> Tensor:
    """[n] ids, equal on all ranks.

    logits: [n, c] fp32 as the head gave them, finite or -inf (never drawn), overwritten; ids: [c]"""
    _bias(logits, ids, draws)
    _penalise(logits, ids, draws)
    logits = _temper(logits, draws, tp)
    is_limited = [_Limits.of(draw).leave_out_some for draw in draws]
    if len(set(is_limited)) == 1:  # as nearly always
        return (_draw_among_largest if is_limited[0] else _draw_among_all)(logits, ids, draws, tp)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    for draw_some, is_theirs in ((_draw_among_largest, is_limited), (_draw_among_all, [not one for one in is_limited])):
        rows = list(itertools.compress(range(len(draws)), is_theirs))
        tokens[rows] = draw_some(rows_of(logits, rows), ids, [draws[row] for row in rows], tp)
    return tokens


def _draw_among_all(logits: Tensor, ids: Tensor, draws: Sequence[Draw], tp: TensorParallel) -> Tensor:
    """[n] ids. Each rank finds the best of its own ids; of equal ones the smallest wins."""
    scores, columns = _best(logits, ids, draws)
    if tp.size == 1:
        return ids[columns]
    local = torch.stack([scores.double(), ids[columns].double()])
    ranks = torch.stack(tp.gather(local))  # [tp, 2, n]
    winner = ranks[:, 0].argmax(0, keepdim=True)  # the first of equals
    return ranks[:, 1].gather(0, winner)[0].long()


def _draw_among_largest(
    logits: Tensor, ids: Tensor, draws: Sequence[Draw], tp: TensorParallel, count: int = _SENT_FIRST
) -> Tensor:
    """[n] ids within top-k and top-p. Each rank sends its `count` largest logits, and more where these are too few."""
    values, candidates, is_settled = _largest_kept(logits, ids, draws, tp, count)
    columns = _best(values, candidates, draws)[1]
    tokens = candidates.gather(1, columns[:, None])[:, 0]
    if count >= len(ids) or all(0 < draw.settings.top_k <= count for draw in draws):
        return tokens  # without a look at the device
    left = [row for row, settled in enumerate(is_settled.tolist()) if not settled]
    if left:
        tokens[left] = _draw_among_largest(rows_of(logits, left), ids, [draws[row] for row in left], tp, _MORE * count)
    return tokens


def _best(logits: Tensor, ids: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """[n] each: the largest sum of logit and noise, of those within min-p, and its column.

    logits: [n, c], overwritten; the largest of all ranks is 0. ids: [c] or [n, c]"""
    if any(draw.settings.min_p for draw in draws):
        min_p = [draw.settings.min_p for draw in draws]
        smallest = _column([math.log(p) if p else -math.inf for p in min_p], logits)
        logits.masked_fill_(logits < smallest, -torch.inf)
    _add_noise(logits, ids, draws)
    return logits.max(1)


# Biases, penalties and temperature.


def _bias(logits: Tensor, ids: Tensor, draws: Sequence[Draw]) -> None:
    """Add the biases of the settings, and -inf for what is excluded, in place."""
    biases = [(row, token, bias) for row, draw in enumerate(draws) for token, bias in draw.settings.logit_bias]
    biases += [(row, token, -math.inf) for row, draw in enumerate(draws) for token in draw.excluded]
    if not biases:
        return
    rows = to_device([row for row, _, _ in biases], logits.device)
    columns, is_here = columns_of(to_device([token for _, token, _ in biases], logits.device), ids)
    values = torch.tensor([bias for _, _, bias in biases], device=logits.device)
    logits.index_put_((rows[is_here], columns[is_here]), values[is_here], accumulate=True)


def _penalise(logits: Tensor, ids: Tensor, draws: Sequence[Draw]) -> None:
    """Make tokens of the answer, and for the repetition penalty those of the prompt, less probable, in place.

    Sources: CTRL, arXiv:1909.05858, as in transformers; OpenAI's API for frequency and presence."""
    counts = [_count_tokens(draw) if draw.settings.has_penalty else {} for draw in draws]
    if not any(counts):
        return
    rows = np.repeat(np.arange(len(counts)), [len(counted) for counted in counts])
    tokens = np.fromiter(itertools.chain.from_iterable(counts), np.int64)
    times = np.fromiter(itertools.chain.from_iterable(counted.values() for counted in counts), np.int64)
    rows, tokens, times = torch.from_numpy(np.stack([rows, tokens, times])).to(logits.device)
    columns, is_here = columns_of(tokens, ids)
    rows, columns, times = rows[is_here], columns[is_here], times[is_here]
    numbers = [
        (min(one.repetition_penalty, _LARGEST), one.frequency_penalty, one.presence_penalty)
        for one in (draw.settings for draw in draws)
    ]
    repetition, frequency, presence = torch.tensor(numbers, device=logits.device)[rows].t()
    old = logits[rows, columns]
    new = torch.where(old > 0, old / repetition, old * repetition).clamp_(-_LARGEST, _LARGEST)
    new -= frequency * times + presence * (times > 0)
    logits[rows, columns] = torch.where(old.isneginf(), old, new)


def _count_tokens(draw: Draw) -> dict[int, int]:
    """How often the answer holds each id of the prompt and the answer."""
    prompt, answer = draw.history[: draw.num_prompt_tokens], draw.history[draw.num_prompt_tokens :]
    return dict.fromkeys(prompt, 0) | Counter(answer)


def rows_of(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy. (On CPUs several times as fast as indexing with a list.)"""
    return logits.index_select(0, to_device(rows, logits.device))


def columns_of(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(column of each token, whether this rank has it: if not, the column is any)"""
    columns = torch.searchsorted(ids, tokens).clamp_(max=len(ids) - 1)
    return columns, ids[columns] == tokens


def _temper(logits: Tensor, draws: Sequence[Draw], tp: TensorParallel) -> Tensor:
    """[n, c]: (logits - the largest of all ranks) / temperature; as they are for greedy draws.

    From the largest on downwards, a quotient that overflows is a probability of 0."""
    if all(draw.settings.is_greedy for draw in draws):
        return logits
    largest = logits.amax(1)
    if tp.size > 1:
        largest = torch.stack(tp.gather(largest)).amax(0)
    temperatures = [1.0 if draw.settings.is_greedy else min(draw.settings.temperature, _LARGEST) for draw in draws]
    return logits.sub_(largest[:, None]).div_(_column(temperatures, logits))


def _column(values: list[float], like: Tensor) -> Tensor:
    """[n, 1]"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


# Top-k and top-p.


@dataclass(frozen=True)
class _Limits:
    top_k: float
    """inf: all tokens."""
    top_p: float
    """inf: all of the mass."""

    @classmethod
    def of(cls, draw: Draw) -> _Limits:
        if draw.settings.is_greedy:
            return cls(math.inf, math.inf)
        top_k, top_p = draw.settings.top_k, draw.settings.top_p_at(draw.index)
        return cls(float(top_k or math.inf), top_p if 0.0 < top_p < 1.0 else math.inf)

    @property
    def leave_out_some(self) -> bool:
        """Whether not all tokens may be drawn."""
        return self.top_k < math.inf or self.top_p < math.inf


def _largest_kept(
    logits: Tensor, ids: Tensor, draws: Sequence[Draw], tp: TensorParallel, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, any] each: the largest logits of all ranks from the largest on, -inf outside of the top-k largest and then of
    the fewest that reach top-p; and their ids. [n]: whether the `count` largest of each rank decide these.

    logits: [n, c], the largest of all ranks is 0. It always stays. draws: those with limits."""
    count = min(count, len(ids))
    limits = [_Limits.of(draw) for draw in draws]
    keys = ordered_keys(logits, ids).topk(count).values
    mass = None
    if any(limit.top_p < math.inf for limit in limits):
        # In fp64, since the order in which ranks and kernels add must not decide what is kept.
        mass = logits.clamp(min=_SMALLEST_LOG).exp_().sum(1, keepdim=True, dtype=torch.float64)
    if tp.size > 1:
        keys, mass = _of_all_ranks(keys, mass, tp)
        if count < len(ids):
            keys = keys[:, :count]  # the others may be smaller than some that were not sent
    values, candidates = values_and_ids(keys)
    has_top_k = any(limit.top_k < math.inf for limit in limits)
    if has_top_k:
        top_k = _column([limit.top_k for limit in limits], values)
        within_top_k = torch.arange(keys.size(1), device=keys.device) < top_k
    if mass is None:
        return values.masked_fill_(within_top_k.logical_not_(), -torch.inf), candidates, top_k[:, 0] <= count
    weights = values.clamp(min=_SMALLEST_LOG).exp_().double()
    if has_top_k:
        weights *= within_top_k
    sums = weights.cumsum(1)
    if has_top_k:
        mass = torch.where(top_k.isinf(), mass, sums[:, -1:])
    needed = _column([limit.top_p for limit in limits], mass) * mass
    is_settled = sums[:, -1:] >= needed
    is_kept = sums.sub_(weights) < needed  # what comes before it does not reach top-p
    if has_top_k:
        is_settled = (top_k <= count) | top_k.isinf() & is_settled
        is_kept.logical_and_(within_top_k)
    is_kept[:, 0] = True
    return values.masked_fill_(is_kept.logical_not_(), -torch.inf), candidates, is_settled[:, 0]


def _of_all_ranks(keys: Tensor, mass: Tensor | None, tp: TensorParallel) -> tuple[Tensor, Tensor | None]:
    """Keys of all ranks from the largest on, and the sum of their masses."""
    local = keys if mass is None else torch.cat([keys, mass.view(torch.int64)], 1)
    ranks = torch.stack(tp.gather(local), 1)  # [n, tp, count or count + 1]
    if mass is not None:
        mass = ranks[:, :, -1].contiguous().view(torch.float64).sum(1, keepdim=True)
        ranks = ranks[:, :, :-1]
    return ranks.flatten(1).sort(descending=True).values, mass


def ordered_keys(values: Tensor, ids: Tensor) -> Tensor:
    """[n, c] int64 that are ordered as the values and, of equal values, from the largest id to the smallest.

    values: [n, c] fp32; ids: [c], below 2^32. No two keys of a row are equal, so that whoever sorts keeps the same."""
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)  # negative floats are ordered backwards
    keys <<= 32
    keys -= ids
    return keys


def values_and_ids(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `ordered_keys` took: fp32 and int64, in the shape of the keys."""
    ids = -keys & 0xFFFFFFFF
    bits = ((keys + ids) >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), ids


# Noise.

Bits = TypeVar("Bits", Tensor, np.ndarray)

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), constants as int64.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, None))


def noise_of(settings: SamplingSettings, index: int, ids: Tensor) -> Tensor:
    """[c] fp32: what is added to the tempered logits of `ids` where the answer's token `index` is drawn."""
    return _gumbel(_stream_starts([Draw(0, settings, index, (), 0)]), ids)[0]


def _add_noise(logits: Tensor, ids: Tensor, draws: Sequence[Draw]) -> None:
    """Add Gumbel noise to the rows of draws that are not greedy, in place. ids: [c] or [n, c]"""
    rows = [row for row, draw in enumerate(draws) if not draw.settings.is_greedy]
    if not rows:
        return
    starts = _stream_starts([draws[row] for row in rows]).to(logits.device)
    # A GPU is fastest with few launches.
    step = max(_CACHED // logits.size(1), 1) if logits.device.type == "cpu" else len(rows)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        chosen = part if len(rows) == len(draws) else rows[part]
        logits[chosen] += _gumbel(starts[part], ids if ids.dim() == 1 else ids[chosen])


def _stream_starts(draws: Sequence[Draw]) -> Tensor:
    """[n] on the CPU: the start of each draw's random numbers, from its seed and index."""
    seeds, indices = np.array([[draw.settings.seed, draw.index] for draw in draws]).T  # faster than tensors
    return torch.from_numpy(_random_bits(_random_bits(np.zeros_like(seeds), seeds), indices))


def _gumbel(starts: Tensor, ids: Tensor) -> Tensor:
    """[n, c] fp32, for each start and id a number of its own."""
    bits = _random_bits(starts[:, None], ids)
    bits &= 2**63 - 1
    # Between 2^-64 and 1 - 2^-24, the precision of fp32 being best at the small end: there, noise is largest.
    uniform = bits.float().mul_(2.0**-63).add_(2.0**-64).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _random_bits(starts: Bits, numbers: Bits) -> Bits:
    """int64: of the random numbers that begin at `starts`, those with these numbers. Products are modulo 2^64."""
    state: Bits = (numbers + 1) * _STEP + starts
    for shift, factor in _SHIFTS_AND_FACTORS:
        high = state >> shift
        high &= 2 ** (64 - shift) - 1  # zeros come in, not the sign
        state ^= high
        if factor is not None:
            state *= factor
    return state
