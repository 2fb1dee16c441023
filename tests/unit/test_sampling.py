"""Tokens that a head draws, against probabilities worked out by hand or in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker import sampling
from megatron.early_exit.inference.worker.head_output import HeadOutput, ShortlistColumns
from megatron.early_exit.inference.worker.sampling import Draw
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = PROBS.log()


def head(logits: torch.Tensor) -> HeadOutput:
    logits = logits[None] if logits.dim() == 1 else logits
    return HeadOutput(logits.clone(), vocab_size=logits.size(1), tp=TensorParallel())


def draw(
    logits: torch.Tensor,
    indices: Sequence[int] = (0,),
    history: Sequence[int] = (),
    num_prompt_tokens: int = 0,
    batch: int = 500,
    excluded: Sequence[int] = (),
    **settings: object,
) -> list[int]:
    """One token for each index, from [vocabulary] logits."""
    output, chosen, tokens = head(logits), SamplingSettings(**settings), []
    for first in range(0, len(indices), batch):
        of_batch = indices[first : first + batch]
        draws = [Draw(0, chosen, index, history, num_prompt_tokens, excluded) for index in of_batch]
        tokens += [token for token, _ in output.draw(draws)]
    return tokens


def frequencies(logits: torch.Tensor, draws: int = 4000, **settings: object) -> torch.Tensor:
    return torch.bincount(torch.tensor(draw(logits, range(draws), **settings)), minlength=logits.numel()) / draws


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 5.0, "top_k": 1}, {"temperature": 1e-3}, {"temperature": 9e-6}, {"top_k": 3, "top_p": 0.9}],
)
def test_greedy(settings: dict) -> None:
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
        # at least 0.55 * 0.4 = 0.22
        ({"temperature": 1.0, "min_p": 0.55}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        ({"temperature": 1.0, "min_p": 1.0}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        # the three largest, of them at least 0.55 * 0.4
        ({"temperature": 1.0, "top_k": 3, "min_p": 0.55}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        # the two that reach 0.6 of everything, though min-p would leave out one of the others
        ({"temperature": 1.0, "top_p": 0.6, "min_p": 0.3}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
    ],
)
def test_frequencies(settings: dict, expected: list[float]) -> None:
    seen = frequencies(LOGITS, **settings)
    expected = torch.tensor(expected)
    assert torch.equal(seen == 0, expected == 0)
    assert torch.allclose(seen, expected, atol=0.03)  # four standard deviations of 4000 draws


# Against exact probabilities of a large vocabulary.


def distribution(
    logits: torch.Tensor, settings: SamplingSettings, index: int = 0, history: Sequence[int] = (), num_prompt: int = 0
) -> torch.Tensor:
    """[vocabulary] fp64: what a token is drawn from, by sorting everything and plain loops."""
    logits = logits.double().clone()
    for token, bias in settings.logit_bias:
        logits[token] += bias
    for token in set(history):
        old = logits[token]
        logits[token] = old / settings.repetition_penalty if old > 0 else old * settings.repetition_penalty
    for token in set(history[num_prompt:]):
        times = list(history[num_prompt:]).count(token)
        logits[token] -= settings.frequency_penalty * times + settings.presence_penalty
    probs = (logits / settings.temperature).softmax(-1)
    largest = probs.max()
    order = sorted(range(len(probs)), key=lambda token: (-probs[token].item(), token))
    order = order[: settings.top_k or None]
    mass, top_p, kept = sum(probs[token].item() for token in order), settings.top_p_at(index), []
    reached = 0.0
    for token in order:
        if kept and 0.0 < top_p < 1.0 and reached >= top_p * mass:
            break
        reached += probs[token].item()
        kept.append(token)
    kept = [token for token in kept if probs[token] >= settings.min_p * largest]
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the chi-square test. Counts where nothing is expected give 0."""
    assert expected.sum() == pytest.approx(counts.sum().item(), rel=1e-6)
    if counts[expected == 0].any():
        return 0.0
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def in_bins(values: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Tokens that are often drawn have bins of their own, the others share some by their ids."""
    order = probs.argsort(descending=True)
    common, others = order[:60], order[60:]
    shared = torch.zeros(40, dtype=torch.float64).index_add_(0, others % 40, values[others].double())
    return torch.cat([values[common].double(), shared])


# The chance that a good sampler fails is one in a million for each test; a bad one is off by orders of magnitude.
LEVEL = 1e-6
VOCABULARY, DRAWS = 8000, 2000
ZIPF = -1.1 * torch.arange(1.0, VOCABULARY + 1).log()[torch.randperm(VOCABULARY, generator=torch.manual_seed(1))]
BIASES = {int(token): 2.0 - rank for rank, token in enumerate(ZIPF.topk(40).indices[::8])} | {4321: 6.0}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.7}


def fit(**settings: object) -> float:
    """p-value of draws from `ZIPF`."""
    history = ZIPF.topk(30).indices.tolist() * 2
    drawn = draw(ZIPF, range(DRAWS), history, 20, batch=50, **{"temperature": 1.0, **settings})
    exact = distribution(ZIPF, SamplingSettings(**{"temperature": 1.0, **settings}), 0, history, 20)
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY)
    if counts[exact == 0].any():
        return 0.0
    return p_value(in_bins(counts, exact), in_bins(exact * DRAWS, exact))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": -(2**63)},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 400},
        {"top_p": 0.6},
        {"top_p": 0.9},  # not reached by the 512 most probable
        {"top_k": 1000, "top_p": 0.8},
        {"temperature": 1.2, "min_p": 0.001},
        PENALTIES,
        {"logit_bias": BIASES},
        {"temperature": 0.8, "top_k": 700, "top_p": 0.95, "min_p": 0.002, **PENALTIES, "logit_bias": BIASES},
    ],
)
def test_draws_follow_the_exact_distribution(settings: dict) -> None:
    assert fit(**settings) > LEVEL


RANDOM_BITS = sampling._random_bits
BAD_HASHES: dict[str, Callable] = {
    "no mixing": lambda starts, numbers: (numbers + 1) * sampling._STEP + starts,
    "few bits": lambda starts, numbers: RANDOM_BITS(starts, numbers) & -(2**52),
    "equal for two ids": lambda starts, numbers: RANDOM_BITS(starts, numbers // 2),
    "equal for far ids": lambda starts, numbers: RANDOM_BITS(starts, numbers % 2**16),
    "equal for all indices": lambda starts, numbers: RANDOM_BITS(0 * starts, numbers),
}


@pytest.mark.parametrize("name", ["no mixing", "few bits", "equal for two ids", "equal for all indices"])
def test_bad_hashes_do_not_follow_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_random_bits", BAD_HASHES[name])
    assert fit() < LEVEL / 1000


# Independence. A draw is (seed, index, smallest of twelve equally probable ids).

PAIRS: dict[str, Callable[[int], tuple]] = {
    "next index": lambda i: ((7, 2 * i, 0), (7, 2 * i + 1, 0)),
    "next seed": lambda i: ((2 * i, 3, 0), (2 * i + 1, 3, 0)),
    "large seeds": lambda i: ((2**24 + 2 * i, 3, 0), (2**24 + 2 * i + 1, 3, 0)),
    "larger seeds": lambda i: ((2**62 + 2 * i, 3, 0), (2**62 + 2 * i + 1, 3, 0)),
    "negative seeds": lambda i: ((i + 1, 3, 0), (-i - 1, 3, 0)),
    "seed and index": lambda i: ((i, 1, 0), (i + 1, 0, 0)),
    "next ids": lambda i: ((7, i, 0), (7, i, 12)),
    "far ids": lambda i: ((7, i, 0), (7, i, 2**16)),
}


def pairs_fit(name: str, count: int = 3000) -> float:
    """p-value of independence."""
    sides = []
    for side in (0, 1):
        ones = [PAIRS[name](i)[side] for i in range(count)]
        first = ones[0][2]
        ids = torch.arange(first, first + 12)
        output = HeadOutput(
            torch.zeros(1, 12), vocab_size=2**17, tp=TensorParallel(), shortlist=ShortlistColumns(ids, 12)
        )
        draws = [Draw(0, SamplingSettings(1.0, seed=seed), index, (), 0) for seed, index, _ in ones]
        sides.append(torch.tensor([token - first for token, _ in output.draw(draws)]))
    counts = torch.bincount(sides[0] * 12 + sides[1], minlength=144)
    return p_value(counts, torch.full((144,), count / 144))


@pytest.mark.parametrize("name", PAIRS)
def test_draws_are_independent(name: str) -> None:
    assert pairs_fit(name) > LEVEL


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        ("next index", "no mixing"),
        ("next index", "equal for all indices"),
        ("next seed", "no mixing"),
        ("next ids", "no mixing"),
        ("far ids", "equal for far ids"),
    ],
)
def test_bad_hashes_are_not_independent(pair: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_random_bits", BAD_HASHES[name])
    assert pairs_fit(pair) < LEVEL / 1000


def test_seeds_that_are_added_to_indices_or_rounded_are_not_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds_and_indices(draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.tensor([[one.settings.seed, one.index] for one in draws]).t())

    monkeypatch.setattr(sampling, "_stream_starts", lambda draws: RANDOM_BITS(0, sum(seeds_and_indices(draws))))
    assert pairs_fit("seed and index") < LEVEL / 1000
    rounded = lambda draws: RANDOM_BITS(0, seeds_and_indices(draws)[0].float().long())
    monkeypatch.setattr(sampling, "_stream_starts", rounded)
    assert pairs_fit("large seeds") < LEVEL / 1000


def test_the_same_settings_give_the_same_tokens_and_another_seed_others() -> None:
    flat = torch.zeros(1000)
    seeds = (1, 2, 2**24, 2**24 + 1, 2**53, 2**53 + 1, 2**63 - 1, -1, -(2**63), 0)
    drawn = [tuple(draw(flat, range(12), temperature=1.0, seed=seed)) for seed in seeds]
    assert len(set(drawn)) == len(seeds)
    assert drawn == [tuple(draw(flat, range(12), temperature=1.0, seed=seed, batch=5)) for seed in seeds]


# Noise.


def test_random_bits_are_those_of_splitmix64() -> None:
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    bits = sampling._random_bits(torch.tensor(1234567), torch.arange(5))
    assert [one % 2**64 for one in bits.tolist()] == first  # published for this seed


def random_bits_by_hand(start: int, number: int) -> int:
    state = (start + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_numbers_of_a_draw_by_hand() -> None:
    for seed, index in itertools.product((-(2**63), -5, 0, 1234, 2**63 - 1), (0, 1, 70000)):
        (start,) = sampling._stream_starts([Draw(0, SamplingSettings(1.0, seed=seed), index, (), 0)]).tolist()
        assert start % 2**64 == random_bits_by_hand(random_bits_by_hand(0, seed), index)


def test_noise_is_gumbel_far_into_its_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small uniform numbers make large noise: they must not be rounded to multiples of 2^-24."""
    bits = [0, 1, 5, 2**10 + 1, 2**20 + 7, 2**40 - 3, 2**50 + 12345, 2**60, 2**62, 2**63 - 2**42]
    monkeypatch.setattr(sampling, "_random_bits", lambda starts, numbers: torch.tensor([bits + [2**63 - 1, -1]]))
    noise = sampling._gumbel(torch.zeros(1, dtype=torch.int64), torch.arange(12))[0].tolist()
    uniform = [bit * 2.0**-63 + 2.0**-64 for bit in bits]
    assert noise[:10] == pytest.approx([-math.log(-math.log1p(-one)) for one in uniform], rel=1e-5, abs=1e-5)
    assert noise[10] == noise[11] and -3 < noise[10] < -2.7 and noise[0] > 44


# Sets, ties, limits.


def kept(logits: torch.Tensor, **settings: object) -> set[int]:
    """Ids that may be drawn."""
    one = Draw(0, SamplingSettings(**settings), 0, (), 0)
    tempered = sampling._temper(logits[None].clone(), [one], TensorParallel())
    ids = torch.arange(len(logits))
    for count in (sampling._SENT_FIRST, len(ids)):
        values, candidates, settled = sampling._largest_kept(tempered, ids, [one], TensorParallel(), count)
        if settled[0]:
            return set(candidates[0][values[0] > -torch.inf].tolist())
    raise AssertionError("all logits do not decide what is kept")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    "limits",
    [{"top_p": p} for p in (0.05, 0.5, 0.9, 0.9999)] + [{"top_k": k} for k in (2, 37, 512, 513, 4999)]
    + [{"top_k": 40, "top_p": 0.7}, {"top_k": 2000, "top_p": 0.6}],
)  # fmt: skip
def test_top_k_and_top_p_of_large_vocabularies(limits: dict, scale: float, dtype: torch.dtype) -> None:
    """Against sorting everything. Nearly equal probabilities do not reach top-p early; bf16 has many equal ones."""
    logits = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * scale).to(dtype).float()
    exact = distribution(logits, SamplingSettings(1.0, **limits))
    assert kept(logits, temperature=1.0, **limits) == set(exact.nonzero()[:, 0].tolist())


