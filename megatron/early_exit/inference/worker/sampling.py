"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, and noise from a hash.

A token is the argmax of logits plus Gumbel noise, which draws from softmax(logits) (Gumbel 1954; Maddison et al.,
arXiv:1411.0030). The noise of an id depends on the seed, the number of the token in the answer and the id alone. So there
is no generator whose state must travel; a tensor-parallel rank makes the noise of its own ids; and two heads that draw the
same token of an answer share their noise, so that a drafted token is often the one that the final head draws
(Daliri et al., arXiv:2408.07978).

Shapes: n = draws, c = columns, the ids whose logits this rank has. Ids of columns ascend, over the ranks as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

# Most distributions reach top-p within this many tokens; sorting a whole vocabulary costs more than a small model.
_SORTED_FIRST = 512

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


def draw_tokens(logits: Tensor, ids: Tensor, draws: Sequence[Draw], tp: TensorParallel) -> list[tuple[int, float]]:
    """(token, its logit) of each draw, equal on all ranks. Of equal scores the smallest id wins.

    logits: [n, c] fp32 as the head gave them, finite or -inf (never drawn); ids: [c]"""
    scores = _temper(_penalise(logits, ids, draws), draws, tp)
    _restrict(scores, ids, draws, tp)
    _add_noise(scores, ids, draws)
    best, column = scores.max(1)
    raw = logits.gather(1, column[:, None])[:, 0]
    local = torch.stack([best.double(), raw.double(), ids[column].double()], 1)
    ranks = torch.stack(tp.gather(local)).tolist()
    winners = [max(numbers, key=lambda one: one[0]) for numbers in zip(*ranks, strict=True)]  # the first of equals
    return [(int(token), logit) for _, logit, token in winners]


