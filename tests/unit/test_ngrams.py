"""Drafts from earlier text against a search through all of it."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.engine.ngrams import NgramIndex

FEW_TOKENS = st.lists(st.integers(0, 3), max_size=60)


def searched(tokens: Sequence[int], more: Sequence[int], length: int, max_ngram: int) -> tuple[int, list[int]] | None:
    """(size of the match, what follows it), by reading the whole text for every size."""
    last = [*tokens, *more]
    for size in range(min(max_ngram, len(last)), 0, -1):
        for stop in range(len(tokens) - 1, size - 1, -1):
            if list(tokens[stop - size : stop]) == last[len(last) - size :]:
                for _ in range(length):  # what follows may be what is being copied
                    last.append(last[stop + len(last) - len(tokens) - len(more)])
                return size, last[len(tokens) + len(more) :]
    return None


def found(index: NgramIndex, length: int, more: Sequence[int] = ()) -> tuple[int, list[int]] | None:
    match = index.find(more)
    return None if match is None else (match.size, index.following(match, length, more))


@given(FEW_TOKENS, st.lists(st.integers(0, 3), max_size=5), st.integers(1, 9), st.integers(1, 5), st.data())
def test_the_index_finds_what_a_search_finds(
    tokens: list[int], more: list[int], length: int, max_ngram: int, data: st.DataObject
) -> None:
    index, done = NgramIndex(max_ngram), 0
    while done < len(tokens):  # in pieces, with questions between them
        count = data.draw(st.integers(1, len(tokens) - done))
        index.extend(tokens[done : done + count])
        done += count
        for drafts in ([], more):
            assert found(index, length, drafts) == searched(tokens[:done], drafts, length, max_ngram)


def test_longer_matches_and_later_places_come_first() -> None:
    index = NgramIndex(3)
    index.extend([7, 1, 2, 3, 50, 8, 2, 3, 60, 9, 1, 2, 3])
    assert found(index, 2) == (3, [50, 8])  # not what followed 2, 3 later
    index.extend([4, 2, 3])
    assert found(index, 2) == (2, [4, 2])  # the last place but the end itself
    assert NgramIndex().find() is None


def test_a_loop_goes_on() -> None:
    index = NgramIndex()
    index.extend([5, 1, 2, 1, 2])
    assert found(index, 7) == (2, [1, 2, 1, 2, 1, 2, 1])