def test_top_k_keeps_the_smallest_of_equal_ids() -> None:
    assert set(draw(torch.zeros(6), range(100), temperature=1.0, top_k=2)) == {0, 1}
    assert kept(torch.zeros(3000), temperature=1.0, top_k=600) == set(range(600))
    assert kept(torch.zeros(3000), temperature=1.0, top_k=9, top_p=0.5) == set(range(5))
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0])  # equal, too
    assert kept(zeros, temperature=1.0, top_k=2) == {0, 1}


def test_the_smallest_of_equal_ids_is_the_most_probable() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])
    output = head(logits)
    assert output.token(0) == 1
    assert [token for token, _ in output.top([0], 5)[0]] == [1, 3, 4, 2, 0]
    assert draw(logits, history=[1], num_prompt_tokens=1, repetition_penalty=1.5) == [3]


def test_keys_are_ordered_as_values_and_then_ids() -> None:
    values = torch.tensor([[-torch.inf, -3e38, -1.0, -2e-38, -0.0, 0.0, 2e-38, 1.0, 3e38, torch.inf, 1.0]])
    ids = torch.tensor([0, 5, 1, 2, 9, 10, 3, 4, 2**31, 2**32 - 1, 3])
    keys = sampling.ordered_keys(values, ids)
    assert keys[0].argsort(descending=True).tolist() == [9, 8, 10, 7, 6, 4, 5, 3, 2, 1, 0]
    back = sampling.values_and_ids(keys)
    assert torch.equal(back[0], values) and torch.equal(back[1][0], ids)


