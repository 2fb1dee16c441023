"""Self-speculative decoding: an exit drafts, all layers verify, and the answer follows the full model's distribution.

Source of the rule: Leviathan et al., arXiv:2211.17192, and Chen et al., arXiv:2302.01318. Drafting with the model's own
exits and sharing their KV cache: Zhang et al., arXiv:2309.08168, and LayerSkip, arXiv:2404.16710.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron.early_exit.inference.engine.costs import StepCosts
from megatron.early_exit.inference.worker.sampling import Sampler


class Draft(NamedTuple):
    """A token that waits for verification."""

    token: int
    probabilities: Tensor | None
    """[vocabulary], what it was drawn from; None: it was the most probable token of greedy decoding."""


def verify(draft: Draft, probabilities: Tensor, sampler: Sampler) -> tuple[bool, int]:
    """(whether the draft is accepted, the token that takes its place in the answer).

    probabilities: [vocabulary], what the full model draws this token from. Accepted with probability
    min(1, p(draft) / q(draft)), else replaced by a token drawn from max(p - q, 0): the result is distributed as p.
    One-hot distributions make this greedy equality."""
    if draft.probabilities is None:
        best = int(probabilities.argmax())
        return best == draft.token, best
    p, q = probabilities[draft.token], draft.probabilities[draft.token]
    if sampler.uniform() * q < p:
        return True, draft.token
    rest = (probabilities - draft.probabilities).clamp_(min=0.0)
    # Where p and q are equal but for rounding nothing is left to draw from, and any draw from p is right.
    return False, sampler.draw(rest if rest.sum() > 0 else probabilities)


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
        shallow = (length + 1) * self._depth * costs.layer(num_requests) + length * costs.probe(num_requests)
        deep = (self._num_layers - self._depth) * costs.layer(verified) + costs.final_head(verified)
        return tokens / (shallow + deep + (length + 1) * costs.batch_seconds)
