"""Cross-entropy of an output projection, computed over chunks of tokens against the TP-sharded weight.

Loss and gradients come from the same pass over a chunk, so the logits of one chunk are all that ever exists of them:
memory does not grow with the sequence. Used for every exit and for the final head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ReduceOp

from megatron.early_exit.model.sizes import chunk_size

NUM_STATISTICS = 4
"""Sums that are reported of every head."""


class LossSums(NamedTuple):
    """Sums over the unmasked tokens of one microbatch."""

    objective: Tensor
    """What to differentiate: sum of mask * token weight * loss (nats), a scalar."""

    statistics: Tensor
    """[NUM_STATISTICS], fp64, without gradient: sum of loss (unweighted), number of tokens, number of correct top-1
    predictions, sum of the divergence from the teacher (unweighted; 0 without one)."""


class Teacher(NamedTuple):
    """A head whose distribution is to be met beside the labels."""

    hidden_states: Tensor
    """Hidden states of the teacher, as those of the student; without gradient."""
    weight: Tensor
    """[vocabulary / tp, h]"""
    share: float
    """Share of the divergence from the teacher, KL(teacher || student), in the loss; the rest is the cross-entropy."""


def cross_entropy_sums(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    teacher: Teacher | None = None,
    tp_group: torch.distributed.ProcessGroup,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    weigh_by_confidence: bool = False,
    gradient_scale: Tensor | float = 1.0,
    chunk_tokens: int | None = None,
) -> LossSums:
    """Cross-entropy of `softmax(hidden_states @ weight.T / temperature)` against `labels`, summed over tokens.

    hidden_states: [s, b, h] ([s / tp, b, h] with sequence_parallel); weight: [vocabulary / tp, h]; labels, loss_mask:
    [b, s]. With `weigh_by_confidence` each token's loss is multiplied by its largest probability over the full
    vocabulary, without gradient (EE-Tuning's dynamic token weights, arXiv:2402.00518).
    `teacher`: what the objective follows as well.
    `gradient_scale`: about the factor that the objective will be multiplied with before backward. It changes no result
    but where rounding happens: gradients are stored in the dtype of the hidden states, and fp16 needs them scaled.
    """
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
    if teacher is not None:
        whole = whole_hidden_states(teacher, tp_group, sequence_parallel)
        teacher = teacher._replace(hidden_states=whole.flatten(0, 1))
    return cross_entropy_of_rows(
        hidden_states.flatten(0, 1),
        weight,
        # [b, s] -> [s * b]: the order of the hidden states. No copy of the hidden states is made.
        labels.t().reshape(-1),
        loss_mask.t().reshape(-1).float(),
        teacher=teacher,
        tp_group=tp_group,
        temperature=temperature,
        weigh_by_confidence=weigh_by_confidence,
        gradient_scale=gradient_scale,
        chunk_tokens=chunk_tokens,
    )


@torch.no_grad()
def whole_hidden_states(teacher: Teacher, tp_group: torch.distributed.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """[s, b, h] of a teacher whose sequences TP ranks may share."""
    if not sequence_parallel:
        return teacher.hidden_states
    return gather_from_sequence_parallel_region(teacher.hidden_states, group=tp_group)


def cross_entropy_of_rows(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    teacher: Teacher | None = None,
    tp_group: torch.distributed.ProcessGroup,
    temperature: float = 1.0,
    weigh_by_confidence: bool = False,
    gradient_scale: Tensor | float = 1.0,
    chunk_tokens: int | None = None,
) -> LossSums:
    """`cross_entropy_sums` of tokens that all TP ranks hold: hidden_states (and those of the teacher) [tokens, h];
    labels, loss_mask: [tokens].

    The gradient of the hidden states is this TP rank's part of a sum, which is the caller's to take."""
    objective, statistics = _ChunkedCrossEntropy.apply(
        hidden_states,
        weight,
        labels,
        loss_mask,
        tp_group,
        temperature,
        weigh_by_confidence,
        gradient_scale,
        chunk_tokens or chunk_size(weight.size(0), is_gpu=weight.is_cuda),
        torch.is_grad_enabled(),  # inside the function it is always off
        teacher,
    )
    return LossSums(objective, statistics)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, for an upstream gradient of `gradient_scale`; backward rescales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        tp_group: torch.distributed.ProcessGroup,
        temperature: float,
        weigh_by_confidence: bool,
        gradient_scale: Tensor | float,
        chunk_tokens: int,
        is_grad_enabled: bool,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden_states.size(0)
        first_id = tp_group.rank() * weight.size(0)
        needs_hidden_grad, needs_weight_grad = (needed and is_grad_enabled for needed in ctx.needs_input_grad[:2])
        hidden_grad = torch.empty_like(hidden_states) if needs_hidden_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight_grad else None
        losses, token_weights, correct, divergences = [], [], [], []  # per token, a tensor for each chunk
        label_share = 1.0 if teacher is None else 1.0 - teacher.share

        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, num_tokens))
            chunk = hidden_states[rows]
            logits = chunk @ weight.t()
            chunk_labels = labels[rows] - first_id
            is_local = (chunk_labels >= 0) & (chunk_labels < weight.size(0))
            chunk_labels = chunk_labels.clamp(0, weight.size(0) - 1)

            # Logits are large: each of the steps below reads and writes all of a chunk's as few times as it can.
            max_logit = logits.amax(dim=-1).float()
            _all_reduce(max_logit, ReduceOp.MAX, tp_group)
            logits = _less(logits, max_logit)
            if temperature != 1.0:
                logits /= temperature
            label_logit = logits.gather(1, chunk_labels[:, None]).squeeze(1)
            label_logit = torch.where(is_local, label_logit, 0.0)
            if teacher is not None:
                probabilities, divergence = _teach(teacher, rows, logits, tp_group)
            exp = logits.exp_()
            sums = torch.stack([exp.sum(dim=-1), label_logit])
            _all_reduce(sums, ReduceOp.SUM, tp_group)
            sum_exp, label_logit = sums

            losses.append(sum_exp.log() - label_logit)
            divergences.append(torch.zeros_like(sum_exp) if teacher is None else divergence + sum_exp.log())
            # The largest logit is 0 now: the label is the prediction where its logit is 0, and the largest
            # probability is exp(0) / sum_exp.
            correct.append(label_logit >= 0)
            token_weight = 1.0 / sum_exp if weigh_by_confidence else torch.ones_like(sum_exp)
            token_weights.append(token_weight)

            if needs_hidden_grad or needs_weight_grad:
                # d loss / d logits = (softmax - onehot) / temperature, times the weight of the token; towards a teacher
                # its probabilities stand beside the one-hot label.
                row_scale = loss_mask[rows] * token_weight * gradient_scale / temperature
                at_label = torch.where(is_local, -label_share * sum_exp, 0.0)
                exp.scatter_add_(1, chunk_labels[:, None], at_label[:, None])
                if teacher is not None:
                    exp.sub_(probabilities.mul_((teacher.share * sum_exp)[:, None]))
                grad = exp if exp.dtype == hidden_states.dtype else torch.empty_like(exp, dtype=hidden_states.dtype)
                torch.mul(exp, (row_scale / sum_exp)[:, None], out=grad)
                if hidden_grad is not None:
                    torch.mm(grad, weight, out=hidden_grad[rows])
                if weight_grad is not None:
                    if weight.dtype == torch.float32:
                        weight_grad.addmm_(grad.t(), chunk)
                    else:
                        weight_grad += grad.t() @ chunk
                del grad
            del logits, exp  # before the next chunk's are made
            if teacher is not None:
                del probabilities

        loss, divergence = torch.cat(losses), torch.cat(divergences)
        both = loss if teacher is None else label_share * loss + teacher.share * divergence
        objective = (loss_mask * torch.cat(token_weights) * both).sum()
        counted = (loss, torch.ones_like(loss), torch.cat(correct), divergence)
        statistics = torch.stack([(loss_mask * one).sum() for one in counted]).double()
        ctx.mark_non_differentiable(statistics)
        ctx.gradient_scale = gradient_scale
        ctx.weight_dtype = weight.dtype
        ctx.hidden_grad, ctx.weight_grad = hidden_grad, weight_grad
        return objective, statistics

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_objective / ctx.gradient_scale
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad = ctx.weight_grad = None
        if hidden_grad is not None:
            hidden_grad.mul_(factor)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(factor).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, *(None,) * 9


def _less(logits: Tensor, max_logit: Tensor) -> Tensor:
    """fp32, [tokens, vocabulary / tp]: `logits` less the largest of each row, in place if they are fp32."""
    if logits.dtype == torch.float32:
        return logits.sub_(max_logit[:, None])
    return logits - max_logit[:, None]


def _teach(
    teacher: Teacher, rows: slice, student_logits: Tensor, tp_group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(teacher's probabilities of this rank's ids [tokens, vocabulary / tp], KL(teacher || student) [tokens] but for
    the student's log-sum-exp). student_logits: less their maximum"""
    logits = (teacher.hidden_states[rows] @ teacher.weight.t()).float()
    max_logit = logits.amax(dim=-1)
    _all_reduce(max_logit, ReduceOp.MAX, tp_group)
    logits.sub_(max_logit[:, None])
    probabilities = logits.exp()
    sum_exp = probabilities.sum(dim=-1)
    _all_reduce(sum_exp, ReduceOp.SUM, tp_group)
    probabilities.div_(sum_exp[:, None])
    log_probabilities = logits.sub_(sum_exp.log()[:, None])
    divergence = log_probabilities.sub_(student_logits).mul_(probabilities).sum(dim=-1)  # in place: these are large
    _all_reduce(divergence, ReduceOp.SUM, tp_group)
    return probabilities, divergence


def _all_reduce(tensor: Tensor, op: ReduceOp.RedOpType, group: torch.distributed.ProcessGroup) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, op=op, group=group)
