"""From logits to a token: repetition penalty, temperature, top-k, top-p, and a draw from the request's own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference.params import SamplingSettings

# Most distributions reach top-p within this many tokens; sorting the whole vocabulary costs more than a small model.
_SORTED_FIRST = 512


class Sampler:
    """Draws the tokens of one request. All tensor-parallel ranks draw the same ones from the same logits."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        # On the CPU on every machine: a generator of the GPU would give other tokens for the same seed.
        self.generator = torch.Generator().manual_seed(settings.seed)

    def probabilities(self, logits: Tensor, history: Sequence[int], index: int) -> Tensor:
        """[vocabulary]: the distribution that the answer's token number `index` is drawn from, one-hot when greedy.

        logits: [vocabulary] fp32, -inf where a token must not be drawn; history: prompt and answer so far."""
        settings = self.settings
        logits = penalised(logits, history, settings.repetition_penalty)
        if settings.is_greedy:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        # From the largest on downwards, a quotient that overflows is a probability of 0.
        logits = (logits - logits.max()) / settings.temperature
        return restrict(logits, settings.top_k, settings.top_p_at(index)).softmax(-1)

    def draw(self, probabilities: Tensor) -> int:
        """A token from [vocabulary] weights, which need not add up to 1."""
        if self.settings.is_greedy:
            return int(probabilities.argmax())
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def sample(self, logits: Tensor, history: Sequence[int] = (), index: int = 0) -> int:
        """Draw one token; arguments as in `probabilities`."""
        return self.draw(self.probabilities(logits, history, index))

    def uniform(self) -> float:
        """A number between 0 and 1."""
        return torch.rand((), generator=self.generator).item()


def penalised(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """`logits` with tokens in `history` made less probable (CTRL, arXiv:1909.05858, as in transformers)."""
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)))
    values, largest = logits[seen], torch.finfo(logits.dtype).max
    changed = torch.where(values > 0, values / penalty, values * penalty).clamp(-largest, largest)
    return logits.index_copy(0, seen, torch.where(values.isinf(), values, changed))


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`logits` with -inf outside of the `top_k` largest, and then outside of the fewest that reach `top_p`.

    logits: [vocabulary]; 0 switches either off. At least one token stays."""
    if not top_k and not 0.0 < top_p < 1.0:
        return logits
    if top_k:
        values, ids = _largest(logits, min(top_k, logits.numel()))
        log_sum_exp = values.logsumexp(-1)
    else:
        log_sum_exp = logits.logsumexp(-1)
        values, ids = _largest(logits, min(_SORTED_FIRST, logits.numel()))
        if (values - log_sum_exp).exp().sum() < top_p:
            values, ids = _largest(logits, logits.numel())
    if 0.0 < top_p < 1.0:
        probs = (values - log_sum_exp).exp()
        is_needed = probs.cumsum(-1) - probs < top_p  # what comes before it does not reach top_p
        is_needed[0] = True
        values, ids = values[is_needed], ids[is_needed]
    return torch.full_like(logits, -torch.inf).scatter(0, ids, values)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest and their ids, in order; of equals the one with the smaller id comes first."""
    if count == logits.numel():
        return logits.sort(descending=True, stable=True)
    values, ids = logits.topk(count)
    # topk breaks ties as it likes: take all that are larger than the last, and of its equals those that come first.
    larger = ids[values > values[-1]]
    equal = (logits == values[-1]).nonzero()[: count - larger.numel(), 0]
    ids = torch.cat([larger, equal])
    values, order = logits[ids].sort(descending=True, stable=True)
    return values, ids[order]