def _penalise(logits: Tensor, ids: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[n, c]: tokens of the answer, and for the repetition penalty also of the prompt, made less probable.

    Sources: CTRL, arXiv:1909.05858, as in transformers; OpenAI's API for frequency and presence."""
    if not any(draw.settings.has_penalty for draw in draws):
        return logits
    histories = [draw.history if draw.settings.has_penalty else () for draw in draws]
    seen = _count_tokens(histories, ids)
    generated = _count_tokens([all_[draw.num_prompt_tokens :] for all_, draw in zip(histories, draws)], ids)
    # As fp32 has it: 0 * inf is no number.
    repetition = _column([min(draw.settings.repetition_penalty, _LARGEST) for draw in draws], logits)
    changed = torch.where(logits > 0, logits / repetition, logits * repetition).clamp_(-_LARGEST, _LARGEST)
    penalised = torch.where((seen > 0) & ~logits.isneginf(), changed, logits)
    penalised -= _column([draw.settings.frequency_penalty for draw in draws], logits) * generated
    return penalised - _column([draw.settings.presence_penalty for draw in draws], logits) * (generated > 0)


def _count_tokens(histories: Sequence[Sequence[int]], ids: Tensor) -> Tensor:
    """[n, c] fp32: how often each column's id occurs in each history."""
    tokens = torch.tensor(list(itertools.chain.from_iterable(histories)), dtype=torch.int64)
    rows = torch.arange(len(histories)).repeat_interleave(torch.tensor([len(history) for history in histories]))
    tokens, rows = tokens.to(ids.device), rows.to(ids.device)
    columns, is_here = columns_of(tokens, ids)
    counts = torch.zeros(len(histories), len(ids), device=ids.device)
    return counts.index_put_((rows, columns), is_here.float(), accumulate=True)


def columns_of(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(column of each token, whether this rank has it: if not, the column is any)"""
    columns = torch.searchsorted(ids, tokens).clamp_(max=len(ids) - 1)
    return columns, ids[columns] == tokens


def _temper(logits: Tensor, draws: Sequence[Draw], tp: TensorParallel) -> Tensor:
    """[n, c]: (logits - the largest of all ranks) / temperature; greedy draws at temperature 1.

    From the largest on downwards, a quotient that overflows is a probability of 0."""
    largest = torch.stack(tp.gather(logits.amax(1))).amax(0)
    temperatures = [1.0 if draw.settings.is_greedy else min(draw.settings.temperature, _LARGEST) for draw in draws]
    return (logits - largest[:, None]).div_(_column(temperatures, logits))


def _column(values: list[float], like: Tensor) -> Tensor:
    """[n, 1]"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


# What top-k, top-p and min-p leave.


def _restrict(logits: Tensor, ids: Tensor, draws: Sequence[Draw], tp: TensorParallel) -> None:
    """Write -inf to what is outside of the top-k largest, then of the fewest that reach top-p, then below min-p.

    logits: [n, c], the largest of all ranks is 0. It always stays."""
    min_p = [0.0 if draw.settings.is_greedy else draw.settings.min_p for draw in draws]
    limits = [_Limits.of(draw) for draw in draws]
    rows = [row for row, limit in enumerate(limits) if limit is not None]
    if rows:
        chosen = logits[rows]
        keys = ordered_keys(chosen, ids)
        cutoffs = _cutoffs(chosen, keys, [limits[row] for row in rows], tp)
        logits[rows] = chosen.masked_fill_(keys < cutoffs[:, None], -torch.inf)
    if any(min_p):
        smallest = _column([math.log(p) if p else -math.inf for p in min_p], logits)
        logits.masked_fill_(logits < smallest, -torch.inf)


@dataclass(frozen=True)
class _Limits:
    top_k: float
    """inf: all tokens."""
    top_p: float
    """inf: all of the mass."""

    @staticmethod
    def of(draw: Draw) -> _Limits | None:
        """None if all tokens may be drawn."""
        top_k, top_p = draw.settings.top_k, draw.settings.top_p_at(draw.index)
        if draw.settings.is_greedy or not (top_k or 0.0 < top_p < 1.0):
            return None
        return _Limits(float(top_k or math.inf), top_p if 0.0 < top_p < 1.0 else math.inf)


def _cutoffs(logits: Tensor, keys: Tensor, limits: list[_Limits], tp: TensorParallel) -> Tensor:
    """[n]: the smallest key that top-k and top-p keep in each row. keys: [n, c] of `logits`."""
    sums = logits.clamp(min=_SMALLEST_LOG).exp_().sum(1, dtype=torch.float64)
    cutoffs, is_settled = _cutoffs_among(keys, sums, limits, tp, _SORTED_FIRST)
    if all(limit.top_k <= _SORTED_FIRST for limit in limits):
        return cutoffs  # without a look at the device
    left = [row for row, settled in enumerate(is_settled.tolist()) if not settled]
    if left:
        cutoffs[left], _ = _cutoffs_among(keys[left], sums[left], [limits[row] for row in left], tp, keys.size(1))
    return cutoffs


def _cutoffs_among(
    keys: Tensor, sums: Tensor, limits: list[_Limits], tp: TensorParallel, count: int
) -> tuple[Tensor, Tensor]:
    """As `_cutoffs`, from the `count` largest keys of each rank; and [n], whether these were enough.

    sums: [n] fp64, of exp(logits) over this rank's columns."""
    count = min(count, keys.size(1))
    is_all = count == keys.size(1)
    local = torch.cat([keys.topk(count).values, sums.view(torch.int64)[:, None]], 1)
    ranks = torch.stack(tp.gather(local), 1)  # [n, tp, count + 1]
    largest = ranks[:, :, :-1].flatten(1).sort(descending=True).values
    if not is_all:
        largest = largest[:, :count]  # the others may be smaller than some that were not sent
    # In fp64, since the order in which ranks and kernels add must not decide what is kept.
    mass = ranks[:, :, -1].contiguous().view(torch.float64).sum(1)
    weights = values_of(largest).clamp_(min=_SMALLEST_LOG).exp_().double()
    numbers = [[limit.top_k, limit.top_p] for limit in limits]
    top_k, top_p = torch.tensor(numbers, dtype=torch.float64, device=keys.device).t()
    is_kept = torch.arange(largest.size(1), device=keys.device) < top_k[:, None]
    weights = weights * is_kept
    sums = weights.cumsum(1)
    mass = torch.where(top_k.isinf(), mass, sums[:, -1])
    is_kept &= sums - weights < (top_p * mass)[:, None]  # what comes before it does not reach top-p
    cutoffs = largest.gather(1, is_kept.sum(1, keepdim=True).clamp_(min=1) - 1)[:, 0]
    if is_all:
        return cutoffs, torch.ones_like(top_k, dtype=torch.bool)
    return cutoffs, (top_k <= count) | top_k.isinf() & (sums[:, -1] >= top_p * mass)


def ordered_keys(values: Tensor, ids: Tensor) -> Tensor:
    """[n, c] int64 that are ordered as the values and, of equal values, from the largest id to the smallest.

    values: [n, c] fp32; ids: [c], below 2^32. No two keys of a row are equal, so that whoever sorts keeps the same."""
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)  # negative floats are ordered backwards
    keys <<= 32
    return keys.add_(0xFFFFFFFF - ids)


def values_of(keys: Tensor) -> Tensor:
    """The fp32 values that `ordered_keys` took."""
    bits = (keys >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def ids_of(keys: Tensor) -> Tensor:
    """The ids that `ordered_keys` took."""
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


# Noise.

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), constants as int64.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, None))


def _add_noise(scores: Tensor, ids: Tensor, draws: Sequence[Draw]) -> None:
    """Add Gumbel noise to the rows of draws that are not greedy. scores: [n, c]"""
    rows = [row for row, draw in enumerate(draws) if not draw.settings.is_greedy]
    # A CPU is fastest with what fits into its caches, a GPU with few launches.
    step = 1 if scores.device.type == "cpu" else max(len(rows), 1)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        starts = _stream_starts([draws[row] for row in part]).to(scores.device)
        scores[part] += _gumbel(starts, ids)


