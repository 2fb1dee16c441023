"""Greedy tokens from weights in int8: equal to those of the plain head, whatever the numbers are, or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.early_exit.inference.worker import exact_argmax
from megatron.early_exit.inference.worker.certified_head import CertifiedHead, certified_bytes, certified_head
from megatron.early_exit.inference.worker.exact_argmax import ExactArgmax, _interval, _Norms, _winner
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.linear import (
    DenseLinear,
    Int8Linear,
    PackedLinear,
    WeightFirstLinear,
    can_pack,
    fastest_linear,
)
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

SIZES = ("ordinary", "tiny", "huge", "denormal", "mixed")
SCALES = {"ordinary": 1.0, "tiny": 1e-18, "huge": 1e12, "denormal": 1e-39}


@pytest.fixture(autouse=True)
def flushed() -> Iterator[None]:
    """As decoders compute."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def scaled(x: Tensor, size: str) -> Tensor:
    return x * torch.logspace(-12, 4, len(x))[:, None] if size == "mixed" else x * SCALES[size]


@st.composite
def heads(draw: Callable) -> tuple[Tensor, Tensor]:
    """(weight [vocabulary, h], hidden [rows, h]) with what makes argmax hard: equal rows, rows that differ in one last
    bit, padding of zeros, hidden states along a row of the weight, all scales."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    width, num_ids, num_rows = draw(st.sampled_from((16, 48, 64))), draw(st.integers(3, 60)), draw(st.integers(1, 8))
    weight = scaled(torch.randn(num_ids, width, generator=generator), draw(st.sampled_from(SIZES)))
    hidden = scaled(torch.randn(num_rows, width, generator=generator), draw(st.sampled_from(SIZES)))
    if draw(st.booleans()):  # a clear winner
        target = weight[torch.randint(num_ids, (num_rows,), generator=generator)]
        hidden = target * (hidden.abs().amax(1) / target.abs().amax(1).clamp(min=1e-30))[:, None]
    kind = draw(st.sampled_from(("as it is", "equal rows", "last bit", "nearly one direction", "zeros")))
    source, copies = weight[: num_ids // 2], weight[num_ids - num_ids // 2 :]
    if kind == "equal rows":
        copies.copy_(source)
    elif kind == "last bit":
        copies.copy_(source)
        copies[:, 0] = copies[:, 0].nextafter(torch.tensor(math.inf))
    elif kind == "nearly one direction":
        weight.copy_(weight[:1] * (1 + 1e-6 * torch.randn(num_ids, 1, generator=generator)))
    elif kind == "zeros":
        copies.zero_()
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    return weight.to(dtype), hidden.to(dtype)


def plain_heads(weight: Tensor) -> list:
    kinds = [DenseLinear, WeightFirstLinear, fastest_linear] + [PackedLinear] * can_pack(weight)
    return [kind(weight) for kind in kinds]


def plain_tokens(linear: Callable, hidden: Tensor, num_ids: int, temperature: float) -> list[int]:
    logits = linear(hidden)
    logits = logits if temperature == 1.0 else logits.float() / temperature
    output = HeadOutput(logits, vocab_size=num_ids, tp=TensorParallel())
    tokens = logits[:, :num_ids].float().argmax(1).tolist()
    assert tokens == [output.token(row) for row in range(len(hidden))]
    return tokens


@settings(max_examples=400, deadline=None)
@given(heads(), st.floats(0.1, 1.0), st.sampled_from((1.0, 0.7, 3.0)))
def test_token_is_that_of_every_plain_head(
    head: tuple[Tensor, Tensor], share_of_ids: float, temperature: float
) -> None:
    weight, hidden = head
    num_ids = max(int(share_of_ids * len(weight)), 1)
    tokens = ExactArgmax(weight)(hidden, num_ids, temperature)
    for linear in plain_heads(weight):
        if tokens is not None:
            assert tokens == plain_tokens(linear, hidden, num_ids, temperature)


@settings(max_examples=300, deadline=None)
@given(heads())
def test_bound_holds(head: tuple[Tensor, Tensor]) -> None:
    weight, hidden = head
    norms = _Norms.of(hidden)
    argmax = ExactArgmax(weight)
    if not all(norm * argmax._largest_norm < 2.0**100 for norm in norms.hidden):
        return
    scores, bounds = argmax.scores_and_bounds(hidden)
    exact = hidden.double() @ weight.double().t()
    assert ((scores.double() - exact).abs() <= bounds.double()).all()
    for linear in plain_heads(weight):
        assert ((scores.double() - linear(hidden).double()).abs() <= bounds.double()).all()


def is_violated(weight: Tensor, hidden: Tensor, argmax: ExactArgmax) -> bool:
    """Whether a logit, exact or of a plain head, is further from its score than its bound."""
    scores, bounds = argmax.scores_and_bounds(hidden)
    logits = [hidden.double() @ weight.double().t(), *(linear(hidden).double() for linear in plain_heads(weight))]
    return any(((scores.double() - one).abs() > bounds.double()).any() for one in logits)


def rows_of_error() -> tuple[Tensor, Tensor]:
    """Hidden states, exact in bf16, along what int8 loses of each row."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    return weight, (Int8Linear(weight).dequantised() - weight).bfloat16().float()