LIMITS = [
    {"temperature": 1e-5}, {"temperature": 1e-38, "top_k": 5}, {"temperature": 5e-324, "top_p": 0.5},
    {"temperature": 1e-5, "top_p": 0.5, "min_p": 1e-30}, {"temperature": 1e-5, "top_k": 3},
    {"temperature": 1e38}, {"temperature": 1e300}, {"temperature": 1e300, "top_p": 0.999, "min_p": 1.0},
    {"repetition_penalty": 1e-38}, {"temperature": 1.0, "repetition_penalty": 1e-300},
    {"temperature": 0.1, "repetition_penalty": 1e38}, {"temperature": 0.1, "repetition_penalty": 1e300},
    {"temperature": 1e-5, "repetition_penalty": 1e300, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 10**30}, {"temperature": 1.0, "top_p": 5e-324},
    {"temperature": 1.0, "top_p": 0.5, "top_p_decay": 1e-300},
]  # fmt: skip


@pytest.mark.parametrize("settings", LIMITS)
def test_numbers_at_their_limits(settings: dict) -> None:
    """Quotients that overflow are no numbers. Ids 3 and 4 have no probability, 5 to 7 are padding."""
    logits = torch.tensor([3e38, 0.0, -3e38, -torch.inf, -torch.inf, 1e30, 0.0, torch.inf])
    for history in ([], [0, 1, 2, 3], [0, 0, 2]):
        output = HeadOutput(logits[None].clone(), vocab_size=5, tp=TensorParallel())
        draws = [Draw(0, SamplingSettings(**settings), index, history, 1) for index in (0, 1, 9999)]
        for token, log_prob in output.draw(draws):
            assert token in (0, 1, 2) and log_prob <= 0.0
            if 0.0 < settings.get("temperature", 0.0) <= 1e-5 and not history:
                assert token == 0


