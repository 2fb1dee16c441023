"""Metrics of answers: against rouge_score and nltk, and loops by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.util import ngrams
from rouge_score.rouge_scorer import RougeScorer

from megatron.early_exit.evaluation.statistics.text_metrics import distinct_n, is_loop, rouge_l, text_loss

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
WORDS = "the The a cat sat-on mat's über naïve 東京 l33t _ x_y É K İ \t\n .. 12.5 don't ﬁ ".split(" ")


def rouge_score_s(reference: str, answer: str) -> float:
    return SCORER.score(reference, answer)["rougeL"].fmeasure


@pytest.mark.parametrize("seed", range(40))
def test_rouge_l_is_rouge_score_s(seed: int) -> None:
    generator = random.Random(seed)
    reference, answer = (" ".join(generator.choices(WORDS, k=generator.randrange(1, 90))) for _ in range(2))
    assert rouge_l(reference, answer) == pytest.approx(rouge_score_s(reference, answer), abs=1e-12)


@given(st.text(max_size=60), st.text(max_size=60))
@settings(deadline=None, max_examples=100)
def test_rouge_l_is_rouge_score_s_for_any_text(reference: str, answer: str) -> None:
    assert rouge_l(reference, answer) == pytest.approx(rouge_score_s(reference, answer), abs=1e-12)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
@settings(deadline=None, max_examples=100)
def test_rouge_l_is_rouge_score_s_for_few_words(reference: list[str], answer: list[str]) -> None:
    texts = " ".join(reference), " ".join(answer)
    assert rouge_l(*texts) == pytest.approx(rouge_score_s(*texts), abs=1e-12)


def test_rouge_l_by_hand() -> None:
    assert rouge_l("a b c d", "b x d") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge_l("Same words.", "same, WORDS") == 1.0
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("", "") == rouge_l("東京", "東京") == 0.0


def test_the_same_text_loses_nothing() -> None:
    assert text_loss("", "") == text_loss("東京", "東京") == text_loss("a b", "a b") == 0.0
    assert text_loss("東京", "京都") == 1.0 and text_loss("a b c d", "b x d") == 1 - rouge_l("a b c d", "b x d")


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_distinct_n_counts_as_nltk_does(tokens: list[int], n: int) -> None:
    grams = list(ngrams(tokens, n))
    assert distinct_n(tokens, n) == (len(set(grams)) / len(grams) if grams else None)


def test_distinct_n_needs_an_n() -> None:
    with pytest.raises(ValueError, match="0-grams"):
        distinct_n([1, 2], 0)


@pytest.mark.parametrize(("tokens", "expected"), [
    ([], False), ([7] * 11, False), ([7] * 12, True), ([1, 2, 3] + [7] * 12, True), ([7] * 12 + [1], False),
    ([1, 2, 3, 4] * 3, True), ([1, 2, 3, 4] * 2 + [1, 2, 3], False), ([9, 9] + [1, 2, 3, 4, 5] * 3, True),
    ([1, 2, 3, 4, 5] * 2, False), ([3, 4, 5] + [1, 2, 3, 4, 5] * 3 + [1], True), (list(range(40)) * 3, True),
    (list(range(100)), False), (list(range(40)) * 2 + list(range(39)), False),
])  # fmt: skip
def test_loops(tokens: list[int], expected: bool) -> None:
    assert is_loop(tokens) is expected
    assert is_loop([str(token) for token in tokens]) is expected
