"""Sampling against probabilities worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker.sampling import Sampler, penalised, restrict

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = PROBS.log()


def frequencies(logits, draws=4000, **settings):
    sampler = Sampler(SamplingSettings(**settings))
    counts = torch.zeros(logits.numel())
    for _ in range(draws):
        counts[sampler.sample(logits)] += 1
    return counts / draws


@pytest.mark.parametrize("settings", [{}, {"temperature": 5.0, "top_k": 1}, {"temperature": 1e-3}])
def test_greedy(settings):
    assert frequencies(LOGITS, draws=20, **settings)[1] == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        # at temperature 0.5 probabilities are squared: 0.01, 0.16, 0.0025, 0.0625, 0.04 of 0.275
        ({"temperature": 0.5}, [0.0364, 0.5818, 0.0091, 0.2273, 0.1455]),
        ({"temperature": 1.0, "top_k": 2}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        # 0.4 + 0.25 = 0.65 does not reach 0.7; with 0.2 it does
        ({"temperature": 1.0, "top_p": 0.7}, [0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85]),
        # of the three largest (0.85), 0.4 and 0.25 are 0.76 of the mass
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        ({"temperature": 1.0, "top_p": 0.01}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ],
)
def test_frequencies(settings, expected):
    seen = frequencies(LOGITS, **settings)
    expected = torch.tensor(expected)
    assert torch.equal(seen == 0, expected == 0)
    assert torch.allclose(seen, expected, atol=0.03)  # four standard deviations of 4000 draws


def test_padding_is_never_drawn():
    logits = torch.cat([LOGITS, torch.full((3,), -torch.inf)])
    assert frequencies(logits, draws=500, temperature=100.0)[5:].sum() == 0
    assert frequencies(logits, draws=500, temperature=100.0, top_k=7)[5:].sum() == 0


def test_top_k_keeps_k_of_equal_tokens():
    assert torch.isfinite(restrict(torch.zeros(6), 2, 0.0)).sum() == 2


def test_top_p_decays_to_its_bound():
    settings = SamplingSettings(1.0, top_p=0.9, top_p_decay=0.5, top_p_bound=0.3)
    assert [settings.top_p_at(i) for i in range(4)] == pytest.approx([0.9, 0.45, 0.3, 0.3])
    assert SamplingSettings(1.0, top_p=0.9).top_p_at(50) == 0.9
    # 0.9 leaves out the least probable token; 0.45 keeps the two most probable (0.4 is not enough), 0.3 one
    probabilities = [Sampler(settings).probabilities(LOGITS, [], i) for i in range(3)]
    assert [(p > 0).sum().item() for p in probabilities] == [4, 2, 1]


def test_repetition_penalty():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0])
    seen = penalised(logits, [0, 1, 0], 2.0)
    assert seen.tolist() == [1.0, -2.0, 0.5, 1.0]
    assert logits.tolist() == [2.0, -1.0, 0.5, 1.0]
    assert Sampler(SamplingSettings(repetition_penalty=4.0)).sample(logits, [0]) == 3


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_large_vocabularies(top_p, scale):
    """Against sorting everything; with nearly equal probabilities the first tokens do not reach top-p."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * scale
    probs, ids = logits.softmax(-1).sort(descending=True, stable=True)
    expected = set(ids[: int((probs.cumsum(0) - probs < top_p).sum())].tolist())
    kept = set(restrict(logits, 0, top_p).isfinite().nonzero()[:, 0].tolist())
    assert len(kept ^ expected) <= max(1, len(expected) // 1000)  # sums round differently


def draw(seed):
    sampler = Sampler(SamplingSettings(1.0, seed=seed))
    return [sampler.sample(torch.zeros(1000)) for _ in range(20)]


def test_same_seed_same_tokens_and_another_seed_others():
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(2**24) != draw(2**24 + 1)


def test_requests_do_not_share_random_numbers():
    alone, first, second = (Sampler(SamplingSettings(1.0)) for _ in range(3))
    expected = [alone.sample(torch.zeros(50)) for _ in range(5)]
    both = [(first.sample(torch.zeros(50)), second.sample(torch.zeros(50))) for _ in range(5)]
    assert both == [(token, token) for token in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"top_k": 5}, "no effect at temperature 0"),
        ({"top_p": 0.9}, "no effect at temperature 0"),
        ({"temperature": 1.0, "top_p": 0.9, "top_p_decay": 1.5}, "top_p_decay"),
        ({"temperature": 1.0, "top_p_decay": 0.5}, "no effect without top_p"),
        ({"temperature": 1.0, "top_p": 0.5, "top_p_decay": 0.5, "top_p_bound": 0.6}, "top_p_bound"),
        ({"temperature": 1.0, "top_p": 0.5, "top_p_bound": 0.4}, "no effect without top_p_decay"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**settings)