def test_padding_is_never_drawn() -> None:
    padded = torch.cat([LOGITS, torch.full((3,), 50.0)])
    output = HeadOutput(padded[None].clone(), vocab_size=5, tp=TensorParallel())
    for settings in ({"temperature": 100.0}, {"temperature": 100.0, "top_k": 7}, {"temperature": 1e300, "top_p": 0.99}):
        drawn = output.draw([Draw(0, SamplingSettings(**settings), index, (), 0) for index in range(300)])
        assert {token for token, _ in drawn} == set(range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1, **PENALTIES}])
def test_logits_in_half_precision(settings: dict, dtype: torch.dtype) -> None:
    logits = (torch.randn(700, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    history = list(range(50))
    drawn = [draw(x, range(50), history, 9, temperature=1.0, **settings) for x in (logits, logits.float())]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 3


def test_top_p_decays_to_its_bound() -> None:
    settings = SamplingSettings(1.0, top_p=0.9, top_p_decay=0.5, top_p_bound=0.3)
    assert [settings.top_p_at(i) for i in range(4)] == pytest.approx([0.9, 0.45, 0.3, 0.3])
    assert SamplingSettings(1.0, top_p=0.9).top_p_at(50) == 0.9
    # 0.9 leaves out the least probable token; 0.45 keeps the two most probable (0.4 is not enough), 0.3 one
    output, seen = head(LOGITS), []
    for index in range(3):
        draws = [Draw(0, replace(settings, seed=seed), index, (), 0) for seed in range(200)]
        seen.append({token for token, _ in output.draw(draws)})
    assert seen == [{0, 1, 3, 4}, {1, 3}, {1}]


# Penalties.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 2.0}, [1.0, -2.0, 0.5, 0.5]),
        ({"frequency_penalty": 0.5}, [1.0, -1.0, 0.5, 0.5]),  # token 0 twice, token 3 once
        ({"presence_penalty": 0.5}, [1.5, -1.0, 0.5, 0.5]),
        ({"frequency_penalty": -1.0}, [4.0, -1.0, 0.5, 2.0]),
        # 2 / 2 - 2 * 0.5 - 0.25; -1 * 2; 1 / 2 - 0.5 - 0.25
        ({"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}, [-0.25, -2.0, 0.5, -0.25]),
    ],
)
def test_penalties(settings: dict, expected: list[float]) -> None:
    """The prompt holds 1, 1 and 0, the answer 0, 3, 0."""
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0]])
    one = Draw(0, SamplingSettings(**settings), 3, [1, 1, 0, 0, 3, 0], 3)
    sampling._penalise(logits, torch.arange(4), [one])
    assert logits.tolist() == [expected]


