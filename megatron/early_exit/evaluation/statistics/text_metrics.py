"""Metrics of answers: overlap with a reference, and repetition, which greedy small models are prone to and which
inflates speed and agreement.

Sources: Lin, ROUGE (2004), with the words of Google's rouge_score; Li et al., arXiv:1510.03055 (distinct-n).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

LOOP_REPEATS = 3
LOOP_TOKENS = 12
"""What makes a loop: `is_loop`."""


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]: those of rouge_score without stemming, which are runs
    of ASCII letters and digits, in lower case. 0 if either text has none."""
    reference_words, answer_words = _words(reference), _words(answer)
    common = _longest_common_subsequence(reference_words, answer_words)
    # With precision c / a and recall c / r, F1 is 2c / (a + r).
    return 2 * common / (len(reference_words) + len(answer_words)) if common else 0.0


def text_loss(reference: str, answer: str) -> float:
    """1 - ROUGE-L; 0 for the same text, also for one in which ROUGE-L knows no words."""
    return 0.0 if answer == reference else 1.0 - rouge_l(reference, answer)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _longest_common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length. A row of the table of all prefixes is one integer, in which a 0 says that the length grows there (Hyyrö,
    Bit-parallel LCS-length computation revisited, 2004)."""
    places: dict[Hashable, int] = defaultdict(int)
    for index, item in enumerate(a):
        places[item] |= 1 << index
    everywhere = (1 << len(a)) - 1
    row = everywhere
    for item in b:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(a) - row.bit_count()


def distinct_n(tokens: Sequence[Hashable], n: int) -> float | None:
    """Share of different ones among all n-grams of an answer; None if it is shorter than `n`."""
    if n < 1:
        raise ValueError(f"{n}-grams do not exist; take n of at least 1")
    count = len(tokens) - n + 1
    return len({tuple(tokens[start : start + n]) for start in range(count)}) / count if count > 0 else None


def is_loop(tokens: Sequence[Hashable]) -> bool:
    """Whether an answer ends in a loop: its last tokens are an n-gram, of any length n, repeated without a break at
    least `LOOP_REPEATS` times and over at least `LOOP_TOKENS` tokens (the first repetition may be cut off at its
    beginning)."""
    return any(
        _repeats(tokens, period, max(LOOP_REPEATS * period, LOOP_TOKENS))
        for period in range(1, len(tokens) // LOOP_REPEATS + 1)
    )


def _repeats(tokens: Sequence[Hashable], period: int, length: int) -> bool:
    return length <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in range(1, length - period + 1))
