"""The acceptance rule and the length of drafts, by numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.draft_length import Draft, DraftLength, verify
from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker.sampling import Sampler

P = torch.tensor([0.5, 0.2, 0.3, 0.0])
Q = torch.tensor([0.1, 0.6, 0.2, 0.1])
SAME = (1.0,) * len(ROW_COUNTS)
COSTS = StepCosts(SAME, SAME, SAME, SAME)


def test_rejection_sampling_gives_the_full_models_distribution() -> None:
    sampler, counts, accepted, draws = Sampler(SamplingSettings(1.0)), torch.zeros(4), 0, 20000
    for _ in range(draws):
        draft = Draft(int(torch.multinomial(Q, 1, generator=sampler.generator)), Q)
        is_accepted, token = verify(draft, P, sampler)
        counts[token] += 1
        accepted += is_accepted
    assert torch.allclose(counts / draws, P, atol=0.015)  # four standard deviations
    # The share that is accepted is what p and q have in common.
    assert accepted / draws == pytest.approx(torch.minimum(P, Q).sum().item(), abs=0.015)


def test_a_token_that_the_full_model_never_draws_is_never_accepted() -> None:
    sampler = Sampler(SamplingSettings(1.0))
    assert not any(verify(Draft(3, Q), P, sampler)[0] for _ in range(200))


def test_equal_distributions_accept_everything() -> None:
    sampler = Sampler(SamplingSettings(1.0))
    assert all(verify(Draft(token, P), P, sampler) == (True, token) for token in (0, 1, 2) * 30)


def test_greedy_drafts_are_accepted_where_they_are_the_best() -> None:
    sampler = Sampler(SamplingSettings())
    assert verify(Draft(0, None), P, sampler) == (True, 0)
    assert verify(Draft(2, None), P, sampler) == (False, 0)


def length(costs: StepCosts = COSTS, fixed: int | None = None) -> DraftLength:
    return DraftLength(fixed, longest=10, exit_depth=2, num_layers=12, costs=costs)


def test_a_fixed_length_stays() -> None:
    one = length(fixed=3)
    one.observe(3, 0)
    assert one.next() == 3


def test_drafts_grow_with_acceptance_and_vanish_without() -> None:
    good, bad = length(), length()
    for _ in range(30):
        good.observe(4, 4)
        bad.observe(4, 0)
    assert good.acceptance > 0.9 > 0.2 > bad.acceptance
    assert good.next() >= 5
    assert bad.next() == 0


def test_the_length_promises_most_tokens_in_a_second() -> None:
    # At the first estimate, 0.7: k drafts give (1 - 0.7^(k+1)) / 0.3 tokens and cost 2 (k + 1) + k + 10 + 1.
    rates = [sum(0.7**i for i in range(k + 1)) / (2 * (k + 1) + k + 11) for k in range(11)]
    assert length().next() == rates.index(max(rates)) == 2


def test_costly_rows_and_batches_shorten_drafts() -> None:
    rising = tuple(float(rows) for rows in ROW_COUNTS)
    assert length(replace(COSTS, layer_seconds=rising)).next() == 0
    assert length(replace(COSTS, batch_seconds=30.0)).next() == 0


def test_drafts_that_pay_for_one_request_may_not_pay_for_many() -> None:
    one = length(replace(COSTS, layer_seconds=(1.0, 1.0, 1.0, 4.0, 8.0)))
    assert one.next(1) > 0
    assert one.next(8) == 0


def test_drafting_is_tried_again_after_a_while() -> None:
    one = length()
    for _ in range(30):
        one.observe(4, 0)
    tries = 0
    while one.next() == 0:
        tries += 1
        assert tries < 1000
    assert tries > 10
