"""Next-token distributions of one head for a batch of rows, with the vocabulary split over tensor-parallel ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

# exp of it is still a normal number in fp32.
_SMALLEST = -80.0


class HeadOutput:
    """softmax(logits) over the tokenizer's ids, or over a shortlist of them, for each of some rows.

    Ids that pad the embedding have probability 0. Every tensor-parallel rank must make the same calls; all get equal
    numbers, bit for bit, so that all take the same decisions.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        vocab_size: int,
        tp: TensorParallel,
        ids: Tensor | None = None,
        num_ids: int | None = None,
    ) -> None:
        """logits: [rows, padded vocabulary / tp], any float type; vocab_size: ids of the tokenizer. Over a shortlist:
        [rows, shortlist / tp], and the id of each column; columns from `num_ids` on are padding."""
        self._tp, self._vocab_size, self._ids = tp, vocab_size, ids
        self._local_logits = logits.float()
        first_id = tp.rank * logits.size(1)
        num_columns = max(vocab_size - first_id, 0) if ids is None else num_ids
        if num_columns < logits.size(1):
            self._local_logits[:, num_columns:] = -torch.inf
        max_logit, column = self._local_logits.max(1)
        token = column + first_id if ids is None else ids[column]
        # A rank of padding only has no finite logit. Numbers below the clamp add nothing, but would make exp return
        # denormal numbers, with which processors are slow.
        shifted = self._local_logits - max_logit.clamp(min=torch.finfo(torch.float32).min)[:, None]
        sum_exp = shifted.clamp_(min=_SMALLEST).exp_().sum(1)
        local = torch.stack([max_logit.double(), sum_exp.double(), token.double()])
        self._full_logits: Tensor | None = None
        self._rows = [_combine(numbers) for numbers in zip(*_gather(local.t(), tp), strict=True)]

    def is_finite(self, row: int) -> bool:
        """Whether the row's logits are numbers: weights with NaN, or an overflow, make them otherwise."""
        return math.isfinite(self._rows[row][1])

    def token(self, row: int) -> int:
        """The most probable id."""
        return self._rows[row][2]

    def confidence(self, row: int) -> float:
        """The largest probability."""
        return math.exp(self.max_log_prob(row))

    def max_log_prob(self, row: int) -> float:
        """Log-probability (nats) of `token`."""
        max_logit, log_sum_exp, _ = self._rows[row]
        return min(max_logit - log_sum_exp, 0.0)

    def logits(self, row: int) -> Tensor:
        """[vocabulary, padded or not] on every rank, fp32 on the CPU, -inf for padding and for what is not on the
        shortlist: what a sampler reads.

        The first call gathers the rows of all ranks."""
        if self._full_logits is None:
            logits = torch.cat(self._tp.gather(self._local_logits), 1).cpu()
            if self._ids is not None:
                ids = torch.cat(self._tp.gather(self._ids)).cpu()
                # Padding columns say -inf of an id that another column may know more about.
                logits = logits.new_full((len(logits), self._vocab_size), -torch.inf).scatter_reduce_(
                    1, ids.expand(len(logits), -1), logits, "amax"
                )
            self._full_logits = logits
        return self._full_logits[row]

    def log_probs(self, row: int) -> Tensor:
        """[vocabulary] on every rank, fp32 on the CPU; as `logits`."""
        return self.logits(row) - self._rows[row][1]


def _gather(local: Tensor, tp: TensorParallel) -> list[list[list[float]]]:
    """Every rank's [rows, 3] numbers. A gather, since the order in which an all-reduce adds may differ by rank."""
    return torch.stack(tp.gather(local)).tolist()


def _combine(ranks: tuple[list[float], ...]) -> tuple[float, float, int]:
    """(largest logit, log-sum-exp, most probable id) from each rank's largest logit, sum of exp(logit - it) and id."""
    max_logit, _, token = max(ranks, key=lambda numbers: numbers[0])  # the first of equals, as argmax
    if not math.isfinite(max_logit) or not all(math.isfinite(numbers[1]) for numbers in ranks):
        return math.nan, math.nan, 0
    sum_exp = sum(sum_exp * math.exp(rank_max - max_logit) for rank_max, sum_exp, _ in ranks)
    return max_logit, max_logit + math.log(sum_exp), int(token)