def hidden_of_error() -> tuple[Tensor, Tensor]:
    """A weight that int8 holds exactly, along what bf16 loses of a hidden state."""
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    lost = hidden - hidden.bfloat16().float()
    return (lost / lost.abs().amax() * 127).round(), hidden


def rounded_score() -> tuple[Tensor, Tensor]:
    """All exact but the score, which has nine bits."""
    weight = torch.zeros(4, 16)
    weight[:, 0], weight[:, 1] = 127.0, 1.0
    return weight, torch.tensor([[2.0, 3.0, *[0.0] * 14]])


def cancelling() -> tuple[Tensor, Tensor]:
    """A sum whose small number is lost beside large ones that cancel: in one lane of a kernel's vectors."""
    weight, hidden = torch.zeros(4, 48), torch.zeros(1, 48)
    weight[:, [0, 16, 32]] = torch.tensor([127.0, 127.0, -127.0])
    hidden[0, [0, 16, 32]] = torch.tensor([2.0**30, 1.0, 2.0**30])
    return weight, hidden


def flushed_products() -> tuple[Tensor, Tensor]:
    return torch.full((4, 16), 1e-20), torch.full((1, 16), 1e-20)


TERMS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], Callable[[ExactArgmax, pytest.MonkeyPatch], None]]] = {
    "what int8 loses": (rows_of_error, lambda argmax, _: argmax._norms[0].zero_()),
    "what bf16 loses": (
        hidden_of_error,
        lambda _, patch: patch.setattr(
            _Norms, "of", lambda x, of=_Norms.of: of(x)._replace(lost=[0.0] * len(x)), raising=True
        ),
    ),
    "rounding of scores": (rounded_score, lambda _, patch: patch.setattr(exact_argmax, "_BF16", 0.0)),
    "sums": (cancelling, lambda argmax, _: setattr(argmax, "_gamma", 0.0)),
    "flushed numbers": (flushed_products, lambda _, patch: patch.setattr(exact_argmax, "_SMALLEST_NORMAL", 0.0)),
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_of_the_bound_is_needed(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, drop = TERMS[term]
    weight, hidden = case()
    assert not is_violated(weight, hidden, ExactArgmax(weight))
    argmax = ExactArgmax(weight)
    drop(argmax, monkeypatch)
    assert is_violated(weight, hidden, argmax)


def test_plain_head_in_bf16_rounds_too() -> None:
    """The score 257 lies between two numbers of bf16 and becomes 256; the logit, 257.008, becomes 258."""
    weight = torch.zeros(4, 16, dtype=torch.bfloat16)
    weight[:, :3] = torch.tensor([127.0, 16.0, 1.0 + 2.0**-7])  # in int8: 127, 16, 1
    hidden = torch.tensor([[0.0, 16.0, 1.0, *[0.0] * 13]], dtype=torch.bfloat16)
    assert not is_violated(weight, hidden, ExactArgmax(weight))
    assert is_violated(weight, hidden, ExactArgmax(weight.float()))


def test_clear_winners_are_certified() -> None:
    """Without this a head that never answers would pass."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(500, 64, generator=generator)
    ids = torch.randint(500, (40, 4), generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        argmax = ExactArgmax(weight.to(dtype))
        for batch in ids:
            assert argmax(weight[batch].to(dtype)) == batch.tolist()
        assert (argmax.counts.batches, argmax.counts.rows, argmax.counts.refused) == (40, 160, 0)
        assert 160 <= argmax.counts.candidates < 320


def test_ties_are_left_to_the_plain_head_or_decided_by_id() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(4))
    weight[30] = weight[7]
    assert ExactArgmax(weight)(weight[[7]]) is None
    assert ExactArgmax(weight)(weight[[7]], num_ids=30) == [7]
    # A sum of one product is exact: intervals end at one number, once rounded, and the smaller id is taken.
    axes = torch.eye(16).repeat(2, 1).bfloat16()
    assert ExactArgmax(axes)(torch.eye(16)[:8].bfloat16()) == list(range(8))


def test_padding_is_no_token() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    hidden = weight[[35]]
    assert ExactArgmax(weight)(hidden) == [35]
    assert ExactArgmax(weight)(hidden, num_ids=35) == plain_tokens(DenseLinear(weight), hidden, 35, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("where", ["weight", "hidden"])
def test_numbers_that_are_not_finite_have_no_answer(value: float, where: str) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(6))
    hidden = weight[:3].clone()
    {"weight": weight, "hidden": hidden}[where][2, 1] = value
    assert ExactArgmax(weight)(hidden) is None


def test_flat_heads_have_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(400, 64, generator=torch.Generator().manual_seed(7))
    hidden = torch.zeros(1, 64)
    argmax = ExactArgmax(weight)
    assert argmax(hidden) is None
    assert argmax.counts.candidates == 400
    monkeypatch.setattr(exact_argmax, "_MOST_CANDIDATES", 1)
    assert ExactArgmax(weight)(weight[[3]]) == [3]
    weight[4] = weight[3] * 0.999  # certain, but for the number of candidates
    assert ExactArgmax(weight)(weight[[3]]) is None


class _Ranks:
    """Tensor-parallel ranks that take turns: `gather` gives what all would send."""

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.sent = size, 0, {}

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.sent[self.rank] = tensor
        return [self.sent.get(rank, tensor) for rank in range(self.size)]


@settings(max_examples=150, deadline=None)
@given(heads(), st.integers(1, 4), st.floats(0.1, 1.0))
def test_ranks_say_what_one_would(head: tuple[Tensor, Tensor], num_ranks: int, share_of_ids: float) -> None:
    weight, hidden = head
    rows = -(-len(weight) // num_ranks)
    padded = torch.cat([weight, weight.new_zeros(rows * num_ranks - len(weight), weight.size(1))])
    num_ids = max(int(share_of_ids * len(weight)), 1)
    ranks = _Ranks(num_ranks)
    parts = []
    for ranks.rank in range(num_ranks):
        parts.append(ExactArgmax(padded[ranks.rank * rows :][:rows].contiguous(), ranks))
    for _ in range(2):  # the second time all have sent
        answers = []
        for ranks.rank in range(num_ranks):
            answers.append(parts[ranks.rank](hidden, num_ids))
    assert answers == [answers[0]] * num_ranks
    one = ExactArgmax(weight)(hidden, num_ids)
    if answers[0] is not None:
        assert answers[0] == plain_tokens(DenseLinear(weight), hidden, num_ids, 1.0)
    if one is not None:  # intervals of all ranks are those of one
        assert answers[0] in (one, None)


def test_winner() -> None:
    certain = _interval([(1.0, 3, 1.5), (2.0, 5, 2.5), (0.5, 8, 1.9)])
    assert (certain.token, certain.is_certain, certain.upper) == (5, True, 2.5)
    assert not _interval([(1.0, 3, 2.1), (2.0, 5, 2.5)]).is_certain
    assert not _interval([(1.0, 3, 2.0), (2.0, 5, 2.0)]).is_certain  # 3 may be as large, and is the smaller id
    assert _interval([(2.0, 3, 2.0), (2.0, 5, 2.0)]).is_certain
    lower = _interval([(0.0, 13, 2.0)])
    assert _winner([certain, lower]) == 5
    assert _winner([lower, certain]) is None  # 13's rank comes first, as if it were a smaller id
    assert _winner([certain, lower._replace(upper=2.1)]) is None
    assert _winner([certain._replace(is_certain=False), lower]) is None


def test_choice_by_rows_and_by_refusals() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(8))
    head = CertifiedHead(ExactArgmax(weight), {1: (1.0, 0.5), 2: (1.0, 0.9), 4: (1.0, 1.2), 8: (1.0, 1.5)})
    assert [head.pays(rows) for rows in (1, 2, 3, 8, 9)] == [True, True, False, False, False]
    assert head.most_rows == 2
    assert [round(head.saved_seconds(rows), 4) for rows in (1, 2, 3, 16)] == [0.48, 0.08, 0.0, 0.0]
    assert head.tokens(weight[:2], 40) == [0, 1]
    assert head.tokens(weight[:3], 40) is None
    assert head.counts.batches == 1
    for _ in range(20):
        head.tokens(torch.zeros(1, 64), 40)
    assert (head.pays(1), head.pays(2)) == (True, False)  # 30% of the answers are missing
    for _ in range(100):
        head.tokens(torch.zeros(1, 64), 40)
    assert head.most_rows == 0
    assert head.counts.refused < 60
    always = CertifiedHead(ExactArgmax(weight))
    assert [always.pays(rows) for rows in (1, 8, 9)] == [True, True, False]


def test_small_and_quantised_heads_have_none() -> None:
    weight, tp = torch.randn(64, 64), TensorParallel()
    assert certified_head(weight, DenseLinear(weight), tp, "auto") is None
    assert certified_head(weight, DenseLinear(weight), tp, "off") is None
    assert certified_head(weight, Int8Linear(weight), tp, "on") is None
    assert certified_head(torch.randn(64, 40), DenseLinear(torch.randn(64, 40)), tp, "on") is None
    assert certified_head(weight, DenseLinear(weight), tp, "on").num_bytes == 64 * 64 + 2 * 4 * 64
    assert certified_bytes((64, 64), torch.float32, "on") == 64 * 64 + 2 * 4 * 64
    assert certified_bytes((64, 64), torch.float32, "auto") == certified_bytes((64, 64), torch.float32, "off") == 0
    assert certified_bytes((2**20, 16), torch.float32, "auto") == 2**24 + 2**23


def test_measured_choice() -> None:
    """Only that something is measured and the counts begin at zero; what is faster is the machine's business."""
    weight = torch.randn(2**15, 64, generator=torch.Generator().manual_seed(9))
    head = certified_head(weight, fastest_linear(weight), TensorParallel(), "auto")
    if head is not None:
        assert sorted(head._seconds) == [1, 2, 4, 8]
        assert all(0 < seconds < 1 for pair in head._seconds.values() for seconds in pair)
        assert head.counts.batches == 0
        assert head.most_rows >= 1