def test_penalties_change_what_is_drawn_and_not_the_log_probability() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0])
    output = head(logits)
    for settings in ({"repetition_penalty": 4.0}, {"frequency_penalty": 0.6}, {"presence_penalty": 1.5}):
        ((token, log_prob),) = output.draw([Draw(0, SamplingSettings(**settings), 2, [0, 0], 0)])
        assert token == 3 and log_prob == pytest.approx(logits.double().log_softmax(-1)[3].item(), abs=1e-6)
    assert torch.equal(output.logits(0), logits)


# Biases, and tokens that cannot be drawn.


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}], ids=["biases", "penalised"])
def test_biases_and_exclusions_are_those_of_transformers(settings: dict) -> None:
    from transformers import (
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    logits = torch.randn(1, 50, generator=torch.manual_seed(0)) * 4
    biases, ends, history = {3: 7.5, 40: -2.25, 9: -100.0, 12: 100.0, 5: 1.0}, [3, 0, 41], [3, 3, 12, 7]
    processors = [SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()})]
    processors += [RepetitionPenaltyLogitsProcessor(penalty) for penalty in settings.values()]
    processors += [MinNewTokensLengthLogitsProcessor(2, 3, ends)]
    for num_tokens in (2, 3, 4, 5):  # 3 are wanted behind the first 2
        ids, expected = torch.tensor([(history * 2)[:num_tokens]]), logits.clone()
        for processor in processors:
            expected = processor(ids, expected)
        excluded = ends if num_tokens < 5 else []
        one = Draw(0, SamplingSettings(logit_bias=biases, **settings), num_tokens, ids[0].tolist(), 2, excluded)
        mine = logits.clone()
        sampling._bias(mine, torch.arange(50), [one])
        sampling._penalise(mine, torch.arange(50), [one])
        assert torch.equal(mine, expected)
        assert head(logits).draw([one])[0][0] == expected.argmax().item()


