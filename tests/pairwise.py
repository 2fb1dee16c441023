"""Few rows in which every two settings of different factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """All pairs of settings in one row."""
    return set(itertools.combinations(sorted(row.items()), 2))


def all_pairs(factors: Mapping[str, Sequence[str]]) -> set[Pair]:
    """All pairs of settings of different factors."""
    return {
        pair
        for one, other in itertools.combinations(sorted(factors), 2)
        for pair in itertools.product([(one, v) for v in factors[one]], [(other, v) for v in factors[other]])
    }


def pairwise_rows(factors: Mapping[str, Sequence[str]], candidates: int = 200, seed: int = 0) -> list[dict[str, str]]:
    """Rows that cover all pairs: each the one of some random `candidates` that covers most of what is left."""
    generator, left, rows = random.Random(seed), all_pairs(factors), []
    while left:
        forced = dict(min(left))  # each row covers at least one
        drawn = [
            {name: generator.choice(values) for name, values in factors.items()} | forced for _ in range(candidates)
        ]
        best = max(drawn, key=lambda row: len(pairs_of(row) & left))
        left -= pairs_of(best)
        rows.append(best)
    return rows
