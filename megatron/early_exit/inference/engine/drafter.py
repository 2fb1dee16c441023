"""What one request drafts: which exit or which earlier text, how long, and when a draft ends.

Everything is learned from rows that all layers have verified. What earlier text would have drafted is compared with
every answer, whether it was used or not. Exits that do not draft are asked about a verified row now and then, where
their hidden states pass by anyway; so is known what they would have drafted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.early_exit.inference.engine.draft_acceptance import Acceptance, Experience, Rate, Source
from megatron.early_exit.inference.engine.draft_length import DraftRates, StepLoad
from megatron.early_exit.inference.engine.ngrams import NgramIndex, NgramMatch
from megatron.early_exit.inference.protocol import FINAL_HEAD, DrawnToken, ExitDescription
from megatron.early_exit.inference.results import DraftSource

_SHARE_OF_LEARNING = 0.02
"""Of the time of a request, at most this much goes into asking exits that do not draft, and into drafts that are tried
to see whether they pay again."""
_LEAST_OF_GUESSES = 0.5
"""Across stages: a match of which less is expected waits for the exit's draft, if there is an exit."""

_LEAST_GAIN_OF_EXITS = 0.15
"""Tokens a second that an exit's drafts must promise beyond what goes without. They take passes of their own, whose
work on the host costs know in part: on the demonstrator's model drafts that promised 6% lost a third."""


@dataclass(frozen=True)
class DraftSettings:
    """What a request lets drafts be."""

    exits: tuple[int, ...]
    """Indices of those that may draft."""
    uses_ngrams: bool
    is_greedy: bool
    """Whether the most probable token is taken as it is."""
    fixed_length: int | None
    longest: int
    min_confidence: float | None
    """A draft of an exit ends with a token that has less; None: where it is not expected to pay any more, if the length
    adapts."""


@dataclass(frozen=True)
class DraftChoice:
    """What to draft now; neither: nothing."""

    tokens: tuple[int, ...] = ()
    """Known drafts, to be verified in the next step."""
    exit: int | None = None
    """Index of the exit that drafts."""
    length: int = 0
    """How many tokens it drafts at most."""


NO_DRAFT = DraftChoice()


@dataclass
class _ExitDraft:
    """A draft that an exit is making."""

    exit: int
    best_rate: float
    """Tokens a second that it was begun for."""
    load: StepLoad
    chance: float = 1.0
    """That all its tokens are accepted."""
    confidences: list[float | None] = field(default_factory=list)