def test_biases_change_what_is_drawn_and_not_the_log_probability() -> None:
    output = head(LOGITS)
    for settings, excluded, expected in (
        ({"logit_bias": {2: 100}}, (), {2}),
        ({"logit_bias": {2: 100}}, (2,), {1}),
        ({"logit_bias": {1: -100, 3: -100}, "temperature": 1.0}, (), {0, 2, 4}),
        ({"temperature": 1.0, "top_p": 0.99}, (0, 1, 2, 3), {4}),
        ({"temperature": 1e30}, (1, 3), {0, 2, 4}),
    ):
        draws = [Draw(0, SamplingSettings(**settings), index, (), 0, excluded) for index in range(60)]
        drawn = output.draw(draws)
        assert {token for token, _ in drawn} == expected
        assert [log_prob for _, log_prob in drawn] == pytest.approx([LOGITS[token].item() for token, _ in drawn])
    assert torch.equal(output.logits(0), LOGITS)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}], ids=str)
def test_of_a_shortlist_that_is_excluded_a_token_is_drawn_all_the_same(settings: dict) -> None:
    """A draft, which is then rejected."""
    columns = torch.tensor([1, 3, 0, 0])  # two of padding
    short = HeadOutput(LOGITS[columns][None], vocab_size=5, tp=TensorParallel(), shortlist=ShortlistColumns(columns, 2))
    ((token, _),) = short.draw([Draw(0, SamplingSettings(**settings), 0, (), 0, (1, 3))])
    assert token in (1, 3)


# One call for many rows.


