"""Draws the tokens of a microbatch that an exit learns from, with `--exit-loss-token-fraction` below 1.

Of n unmasked tokens exactly n' = max(1, round(fraction * n)) are drawn without replacement, and each counts n / n'
times: the expectation of the gradient is the gradient over all of them, whatever else the tokens are weighted with.

A draw is a function of its key (seed, iteration, exit) and of the labels alone. No generator is advanced, so all
tensor-parallel ranks, any schedule, a recomputed layer and a resumed run draw the same tokens. Keys and labels are
mixed by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) in integers, which are the same on every device; nothing waits for
one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.config.exits import num_sampled_tokens


class SampledTokens(NamedTuple):
    """Some tokens of one microbatch, t of its s * b.

    t is the n' of a microbatch without masked tokens, so that shapes depend on no data; what is beyond n' is masked."""

    rows: Tensor
    """[t]: where they stand in hidden states [s, b, h] whose first two dimensions are one; ascending."""

    labels: Tensor
    """[t]"""

    loss_mask: Tensor
    """[t]"""

    weight: Tensor
    """Scalar: n / n', what each of them counts in the sum over all."""

    def rows_of(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] -> [t, h]"""
        return hidden_states.flatten(0, 1).index_select(0, self.rows)


def draw_tokens(labels: Tensor, loss_mask: Tensor, fraction: float, key: tuple[int, int, int]) -> SampledTokens:
    """The tokens of one microbatch for one exit. labels, loss_mask: [b, s]; key: (seed, iteration, exit)."""
    labels, loss_mask = labels.t().reshape(-1), loss_mask.t().reshape(-1).float()
    is_counted = loss_mask != 0
    orders = torch.where(is_counted, _random_numbers(labels, key), torch.iinfo(torch.int64).max)
    ranks = orders.sort(stable=True).indices
    num_counted = is_counted.sum()
    # In fp64, as Python rounds.
    num_drawn = (num_counted.double() * fraction).round().clamp(min=1)
    num_rows = num_sampled_tokens(fraction, labels.numel())
    rows, places = ranks[:num_rows].sort()
    is_drawn = places < num_drawn
    # At least 1: with no unmasked token the mask is all zeros, and 0 could not be divided by.
    weight = (num_counted.clamp(min=1) / num_drawn).float()
    return SampledTokens(rows, labels[rows], loss_mask[rows] * is_drawn, weight)


_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""Constants of SplitMix64, as signed integers."""


def _random_numbers(labels: Tensor, key: tuple[int, int, int]) -> Tensor:
    """[t] random integers of 63 bits, one for each of labels [t]."""
    positions = torch.arange(1, labels.numel() + 1, device=labels.device)
    state = _mix(_mix(positions) + labels).sum()
    for number in key:
        state = _mix(state + number)
    return _shift_right(_mix(state + positions * _INCREMENT), 1)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's bijection of integers modulo 2 ** 64."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        value = (value ^ _shift_right(value, shift)) * factor
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of signed integers, with zeros from the left."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