def _stream_starts(draws: Sequence[Draw]) -> Tensor:
    """[n] on the CPU: the start of each draw's random numbers, from its seed and index."""
    seeds, indices = torch.tensor([[draw.settings.seed, draw.index] for draw in draws]).t()
    return _random_bits(_random_bits(torch.zeros_like(seeds), seeds), indices)


def _gumbel(starts: Tensor, ids: Tensor) -> Tensor:
    """[n, c] fp32, for each start and id a number of its own."""
    bits = _random_bits(starts[:, None], ids)
    bits &= 2**63 - 1
    # Between 2^-64 and 1 - 2^-24, the precision of fp32 being best at the small end: there, noise is largest.
    uniform = bits.float().mul_(2.0**-63).add_(2.0**-64).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _random_bits(starts: Tensor, numbers: Tensor) -> Tensor:
    """int64: of the random numbers that begin at `starts`, those with these numbers. Products are modulo 2^64."""
    state = (numbers + 1) * _STEP + starts
    high = torch.empty_like(state)
    for shift, factor in _SHIFTS_AND_FACTORS:
        torch.bitwise_right_shift(state, shift, out=high)
        high &= 2 ** (64 - shift) - 1  # zeros come in, not the sign
        state ^= high
        if factor is not None:
            state *= factor
    return state


# Until the engine draws through `HeadOutput.draw`.


class Sampler:
    """Draws the tokens of one request. All tensor-parallel ranks draw the same ones from the same logits."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        # On the CPU on every machine: a generator of the GPU would give other tokens for the same seed.
        self.generator = torch.Generator().manual_seed(settings.seed)

    def probabilities(self, logits: Tensor, history: Sequence[int], index: int) -> Tensor:
        """[vocabulary]: the distribution that the answer's token number `index` is drawn from, one-hot when greedy.

        logits: [vocabulary] fp32, -inf where a token must not be drawn; history: prompt and answer so far."""
        settings = self.settings
        logits = penalised(logits, history, settings.repetition_penalty)
        if settings.is_greedy:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        # From the largest on downwards, a quotient that overflows is a probability of 0.
        logits = (logits - logits.max()) / settings.temperature
        return restrict(logits, settings.top_k, settings.top_p_at(index)).softmax(-1)

    def draw(self, probabilities: Tensor) -> int:
        """A token from [vocabulary] weights, which need not add up to 1."""
        if self.settings.is_greedy:
            return int(probabilities.argmax())
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def sample(self, logits: Tensor, history: Sequence[int] = (), index: int = 0) -> int:
        """Draw one token; arguments as in `probabilities`."""
        return self.draw(self.probabilities(logits, history, index))

    def uniform(self) -> float:
        """A number between 0 and 1."""
        return torch.rand((), generator=self.generator).item()


def penalised(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """`logits` with tokens in `history` made less probable (CTRL, arXiv:1909.05858, as in transformers)."""
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)))
    values, largest = logits[seen], torch.finfo(logits.dtype).max
    changed = torch.where(values > 0, values / penalty, values * penalty).clamp(-largest, largest)
    return logits.index_copy(0, seen, torch.where(values.isinf(), values, changed))


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`logits` with -inf outside of the `top_k` largest, and then outside of the fewest that reach `top_p`.

    logits: [vocabulary]; 0 switches either off. At least one token stays."""
    if not top_k and not 0.0 < top_p < 1.0:
        return logits
    if top_k:
        values, ids = _largest(logits, min(top_k, logits.numel()))
        log_sum_exp = values.logsumexp(-1)
    else:
        log_sum_exp = logits.logsumexp(-1)
        values, ids = _largest(logits, min(_SORTED_FIRST, logits.numel()))
        if (values - log_sum_exp).exp().sum() < top_p:
            values, ids = _largest(logits, logits.numel())
    if 0.0 < top_p < 1.0:
        probs = (values - log_sum_exp).exp()
        is_needed = probs.cumsum(-1) - probs < top_p  # what comes before it does not reach top_p
        is_needed[0] = True
        values, ids = values[is_needed], ids[is_needed]
    return torch.full_like(logits, -torch.inf).scatter(0, ids, values)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest and their ids, in order; of equals the one with the smaller id comes first."""
    if count == logits.numel():
        return logits.sort(descending=True, stable=True)
    values, ids = logits.topk(count)
    # topk breaks ties as it likes: take all that are larger than the last, and of its equals those that come first.
    larger = ids[values > values[-1]]
    equal = (logits == values[-1]).nonzero()[: count - larger.numel(), 0]
    ids = torch.cat([larger, equal])
    values, order = logits[ids].sort(descending=True, stable=True)
    return values, ids[order]