def mixed_draws() -> list[Draw]:
    settings = [
        {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 30}, {"temperature": 1.0, "top_p": 0.9},
        {"repetition_penalty": 1.5}, {"temperature": 2.0, "top_p": 0.99}, {"temperature": 1.0, **PENALTIES},
        {"temperature": 1.0, "top_k": 900}, {"temperature": 1.0, "min_p": 0.05}, {"temperature": 3.0, "top_k": 1},
        {"logit_bias": {77: 9.0}}, {"logit_bias": {3: 8, 78: 8, 4: 8}, "temperature": 1.0, "top_p": 0.9},
    ]  # fmt: skip
    chosen = [SamplingSettings(seed=seed, **one) for seed, one in enumerate(settings)]
    return [Draw(i % 4, one, i, [5, 6, 7 + i, 5], 2, [78] * (i % 3)) for i, one in enumerate(chosen * 2)]


def test_draws_do_not_depend_on_what_is_drawn_beside_them() -> None:
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) * 2
    draws = mixed_draws()
    expected = [head(logits).draw([one])[0] for one in draws]
    assert head(logits).draw(draws) == expected
    assert head(logits).draw(draws[::-1]) == expected[::-1]
    assert len({token for token, _ in expected}) > 8
    assert head(logits).draw([]) == []


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) * 2
    expected = head(logits).draw(mixed_draws())
    for bad in (torch.nan, torch.inf):
        logits[2, 77] = bad
        drawn = head(logits).draw(mixed_draws())
        for one, result, before in zip(mixed_draws(), drawn, expected, strict=True):
            assert (result == before) if one.row != 2 else (result[0] == 0 and math.isnan(result[1]))


def test_log_probs_are_those_of_the_raw_distribution_and_the_same_everywhere() -> None:
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) * 2
    exact, output = logits.double().log_softmax(-1), head(logits)
    drawn, draws = output.draw(mixed_draws()), mixed_draws()
    rows, tokens = [one.row for one in draws], [token for token, _ in drawn]
    assert [log_prob for _, log_prob in drawn] == output.log_probs_of(rows, tokens)
    assert output.log_probs_of(rows, tokens) == pytest.approx(exact[rows, tokens].tolist(), abs=2e-6)
    top = output.top(range(4), 2000)
    assert [[token for token, _ in one] for one in top] == logits.sort(descending=True).indices.tolist()
    assert [dict(top[row])[token] for row, token in zip(rows, tokens, strict=True)] == [x for _, x in drawn]
    assert output.top([3, 0], 3) == [top[3][:3], top[0][:3]]
    assert [one[0] for one in top] == [(output.token(row), output.max_log_prob(row)) for row in range(4)]


def test_a_shortlist_draws_as_the_head_whose_other_ids_have_no_probability() -> None:
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) * 2
    chosen = torch.arange(3, 2000, 3)
    columns = torch.cat([chosen, torch.zeros(5, dtype=torch.int64)])  # padding of other ranks' lists
    short = HeadOutput(
        logits[:, columns], vocab_size=2000, tp=TensorParallel(), shortlist=ShortlistColumns(columns, len(chosen))
    )
    others = torch.ones(2000, dtype=torch.bool).index_fill_(0, chosen, False)
    whole = head(logits.masked_fill(others, -torch.inf))
    draws = mixed_draws()
    assert [token for token, _ in short.draw(draws)] == [token for token, _ in whole.draw(draws)]
    assert short.top([1], 4) == [[(token, pytest.approx(x, abs=1e-6)) for token, x in whole.top([1], 4)[0]]]
    assert short.log_probs_of([0, 0], [3, 4]) == pytest.approx(whole.log_probs_of([0, 0], [3, 4]), abs=1e-6)
    assert short.log_probs_of([0], [0]) == [-math.inf]  # of padding
    assert [len(one) for one in short.top([0, 2], 5000)] == [len(chosen)] * 2
    assert all(torch.equal(short.logits(row), whole.logits(row)) for row in range(4))


def test_little_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, numbers = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)), []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: numbers.append(self.numel()) or to_list(self))
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    output = head(logits)
    assert numbers == [3 * 4]
    output.draw(mixed_draws())
    output.top([0, 1], 5)
    output.log_probs_of([0, 1], [7, 8])
    assert max(numbers[1:]) == 2 * 20  # four of the draws are plain argmax