class Drafter:
    """Of one request. It is told all tokens of the prompt and the answer."""

    def __init__(
        self, settings: DraftSettings, exits: Sequence[ExitDescription], rates: DraftRates, experience: Experience
    ) -> None:
        """exits: all of the model."""
        self.settings = settings
        self._exits, self._rates, self._experience = exits, rates, experience
        self._acceptance: dict[Source, Acceptance] = {}
        self._index = NgramIndex()
        self._match: NgramMatch | None = None
        """What earlier text says of the tokens to come."""
        self._draft: _ExitDraft | None = None
        self._guessed: deque[Rate] = deque()
        """Across stages: what is learned from each token from earlier text that is on its way."""
        has_choice = settings.fixed_length is None or len(settings.exits) + settings.uses_ngrams > 1
        self._may_ask = settings.is_greedy and has_choice
        """Whether what exits would have drafted is of any use, and can be known without drawing."""
        self._is_asked = False
        """Whether other exits are asked about the row that is being verified."""
        self._savings = 0.0
        """Seconds that may go into learning."""

    def acceptance(self, source: Source) -> Acceptance:
        """What is known of a source."""
        if source not in self._acceptance:
            self._acceptance[source] = Acceptance(source, self._experience.of(source, self.settings.is_greedy))
        return self._acceptance[source]

    # Before a draft.

    def choose(self, load: StepLoad, room: int) -> DraftChoice:
        """What promises most tokens in a second. room: tokens that may be drafted at most."""
        settings = self.settings
        self._draft = None
        self._match = match = self._index.find() if settings.uses_ngrams else None
        longest = min(settings.longest, room)
        if longest < 1:
            return NO_DRAFT
        sources = self._that_may_pay(longest, load)
        if not sources:
            return self._trial(load)
        best_promise, best_rate = self._rate_of_nothing(load), 0.0
        best_exit: int | None = None
        best_length = 0
        for one in sources:
            kind, number = one.source
            expected, rates = one.expected_tokens(longest), self._rates
            of_exit = kind == "exit"
            rate, length = self._best(
                rates.of_exit(self._exits[number], expected, load) if of_exit else rates.of_rows(expected, load)
            )
            promise = rate / (1.0 + _LEAST_GAIN_OF_EXITS) if of_exit else rate
            if length and promise > best_promise:
                best_promise, best_rate = promise, rate
                best_exit, best_length = number if of_exit else None, length
        if best_exit is not None:
            if settings.fixed_length is None and settings.min_confidence is None:
                best_length = longest  # it ends where it does not pay, see `goes_on`
            return self._begin(best_exit, best_length, best_rate, load)
        if match is None or best_length == 0:
            return self._trial(load)
        load.extra_rows += best_length
        load.num_longer += 1
        load.extra_tokens += self.acceptance(Source("ngram", match.size)).expected_tokens(best_length)[-1] - 1.0
        return DraftChoice(tuple(self._index.following(match, best_length)))

    def _begin(self, index: int, length: int, rate: float, load: StepLoad) -> DraftChoice:
        """Let an exit draft. rate: tokens a second that it is expected to bring."""
        self._draft = _ExitDraft(index, rate, load)
        return DraftChoice(exit=index, length=length)

    def _that_may_pay(self, longest: int, load: StepLoad) -> list[Acceptance]:
        """Of the sources whose drafts are accepted often enough to pay at some length: in a large batch none, mostly.
        Every request asks in every step, so this takes next to no time."""
        settings, rates, may_pay = self.settings, self._rates, []
        adapts, match = settings.fixed_length is None, self._match
        if match is not None:
            one = self.acceptance(Source("ngram", match.size))
            if not adapts or one.first.value > rates.least_of_rows(longest, load):
                may_pay.append(one)
        if not load.is_verifying:
            for index in settings.exits:
                one = self.acceptance(Source("exit", index))
                least = rates.least_of_exit(self._exits[index], longest, load, _LEAST_GAIN_OF_EXITS)
                if not adapts or one.first.value > least:
                    may_pay.append(one)
        return may_pay

    def _trial(self, load: StepLoad) -> DraftChoice:
        """Nothing, or one token of the best exit, where it is time to see whether drafts pay again."""
        if not self._tries_again(load):
            return NO_DRAFT
        index = max(self.settings.exits, key=lambda one: self.acceptance(Source("exit", one)).first.value)
        return self._begin(index, 1, math.inf, load)

    def _rate_of_nothing(self, load: StepLoad) -> float:
        """Tokens a second without a draft; below all others if the length is fixed."""
        return self._rates.of_rows([1.0], load)[0] if self.settings.fixed_length is None else -1.0

    def _best(self, rates: Sequence[float]) -> tuple[float, int]:
        """(rate, length)"""
        if self.settings.fixed_length is not None:
            return rates[-1], len(rates) - 1
        length = max(range(len(rates)), key=rates.__getitem__)  # the shortest of equals
        return rates[length], length

    def _tries_again(self, load: StepLoad) -> bool:
        """Whether an exit drafts one token though it does not pay: now and then, where exits cannot be asked, that
        tells whether it would again."""
        settings = self.settings
        if settings.is_greedy or not settings.exits or settings.fixed_length is not None or load.is_verifying:
            return False
        one = self._exits[settings.exits[0]]
        cost = self._rates.round_seconds(one, 1, load) - self._rates.round_seconds(one, 0, load)
        return self._spend(cost)

    def guesses(self, drafts: Sequence[int], count: int) -> list[int]:
        """Across stages: `count` tokens that earlier text says follow the drafts that are on their way, or none."""
        match = self._index.find(drafts) if self.settings.uses_ngrams else None
        if match is None:
            return []
        acceptance = self.acceptance(Source("ngram", match.size))
        if self.settings.exits and acceptance.first.value < _LEAST_OF_GUESSES:
            return []
        self._guessed += [acceptance.later if number else acceptance.first for number in range(count)]
        return self._index.following(match, count, drafts)

    def compare(self, source: DraftSource | None, token: int, is_accepted: bool) -> None:
        """Across stages: learn from one token that all layers drew. source: of what was drafted there, if anything."""
        if source == "ngram":
            self._guessed.popleft().observe(is_accepted)
        elif source == "exit":
            self.acceptance(Source("exit", self.settings.exits[0])).observe(1, int(is_accepted))
        if source is not None and not is_accepted:
            self._guessed.clear()
        self.extend([token])

    # While an exit drafts.

    def goes_on(self, confidence: float | None) -> bool:
        """Whether another token is to be drafted behind one of this confidence; None: it is not known."""
        draft, settings = self._draft, self.settings
        assert draft is not None, "`choose` has not let an exit draft"
        draft.confidences.append(confidence)
        if settings.min_confidence is not None:
            return confidence is None or confidence >= settings.min_confidence
        if settings.fixed_length is not None:
            return True
        source = Source("exit", draft.exit)
        later = self.acceptance(source).later.value
        draft.chance *= later if confidence is None else self._at_confidence(draft.exit, confidence).value
        length, one = len(draft.confidences), self._exits[draft.exit]
        load = draft.load
        more = self._rates.round_seconds(one, length + 1, load) - self._rates.round_seconds(one, length, load)
        gain = load.num_drafting * draft.chance * later + load.num_requests - load.num_drafting
        return gain > draft.best_rate * more

    def _at_confidence(self, index: int, confidence: float) -> Rate:
        return self._experience.at_confidence(Source("exit", index), self.settings.is_greedy, confidence)

    # When all layers verify.

    def exits_to_ask(self, load: StepLoad) -> tuple[int, ...]:
        """Exits to evaluate on the newest row that is verified now, beside the one that drafts, in the order of
        layers."""
        step = self._rates.step_seconds(load.num_requests)
        self._savings = min(self._savings + _SHARE_OF_LEARNING * step / load.num_requests, step)
        self._is_asked = False
        if not self._may_ask or self._savings < self._rates.observed_exit_seconds:
            return ()
        drafting = None if self._draft is None else self._draft.exit
        others = tuple(index for index in self.settings.exits if index != drafting)
        self._is_asked = len(others) > 0 and self._spend(len(others) * self._rates.observed_exit_seconds)
        return others if self._is_asked else ()

    def _spend(self, seconds: float) -> bool:
        if self._savings < seconds:
            return False
        self._savings -= seconds
        return True

    def observe(self, num_drafted: int, num_accepted: int, tokens: Sequence[int], newest: DrawnToken) -> None:
        """Learn from what was verified. tokens: all that was added to the answer. newest: what all layers drew behind
        the newest row, with what exits that were asked predicted there."""
        draft, self._draft = self._draft, None
        if draft is not None:
            num_tried = min(num_accepted + 1, num_drafted)
            self.acceptance(Source("exit", draft.exit)).observe(num_tried, num_accepted)
            for number, confidence in enumerate(draft.confidences[:num_tried]):
                if confidence is not None:
                    self._at_confidence(draft.exit, confidence).observe(number < num_accepted)
        if self._is_asked:
            for one in newest.predictions:
                if one.exit != FINAL_HEAD:
                    self.acceptance(Source("exit", one.exit)).observe(1, int(one.token == newest.token))
            self._is_asked = False
        self._learn_match(tokens)
        self.extend(tokens)

    def _learn_match(self, tokens: Sequence[int]) -> None:
        """Compare what earlier text said with what came."""
        match = self._match
        if match is None:
            return
        said = self._index.following(match, min(len(tokens), self.settings.longest))
        num_accepted = next((n for n, (a, b) in enumerate(zip(said, tokens)) if a != b), len(said))
        self.acceptance(Source("ngram", match.size)).observe(min(num_accepted + 1, len(said)), num_accepted)
        self._match = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in the prompt, or what follows it."""
        if self.settings.uses_ngrams:
            self._index.extend(tokens)
