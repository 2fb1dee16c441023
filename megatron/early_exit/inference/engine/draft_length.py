"""How many tokens to draft before all layers verify them, and how many rows to have under way unverified.

Drafting with the model's own exits and sharing their KV cache: Zhang et al., arXiv:2309.08168, and LayerSkip,
arXiv:2404.16710.
"""

from __future__ import annotations

import math

from megatron.early_exit.inference.costs import StepCosts

# The estimate starts from this many imagined drafts with this acceptance, and forgets old ones at this rate.
_PRIOR_TRIALS, _PRIOR_ACCEPTANCE, _KEPT = 4.0, 0.7, 0.97


class DraftLength:
    """How many tokens to draft: a given number, or the one that promises most tokens in a second."""

    def __init__(self, fixed: int | None, longest: int, exit_depth: int, num_layers: int, costs: StepCosts | None):
        """costs: what layers and heads take, needed unless `fixed` is given."""
        self._fixed, self._longest = fixed, longest
        self._depth, self._num_layers, self._costs = exit_depth, num_layers, costs
        self._trials, self._hits = 0.0, 0.0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a drafted token is accepted if those before it were."""
        return (self._hits + _PRIOR_TRIALS * _PRIOR_ACCEPTANCE) / (self._trials + _PRIOR_TRIALS)

    def next(self, num_requests: int = 1) -> int:
        """Tokens to draft now, where so many requests run together and are taken to draft as many; 0: run the full
        model, drafting costs more than it brings."""
        if self._fixed is not None:
            return self._fixed
        best = max(range(self._longest + 1), key=lambda length: self._tokens_per_second(length, num_requests))
        if best == 0:
            # Forget slowly, so that drafting is tried again.
            self._trials, self._hits = self._trials * _KEPT, self._hits * _KEPT
        return best

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn from one verification: the draft after the last accepted one was rejected, those after it untried."""
        tried = min(accepted + 1, drafted)
        kept = _KEPT**tried
        self._trials, self._hits = self._trials * kept + tried, self._hits * kept + accepted

    def _tokens_per_second(self, length: int, num_requests: int) -> float:
        """Of each request."""
        costs, acceptance, verified = self._costs, self.acceptance, num_requests * (length + 1)
        tokens = sum(acceptance**i for i in range(length + 1))
        shallow = (length + 1) * self._depth * costs.layer(num_requests) + length * costs.approximate_head(num_requests)
        deep = (self._num_layers - self._depth) * costs.layer(verified) + costs.final_head(verified)
        return tokens / (shallow + deep + (length + 1) * costs.batch_seconds)


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