def test_greedy_draws_make_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_gumbel", None)
    assert draw(LOGITS) == [1]
    assert draw(LOGITS, history=[1], temperature=9e-6, presence_penalty=2.0) == [3]
    with pytest.raises(TypeError):
        draw(LOGITS, temperature=1.0)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must lie between"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"temperature": 1.0, "top_p": 0.9, "top_p_decay": 1.5}, "top_p_decay"),
        ({"temperature": 1.0, "top_p_decay": 0.5}, "no effect without top_p"),
        ({"temperature": 1.0, "top_p": 0.5, "top_p_decay": 0.5, "top_p_bound": 0.6}, "top_p_bound"),
        ({"temperature": 1.0, "top_p": 0.5, "top_p_bound": 0.4}, "no effect without top_p_decay"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": "0.5"}, "min_p is '0.5'; it must be a number"),
        ({"frequency_penalty": 2.5}, "frequency_penalty is 2.5; it must lie between -2 and 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"presence_penalty": None}, "presence_penalty is None; it must be a number"),
        ({"logit_bias": {5: 100.5}}, "logit_bias of token 5 is 100.5; it must lie between -100 and 100"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 is nan"),
        ({"logit_bias": {"5": 1}}, "an id of logit_bias is '5'; it must be an integer"),
        ({"logit_bias": {5: "1"}}, "logit_bias is '1'; it must be a number"),
        ({"logit_bias": [(5, 1), (5, 2)]}, "logit_bias has token 5 twice"),
        ({"logit_bias": [5, 1]}, "logit_bias has 5; its entries are pairs"),
        ({"logit_bias": ["51"]}, "logit_bias has '51'; its entries are pairs"),
        ({"logit_bias": [(5, 1, 2)]}, "its entries are pairs"),
        ({"logit_bias": 5}, "logit_bias is 5; give pairs"),
        ({"logit_bias": "5"}, "logit_bias is '5'; give pairs"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 entries; give at most 1024"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**settings)


def test_greedy_with_settings_that_change_nothing() -> None:
    for settings in ({}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.5}, {"temperature": 9e-6, "top_k": 5}):
        assert SamplingSettings(**settings).is_plain_argmax
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        settings = SamplingSettings(**{name: 1.5})
        assert settings.is_greedy and not settings.is_plain_argmax
    settings = SamplingSettings(logit_bias={1: 0.5})
    assert settings.is_greedy and not settings.is_plain_argmax
    assert not SamplingSettings(1e-5).is_greedy


@pytest.mark.parametrize(
    "given", [{7: 1, 2: -100.0}, [(7, 1.0), [2, -100]], ((2, -100), (7, 1)), {np.int64(2): np.float32(-100), 7: 1}],
    ids=["mapping", "lists", "tuples", "numpy"],
)  # fmt: skip
def test_forms_of_biases(given: object) -> None:
    settings = SamplingSettings(logit_bias=given)
    assert settings.logit_bias == ((2, -100.0), (7, 1.0))
    assert [type(number) for number in settings.logit_bias[1]] == [int, float]
    assert hash(settings) == hash(replace(settings)) and settings.of_sample(1).logit_bias == settings.logit_bias


def test_no_biases_and_as_many_as_may_be() -> None:
    assert SamplingSettings(logit_bias=None) == SamplingSettings(logit_bias={}) == SamplingSettings()
    assert len(SamplingSettings(logit_bias=dict.fromkeys(range(1024), 1)).logit_bias) == 1024


def test_seeds_of_several_answers() -> None:
    assert [SamplingSettings(seed=5).of_sample(number).seed for number in range(3)] == [5, 6, 7]
    assert SamplingSettings(seed=-2).of_sample(3).seed == 1
    assert SamplingSettings(seed=2**63 - 1).of_sample(2).seed == -(2**63) + 1
