"""The draw of the tokens that exits learn from: how many, which, and what each of them counts."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy import stats

from megatron.early_exit.model.token_sampling import draw_tokens
from megatron.early_exit.training.summary import flops_per_token
from tests.configs import make_config
from tests.reference import drawn_token_weights


def microbatch(b: int = 3, s: int = 8, masked: float = 0.4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, loss mask), [b, s]; labels of what is masked are -100."""
    generator = torch.Generator().manual_seed(seed)
    labels, mask = torch.randint(0, 50, (b, s), generator=generator), torch.rand(b, s, generator=generator) >= masked
    return torch.where(mask, labels, -100), mask.float()


@pytest.mark.parametrize("fraction", [0.01, 0.25, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("masked", [0.0, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("key", [(1234, 0, 0), (0, 7, 1), (2**32 - 1, 10**9, 12)])
def test_the_draw_is_what_it_is_defined_as(fraction: float, masked: float, key: tuple[int, int, int]) -> None:
    """Integers of Python find the same tokens, with the same weights; these add up to the number of all."""
    labels, mask = microbatch(masked=masked)
    drawn = draw_tokens(labels, mask, fraction, key)
    weights = torch.zeros(24)
    weights[drawn.rows] = drawn.loss_mask * drawn.weight
    assert torch.equal(weights.view(8, 3).t(), drawn_token_weights(labels, mask, fraction, key))
    assert weights.sum() == pytest.approx(mask.sum().item(), rel=1e-6)
    assert torch.equal(drawn.labels, labels.t().flatten()[drawn.rows])
    assert (drawn.rows.diff() > 0).all() and drawn.rows.numel() == max(1, round(24 * fraction))


def test_numbers_of_tokens() -> None:
    """max(1, round(fraction * n)) with rounding to even, from 1 token on; nothing of no tokens."""
    for n in range(25):
        mask = (torch.arange(24) < n).float().view(1, 24)
        drawn = draw_tokens(torch.arange(24).view(1, 24), mask, 0.5, (1, 0, 0))
        assert drawn.loss_mask.sum() == (max(1, round(n / 2)) if n else 0)
        assert torch.isfinite(drawn.weight) and drawn.weight > 0


def test_values_of_the_loss_mask_are_kept() -> None:
    mask = torch.tensor([[0.5, 2.0, 0.0, 0.25]])
    drawn = draw_tokens(torch.arange(4).view(1, 4), mask, 0.99, (1, 0, 0))
    assert drawn.loss_mask.tolist() == [0.5, 2.0, 0.0, 0.25] and drawn.weight == 1


def test_draws_depend_on_seed_iteration_exit_and_labels() -> None:
    labels, mask = microbatch(b=4, s=64, masked=0.0)
    rows = lambda labels, *key: tuple(draw_tokens(labels, mask, 0.25, key).rows.tolist())
    other = labels.clone()
    other[0, 0] += 1
    draws = [rows(labels, *key) for key in itertools.product((1, 2), (3, 4), (0, 1))] + [rows(other, 1, 3, 0)]
    assert len(set(draws)) == 9
    assert rows(labels, 1, 3, 0) == draws[0]
    # Neighbours in a batch that exchange their labels exchange nothing else.
    assert rows(labels.flip(0), 1, 3, 0) != draws[0]


def test_every_set_of_tokens_is_as_probable_as_any_other() -> None:
    """3 of 6 tokens: 20 sets, drawn 2,000 times; so many tokens of one label differ by their places alone."""
    labels, mask = torch.full((2, 4), 5), torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 1]])
    counts = Counter()
    for iteration in range(2000):
        drawn = draw_tokens(labels, mask, 0.5, (1234, iteration, 0))
        counts[tuple(drawn.rows[drawn.loss_mask > 0].tolist())] += 1
    assert len(counts) == 20 and stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_draws_of_two_exits_are_independent() -> None:
    """Of 32 tokens each draws 8: they share 2 on average, as the hypergeometric distribution says."""
    shared = Counter()
    for iteration in range(600):
        labels, mask = microbatch(b=4, s=8, masked=0.0, seed=iteration)
        one, two = (set(draw_tokens(labels, mask, 0.25, (1, 0, exit)).rows.tolist()) for exit in (0, 1))
        shared[min(len(one & two), 5)] += 1
    law = stats.hypergeom(32, 8, 8)
    expected = [600 * law.pmf(k) for k in range(5)] + [600 * law.sf(4)]
    assert stats.chisquare([shared[k] for k in range(6)], expected).pvalue > 1e-3


def test_what_exits_follow_is_counted_for_the_tokens_that_they_learn_from() -> None:
    settings = {"tune_exit": True, "use_exit_norm": True, "exit_layer_nums": (1, 4)}  # all layers are built
    counted = lambda **changes: flops_per_token(make_config(**settings, **changes), 1000)
    projection = 6 * make_config().model.hidden_size * 1000
    whole = counted(tune_exit_distillation=1.0) - counted()
    assert whole == pytest.approx(2 * projection / 3)
    fraction = {"exit_loss_token_fraction": (0.25, 0.5)}
    part = counted(tune_exit_distillation=1.0, **fraction) - counted(**fraction)
    assert part == pytest.approx(0.75 * projection / 3)
