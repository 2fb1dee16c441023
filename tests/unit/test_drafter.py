"""What a request drafts, in a world without a model: exits that agree as often as we say, text as we write it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.draft_acceptance import Experience, Source
from megatron.early_exit.inference.engine.draft_length import DraftRates, StepLoad
from megatron.early_exit.inference.engine.drafter import NO_DRAFT, Drafter, DraftSettings
from megatron.early_exit.inference.protocol import FINAL_HEAD, DrawnToken, ExitDescription, Prediction

SAME = (1.0,) * len(ROW_COUNTS)
COSTS = StepCosts(SAME, SAME, SAME, SAME)
EXITS = (ExitDescription(2, 2, False), ExitDescription(4, 4, False), ExitDescription(8, 8, False))
ADAPTIVE = DraftSettings(
    exits=(0, 1, 2), uses_ngrams=False, is_greedy=True, fixed_length=None, longest=10, min_confidence=None
)
PLANNED = replace(ADAPTIVE, exits=(0,), min_confidence=0.0)
"""The length is chosen before a draft, and no confidence ends it."""


def drafter(
    settings: DraftSettings, costs: StepCosts = COSTS, experience: Experience | None = None, num_layers: int = 12
) -> Drafter:
    return Drafter(settings, EXITS, DraftRates(costs, num_layers), experience or Experience())


@dataclass
class World:
    """Runs one request. Each exit agrees with the final head with a probability of its own, and is as confident as that
    tells where it is `calibrated`."""

    one: Drafter
    agreement: Callable[[int, int], float]
    """(exit, tokens so far) -> how often it agrees."""
    random: random.Random = field(default_factory=lambda: random.Random(5))
    load: StepLoad = field(default_factory=StepLoad)
    text: Callable[[int], int] = lambda position: position
    """The answer."""
    num_tokens: int = 0
    seconds: float = 0.0
    learning_seconds: float = 0.0

    def verify(self) -> None:
        """One round of drafts and their verification."""
        rates, load = self.one._rates, replace(self.load)
        choice = self.one.choose(load, 10**6)
        drafts, is_right = list(choice.tokens), True
        if choice.exit is not None:
            drafts = []
            while len(drafts) < choice.length:
                agrees = self.random.random() < self.agreement(choice.exit, self.num_tokens)
                drafts.append(self.text(self.num_tokens + len(drafts)) if agrees else -1)
                if not self.one.goes_on(None):
                    break
            self.seconds += rates.round_seconds(EXITS[choice.exit], len(drafts), load)
            if choice.length == 1 and not self.one.settings.is_greedy:
                nothing = rates.round_seconds(EXITS[choice.exit], 0, load)
                self.learning_seconds += rates.round_seconds(EXITS[choice.exit], 1, load) - nothing
        else:
            self.seconds += rates.step_seconds(load.num_requests, len(drafts))
        asked = self.one.exits_to_ask(load)
        asking = len(asked) * rates.observed_exit_seconds
        self.seconds, self.learning_seconds = self.seconds + asking, self.learning_seconds + asking
        tokens = []
        for draft in [*drafts, None]:
            tokens.append(self.text(self.num_tokens + len(tokens)))
            is_right = draft == tokens[-1]
            if not is_right:
                break
        num_accepted = len(tokens) - 1
        self.num_tokens += len(tokens)
        newest = self.text(self.num_tokens + 3)
        predictions = [
            Prediction(index, newest if self.random.random() < self.agreement(index, self.num_tokens) else -1, 0.5)
            for index in asked
        ]
        last = DrawnToken(newest, 0.0, 1.0, FINAL_HEAD, (*predictions, Prediction(FINAL_HEAD, newest, 1.0)))
        self.one.observe(len(drafts), num_accepted, tokens, last)

    def run(self, num_tokens: int) -> float:
        """Tokens a second from here on."""
        first, started = self.num_tokens, self.seconds
        while self.num_tokens < first + num_tokens:
            self.verify()
        return (self.num_tokens - first) / (self.seconds - started)


def agreeing(*shares: float) -> Callable[[int, int], float]:
    return lambda index, _: shares[index]


def best_in_hindsight(shares: Sequence[float], costs: StepCosts = COSTS) -> float:
    """Tokens a second of the best exit and length, or of none."""
    rates = DraftRates(costs, 12)
    expected = [[sum(share**i for i in range(length + 1)) for length in range(11)] for share in shares]
    return max(max(rates.of_exit(one, each, StepLoad())) for one, each in zip(EXITS, expected, strict=True))


# Lengths.


def test_a_fixed_length_stays_and_the_rest_of_the_answer_bounds_it() -> None:
    one = drafter(replace(PLANNED, fixed_length=3, longest=3))
    assert one.choose(StepLoad(), 100).length == 3 and one.choose(StepLoad(), 2).length == 2
    assert one.choose(StepLoad(), 0) == NO_DRAFT


def test_the_length_promises_most_tokens_in_a_second() -> None:
    rates = [sum(0.7**i for i in range(k + 1)) / (2 * (k + 1) + k + 11) for k in range(11)]
    assert drafter(PLANNED).choose(StepLoad(), 100).length == rates.index(max(rates)) == 2


def test_drafts_grow_with_acceptance_and_vanish_without() -> None:
    good, bad = World(drafter(PLANNED), agreeing(1.0)), World(drafter(PLANNED), agreeing(0.0))
    good.run(200), bad.run(200)
    assert good.one.choose(StepLoad(), 100).length >= 5
    assert bad.one.choose(StepLoad(), 100) == NO_DRAFT


def test_costly_rows_and_batches_shorten_drafts() -> None:
    rising = tuple(float(rows) for rows in ROW_COUNTS)
    assert drafter(PLANNED, replace(COSTS, layer_seconds=rising)).choose(StepLoad(), 100) == NO_DRAFT
    assert drafter(PLANNED, replace(COSTS, batch_seconds=30.0)).choose(StepLoad(), 100) == NO_DRAFT


@pytest.mark.parametrize(("head", "length"), [(3.5, 1), (5.0, 0)])  # 1.7 tokens in 18.5 and 20 seconds, or 1 in 13
def test_an_exit_that_promises_little_does_not_draft(head: float, length: int) -> None:
    costs = replace(COSTS, approximate_seconds=(head,) * len(ROW_COUNTS))
    assert drafter(PLANNED, costs).choose(StepLoad(), 100).length == length


def test_exits_are_compared_with_each_other_without_the_gain_that_each_must_promise() -> None:
    """A later exit that promises a few hundredths more than one before it drafts."""
    experience, exits = Experience(), replace(PLANNED, exits=(0, 1))
    one = drafter(exits, experience=experience)
    for index, accepted in ((0, (7, 10)), (1, (9, 10))):
        for number in range(600):
            experience.of(Source("exit", index), True).observe(1, int(number % accepted[1] < accepted[0]))
    best = [
        max(one._rates.of_exit(EXITS[index], one.acceptance(Source("exit", index)).expected_tokens(10), StepLoad()))
        for index in (0, 1)
    ]
    assert best[0] < best[1] < 1.15 * best[0]
    assert one.choose(StepLoad(), 100).exit == 1


def test_drafts_that_pay_for_one_request_may_not_pay_for_many() -> None:
    growing = tuple(max(1.0, rows / 2) for rows in ROW_COUNTS)
    one = drafter(PLANNED, replace(COSTS, layer_seconds=growing))
    assert one.choose(StepLoad(), 100).length > 0
    assert one.choose(StepLoad(num_requests=8, num_drafting=8), 100) == NO_DRAFT
    # Nor where others run all layers in each of its steps.
    assert one.choose(StepLoad(num_requests=2, num_drafting=1), 100) == NO_DRAFT


def test_a_draft_ends_where_confidence_is_low() -> None:
    one = drafter(replace(ADAPTIVE, exits=(0,)))
    one.choose(StepLoad(), 100)
    assert [one.goes_on(confidence) for confidence in (0.99, 0.99, 0.99, 0.05)] == [True, True, True, False]
    one = drafter(replace(ADAPTIVE, exits=(0,), min_confidence=0.4, fixed_length=9, longest=9))
    one.choose(StepLoad(), 100)
    assert [one.goes_on(confidence) for confidence in (0.4, None, 0.39)] == [True, True, False]
    one = drafter(replace(ADAPTIVE, exits=(0,), fixed_length=9, longest=9))
    one.choose(StepLoad(), 100)
    assert one.goes_on(0.0)  # the length is given


def test_confidence_is_taken_for_what_it_has_turned_out_to_be() -> None:
    experience = Experience()
    one = drafter(replace(ADAPTIVE, exits=(0,)), experience=experience)
    for _ in range(60):  # 0.95 is always wrong, and 0.15 always right
        for confidence, accepted in ((0.95, 0), (0.15, 1)):
            one.choose(StepLoad(), 100)
            if one._draft is not None:
                one.goes_on(confidence)
                one.observe(1, accepted, [1], DrawnToken(1, 0.0, 1.0, FINAL_HEAD))
    later = drafter(replace(ADAPTIVE, exits=(0,)), experience=experience)
    later.choose(StepLoad(), 100)
    assert later.goes_on(0.15)
    later.choose(StepLoad(), 100)
    assert not later.goes_on(0.95)


# Which exit.


@pytest.mark.parametrize("shares", [(0.9, 0.92, 0.95), (0.3, 0.85, 0.9), (0.1, 0.2, 0.97), (0.05, 0.1, 0.2)])
def test_the_choice_comes_near_the_best_in_hindsight(shares: tuple[float, ...]) -> None:
    world = World(drafter(ADAPTIVE), agreeing(*shares))
    world.run(300)
    assert world.run(3000) >= 0.93 * best_in_hindsight(shares)
    assert world.learning_seconds <= 0.02 * world.seconds


def test_the_choice_follows_when_another_exit_becomes_the_best() -> None:
    early, late = (0.9, 0.3, 0.3), (0.1, 0.95, 0.97)
    world = World(drafter(ADAPTIVE), lambda index, position: (early if position < 2000 else late)[index])
    world.run(1000)
    assert world.one.choose(StepLoad(), 100).exit == 0
    world.run(2500)
    assert world.one.choose(StepLoad(), 100).exit == 1
    assert world.run(1500) >= 0.93 * best_in_hindsight(late)


def test_drafting_is_tried_again_after_a_while_where_exits_cannot_be_asked() -> None:
    sampling = replace(PLANNED, is_greedy=False)
    world = World(drafter(sampling), lambda _, position: 0.0 if position < 3000 else 0.95)
    world.run(2900)
    assert world.learning_seconds <= 0.03 * world.seconds
    world.run(6000)
    assert world.one.choose(StepLoad(), 100).length > 2


# Earlier text.


def looping(period: int) -> Callable[[int], int]:
    return lambda position: position % period


def test_text_that_repeats_is_drafted_and_other_text_is_not() -> None:
    settings = replace(ADAPTIVE, exits=(), uses_ngrams=True)
    again = World(drafter(settings), agreeing(), text=looping(30))
    again.run(100)
    assert again.run(500) > 4 / 13  # 13: seconds of a step
    chance = random.Random(1)
    new = [chance.randrange(10**6) for _ in range(3000)]
    fresh = World(drafter(settings), agreeing(), text=new.__getitem__)
    assert fresh.run(1000) == pytest.approx(1 / 13)


@pytest.mark.parametrize("num_requests", [16, 32])
def test_many_requests_draft_nothing_where_every_row_costs_as_much_as_the_first(num_requests: int) -> None:
    """Tokens that would be accepted two times of three, where a step's time grows with its rows: below full's speed."""
    chance = random.Random(3)
    words = [[1, 2, 3, chance.randrange(4, 6)] for _ in range(900)]
    text = [token for word in words for token in word]
    rising = tuple(float(rows) for rows in ROW_COUNTS)
    load = StepLoad(num_requests, num_requests)
    settings = replace(ADAPTIVE, uses_ngrams=True)
    world = World(drafter(settings, replace(COSTS, layer_seconds=rising)), agreeing(0.6, 0.7, 0.8), load=load)
    world.text = text.__getitem__
    world.run(400)
    full = 1 / world.one._rates.step_seconds(num_requests)
    assert world.run(2000) >= 0.97 * full


def test_both_take_what_promises_more() -> None:
    settings = replace(ADAPTIVE, uses_ngrams=True)
    world = World(drafter(settings), agreeing(0.5, 0.6, 0.7), text=looping(25))
    world.run(300)
    assert world.one.choose(StepLoad(), 100).tokens
    new = World(drafter(settings), agreeing(0.9, 0.6, 0.7))
    new.run(300)
    assert new.one.choose(StepLoad(), 100).exit == 0


def test_no_exit_begins_to_draft_while_another_request_waits_to_be_verified() -> None:
    one = drafter(PLANNED)
    assert one.choose(StepLoad(is_verifying=True), 100) == NO_DRAFT
    assert one.choose(StepLoad(), 100).exit == 0


# Across stages.


def test_guesses_across_stages_go_on_behind_drafts_and_learn() -> None:
    one = drafter(replace(ADAPTIVE, exits=(0,), uses_ngrams=True))
    one.extend([1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert one.guesses([4, 5], 2) == [6, 9]
    size_one = drafter(replace(ADAPTIVE, exits=(0,), uses_ngrams=True))
    size_one.extend([1, 2, 3, 1])
    assert size_one.guesses([], 2) == []  # one token says little: the exit's draft is waited for
    alone = drafter(replace(ADAPTIVE, exits=(), uses_ngrams=True))
    alone.extend([1, 2, 3, 1])
    assert alone.guesses([], 2) == [2, 3]
    for _ in range(20):
        one.extend([1, 2, 3])
        assert len(one.guesses([], 2)) in (0, 2)
        if one._guessed:
            one.compare("ngram", 8, False)
    assert one.guesses([], 2) == []
