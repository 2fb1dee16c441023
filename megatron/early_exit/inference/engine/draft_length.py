"""What drafts promise, in tokens a second, and how many rows to have under way unverified.

Drafting with the model's own exits and sharing their KV cache: Zhang et al., arXiv:2309.08168, and LayerSkip,
arXiv:2404.16710.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import ExitDescription

_BISECTIONS = 10


@dataclass
class StepLoad:
    """What else runs in the step that is being put together; requests tell what they add to it."""

    num_requests: int = 1
    """That run, the one that asks included."""
    num_drafting: int = 1
    """Those of them that may draft with exits and verify together; the others run one row in every step."""
    extra_rows: int = 0
    """Rows of the step beyond one for each request."""
    extra_tokens: float = 0.0
    """What these promise."""
    num_longer: int = 0
    """Requests that have them: each may split the calls of attention."""
    is_drafting: bool = False
    """Whether an exit is drafting for some request. The others that speculate wait, and all verify together: one that
    runs all layers meanwhile would make every row of the drafts as slow as that."""
    is_verifying: bool = False
    """Whether a request waits for its drafts to be verified: no exit begins to draft in that step."""


class DraftRates:
    """Expected tokens a second of all requests that run, by what one of them drafts. Steps are remembered."""

    def __init__(self, costs: StepCosts, num_layers: int) -> None:
        self.costs, self._num_layers = costs, num_layers
        self._steps: dict[tuple[int, int, int], float] = {}
        self._rounds: dict[tuple[int, int, int, int, bool], float] = {}
        self._least_of_rows: dict[tuple[int, int, int, int], float] = {}
        self._least_of_exits: dict[tuple[int, float, int, int, int, bool], float] = {}

    def step_seconds(self, num_requests: int, extra_rows: int = 0, num_longer: int = 0) -> float:
        """A step in which each request runs a row through all layers, and `num_longer` of them `extra_rows` more."""
        key = num_requests, extra_rows, num_longer
        if key not in self._steps:
            costs, rows = self.costs, num_requests + extra_rows
            calls = min(1 + 2 * num_longer, num_requests)  # itself, and what lies behind it
            layers = self._num_layers * costs.layer(rows, num_requests, calls)
            self._steps[key] = layers + costs.final_head(rows) + costs.batch(rows)
        return self._steps[key]

    def _with_rows(self, load: StepLoad, length: int) -> float:
        """Seconds of the next step where a request adds a draft of this length to it."""
        num_longer = load.num_longer + (length > 0)
        return self.step_seconds(load.num_requests, load.extra_rows + length, num_longer)

    def of_rows(self, expected: Sequence[float], load: StepLoad) -> list[float]:
        """Where 0, 1, ... known drafts are verified in the next step. expected: tokens that each gives."""
        others = load.num_requests - 1 + load.extra_tokens
        return [(others + tokens) / self._with_rows(load, length) for length, tokens in enumerate(expected)]

    def least_of_rows(self, longest: int, load: StepLoad) -> float:
        """Known drafts of which the first is accepted less often pay at no length up to `longest`, however often the
        others are. Where steps are slow with many rows it is above 1."""
        key = longest, load.num_requests, load.extra_rows, load.num_longer
        if key not in self._least_of_rows:
            plain = self._with_rows(load, 0)
            self._least_of_rows[key] = min(
                (self._with_rows(load, length) / plain - 1.0) / length for length in range(1, longest + 1)
            )
        return self._least_of_rows[key] * (load.num_requests + load.extra_tokens)

    def of_exit(self, one: ExitDescription, expected: Sequence[float], load: StepLoad) -> list[float]:
        """Where an exit makes 0, 1, ... drafts, and as many for all requests that draft with exits."""
        plain = load.num_requests - load.num_drafting
        return [
            (load.num_drafting * tokens + (length + 1) * plain) / self.round_seconds(one, length, load)
            for length, tokens in enumerate(expected)
        ]

    def least_of_exit(self, one: ExitDescription, longest: int, load: StepLoad, least_gain: float = 0.0) -> float:
        """An exit's drafts that are accepted less often pay at no length up to `longest`; 1 if none ever do. What else
        the step has only makes drafting wait for more. least_gain: share of the tokens a second without drafts that
        they must add to pay."""
        key = longest, least_gain, one.depth, load.num_drafting, load.num_requests - load.num_drafting, one.has_block
        if key not in self._least_of_exits:
            least_rate = (1.0 + least_gain) * load.num_requests / self.step_seconds(load.num_requests)
            low, high = 0.0, 1.0
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                expected = list(itertools.accumulate(middle**length for length in range(longest + 1)))
                pays = max(self.of_exit(one, expected, load)[1:]) > least_rate
                low, high = (low, middle) if pays else (middle, high)
            self._least_of_exits[key] = low if high < 1.0 else 1.0
        return self._least_of_exits[key]

    def round_seconds(self, one: ExitDescription, length: int, load: StepLoad) -> float:
        """So many steps that draft, and one that verifies."""
        drafting, plain = load.num_drafting, load.num_requests - load.num_drafting
        key = one.depth, length, drafting, plain, one.has_block
        if key not in self._rounds:
            costs, both = self.costs, drafting + plain
            shallow, deep = one.depth + one.has_block, self._num_layers - one.depth
            # Drafts leave their batch, and join that in which they are verified.
            draft = shallow * costs.layer(both, both) + costs.approximate_head(drafting)
            draft += costs.batch(both) + costs.batch(drafting)
            if plain:  # they run on past the exit, with gaps between them
                draft += deep * costs.layer(plain, plain, min(plain, drafting + 1)) + costs.final_head(plain)
            verified, calls = drafting * (length + 1) + plain, both if length else 1
            verify = shallow * costs.layer(both, both) + deep * costs.layer(verified, both, calls)
            verify += costs.final_head(verified) + costs.batch(verified)
            if length:
                verify += costs.batch(drafting)
            self._rounds[key] = length * draft + verify
        return self._rounds[key]

    @cached_property
    def observed_exit_seconds(self) -> float:
        """To ask another exit about a row that is being verified."""
        costs = self.costs
        own_head = costs.exit_head(1) if costs.has_approximate_heads else 0.0
        return costs.approximate_head(1) + own_head + costs.batch(1)


class DraftWindow:
    """How many rows of a request may be on their way through the stages before the first of them is verified."""

    def __init__(self, fixed: int | None, num_stages: int, costs: StepCosts) -> None:
        """fixed: unverified drafts; None: what keeps the stages busy, and more where rows take a pass little time."""
        self._fixed, self._num_stages, self._costs = fixed, num_stages, costs

    def next(self, num_requests: int = 1) -> int:
        """Where so many requests run together; 1: nothing is drafted.

        All stages have work with as many rows on the way as there are stages. More rows are nearly free until a pass
        takes as long for its rows as for the weights, and more than one a stage are of no use to one request."""
        if self._fixed is not None:
            return self._fixed + 1
        least = math.ceil(self._num_stages / num_requests)
        cheap = self._num_stages * self._costs.balanced_rows / num_requests
        return max(least, round(min(cheap, self._num_stages)))
