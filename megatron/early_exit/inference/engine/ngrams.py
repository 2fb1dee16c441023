"""Drafts by prompt lookup: what followed the last few tokens where they stood before, in the prompt or the answer.

Source: Saxena, 2023 (prompt lookup decoding). An index by n-gram takes the place of a search, so that a new token costs
a few look-ups however long the text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_NGRAM = 4
"""Tokens that are looked up at once; if they never stood there before, fewer of them are, down to one. How often what
one match in so many tokens promises comes true is counted apart, so short matches are used where they are worth it."""


class NgramMatch(NamedTuple):
    """Where the last tokens stood before."""

    size: int
    """How many of the last tokens agree, at most `MAX_NGRAM`."""
    position: int
    """Behind them, where what follows them begins."""


class NgramIndex:
    """Where each n-gram of a growing text stood last, but for the n-gram that ends the text."""

    def __init__(self, max_ngram: int = MAX_NGRAM) -> None:
        self.tokens: list[int] = []
        self._followed_at: list[dict[tuple[int, ...], int]] = [{} for _ in range(max_ngram)]
        """Of each size from 1 on: the position behind the last occurrence of an n-gram that something follows."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens; `max_ngram` steps each."""
        for token in tokens:
            position, known = len(self.tokens), self.tokens
            for size, followed_at in enumerate(self._followed_at[:position], start=1):
                followed_at[tuple(known[position - size :])] = position
            known.append(token)

    def find(self, more: Sequence[int] = ()) -> NgramMatch | None:
        """The longest n-gram that ends the text and stood in it before, where it did last; None if not even the last
        token did. more: tokens that are taken to follow the text; they are not searched."""
        last = [*self.tokens[-len(self._followed_at) :], *more] if more else self.tokens
        for size in range(min(len(self._followed_at), len(last)), 0, -1):
            position = self._followed_at[size - 1].get(tuple(last[len(last) - size :]))
            if position is not None:
                return NgramMatch(size, position)
        return None

    def following(self, match: NgramMatch, length: int, more: Sequence[int] = ()) -> list[int]:
        """The next `length` tokens by a match of the text as it is now. more: as of `find`.

        What follows may reach the end of the text: it then goes on with itself, as a loop does."""
        copied = self.tokens[match.position : match.position + length]
        if len(copied) < length:
            loop = [*self.tokens[match.position :], *more]
            copied = (loop * -(-length // len(loop)))[:length]
        return copied
