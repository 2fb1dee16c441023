"""How often drafts are accepted: estimates for each source of drafts, which forget what is long ago.

A request's estimates start from those of all requests before it, and these from a guess; a few observations of its own
outweigh them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

_STRENGTH = 4.0
"""Observations that what is known before them counts for."""
_KEPT, _KEPT_OF_ALL = 0.97, 0.995
"""Of what was observed before, at every observation: of one request, and of all of them."""
_NUM_BINS = 10
"""Of confidences."""
_GUESS_OF_EXIT = 0.7
_GUESSES_OF_NGRAMS = (0.25, 0.4, 0.55, 0.65)
"""By the size of the match, from 1 on."""


class Source(NamedTuple):
    """What drafts: an exit, by its index, or a match of so many tokens."""

    kind: Literal["exit", "ngram"]
    number: int

    @property
    def guess(self) -> float:
        """How often its drafts are accepted, before anything is known."""
        if self.kind == "exit":
            return _GUESS_OF_EXIT
        return _GUESSES_OF_NGRAMS[min(self.number, len(_GUESSES_OF_NGRAMS)) - 1]


class Rate:
    """How often something holds."""

    def __init__(self, before: Rate | float, kept: float) -> None:
        """before: what it is taken to be at first; another rate learns what this one does. kept: share of earlier
        observations that each new one leaves."""
        self._before, self._kept = before, kept
        self.trials, self._hits = 0.0, 0.0

    @property
    def value(self) -> float:
        before = self._before.value if isinstance(self._before, Rate) else self._before
        return (self._hits + _STRENGTH * before) / (self.trials + _STRENGTH)

    def observe(self, is_hit: bool) -> None:
        self.trials, self._hits = self.trials * self._kept + 1.0, self._hits * self._kept + is_hit
        if isinstance(self._before, Rate):
            self._before.observe(is_hit)


class Acceptance:
    """Of one source: of a draft's first token, and of each later one if those before it were accepted.

    They differ where the source is a match: the first token that follows it tells whether the text goes on as before.
    For exits they are one."""

    def __init__(self, source: Source, before: Acceptance | None = None) -> None:
        self.source = source
        guess, kept = source.guess, _KEPT_OF_ALL if before is None else _KEPT
        self.first: Rate = Rate(guess if before is None else before.first, kept)
        self.later: Rate = self.first
        if source.kind == "ngram":
            self.later = Rate(max(guess, _GUESS_OF_EXIT) if before is None else before.later, kept)

    def observe(self, num_tried: int, num_accepted: int) -> None:
        """Learn from a draft of which `num_tried` tokens were compared: all accepted ones, and the one behind them if
        that was rejected."""
        for number in range(num_tried):
            (self.later if number else self.first).observe(number < num_accepted)

    def expected_tokens(self, longest: int) -> list[float]:
        """What verifying a draft of 0, 1, ..., `longest` tokens gives on average, the token behind it included."""
        expected, chance = [1.0], self.first.value
        later = self.later.value
        for _ in range(longest):
            expected.append(expected[-1] + chance)
            chance *= later
        return expected


class Experience:
    """What all requests of an engine have seen of drafts: greedy ones and those that sample apart, as exits agree with
    the final head less often where both draw."""

    def __init__(self) -> None:
        self._of_sources: dict[tuple[Source, bool], Acceptance] = {}
        self._of_confidences: dict[tuple[Source, bool], list[Rate]] = {}

    def of(self, source: Source, is_greedy: bool) -> Acceptance:
        """Of a source, over all requests."""
        key = source, is_greedy
        if key not in self._of_sources:
            self._of_sources[key] = Acceptance(source)
        return self._of_sources[key]

    def at_confidence(self, source: Source, is_greedy: bool, confidence: float) -> Rate:
        """How often an exit's drafts of about this confidence are accepted. At first they are taken at their word."""
        key = source, is_greedy
        if key not in self._of_confidences:
            rates = [Rate((number + 0.5) / _NUM_BINS, _KEPT_OF_ALL) for number in range(_NUM_BINS)]
            self._of_confidences[key] = rates
        return self._of_confidences[key][min(int(confidence * _NUM_BINS), _NUM_BINS - 1)]
