"""The losses of a model's exits: their scale in the objective, their deferral to the backward pass, their statistics.

Source of the deferral: EE-LLM (arXiv:2312.04916), section 3. A stage back-propagates its own exit losses plus
<stopgrad(g), x>, with g the gradient that it receives from the next stage, so no schedule and no message changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from megatron.core.tensor_parallel import random as tensor_parallel_random
from torch import Tensor

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.model.cross_entropy import NUM_STATISTICS, LossSums, Teacher
from megatron.early_exit.model.token_sampling import SampledTokens, draw_tokens

FINAL = "final"
"""Name of the hidden states that the final output projection reads, among those that can be captured."""


class ExitLosses:
    """What is constant for all microbatches of an iteration, and the sums of what they report.

    One object per rank, shared by its model chunks. Nothing of a single microbatch is kept here: under recomputation a
    layer runs again when another microbatch is current.

    statistics: [exits + 1, NUM_STATISTICS], fp64: for every exit in order, and last for the final head, sums as of
    `LossSums.statistics` since `reset_statistics`. Where an exit learns from some of the tokens, these are what is
    counted, unscaled.
    """

    def __init__(
        self,
        exits: ExitConfig,
        calculate_per_token_loss: bool,
        device: torch.device,
        distillation_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        """distillation_share: of the loss of exits that are tuned, the part that follows the final head. seed: of the
        tokens that exits learn from."""
        self.exits = exits
        self._seed, self._iteration = seed, 0
        self.distillation_share = distillation_share
        self._teacher: Teacher | None = None
        self.calculate_per_token_loss = calculate_per_token_loss
        self.weights: tuple[float, ...] = exits.weights_at(0)
        self.num_microbatches = 1
        self.grad_scale_func: Callable[[Tensor], Tensor] | None = None
        self.is_tuning = False
        self.capture: Callable[[str, Tensor], None] | None = None
        """Called with what exits read and its name (`layer.exit_input`) if it is set; exits then compute nothing."""
        self.deferred_exits: list[EarlyExit] | None = None
        """If a list, exits of the forward pass that runs now are put there, and may run before their backward."""
        self.statistics = torch.zeros(exits.num_exits + 1, NUM_STATISTICS, dtype=torch.float64, device=device)

    @property
    def distils(self) -> bool:
        """Whether exits that are tuned follow the final head."""
        return self.distillation_share > 0

    @property
    def final_index(self) -> int:
        """Row of the final head in `statistics`."""
        return self.exits.num_exits

    def begin_iteration(
        self,
        num_microbatches: int,
        weights: tuple[float, ...] | None = None,
        grad_scale_func: Callable[[Tensor], Tensor] | None = None,
        is_tuning: bool = False,
        iteration: int = 0,
    ) -> None:
        """Set what holds for the next call of the schedule. grad_scale_func: the optimizer's `scale_loss`, or None.
        is_tuning: layers run without gradients, and every exit's gradients are taken where its loss is (`tune`).
        iteration: number of finished ones, on which the tokens that exits learn from depend."""
        self.is_tuning = is_tuning
        self._iteration = iteration
        self.num_microbatches = num_microbatches
        self.weights = self.exits.weights_at(0) if weights is None else weights
        self.grad_scale_func = grad_scale_func

    def draw_tokens(self, exit_index: int, labels: Tensor, loss_mask: Tensor) -> SampledTokens | None:
        """The tokens of a microbatch that an exit learns from in this iteration; None: all.

        labels, loss_mask: [b, s]"""
        fraction = self.exits.token_fraction_of(exit_index)
        if fraction == 1.0:
            return None
        return draw_tokens(labels, loss_mask, fraction, (self._seed, self._iteration, exit_index))

    def gradient_scale(self, loss_mask: Tensor) -> Tensor:
        """Factor between a sum of token losses and the objective whose gradient is taken: loss scale, mean over the
        microbatch's tokens, mean over microbatches. Core applies the same to the final loss. loss_mask: [b, s]."""
        scale = torch.ones((), device=loss_mask.device)
        if not self.calculate_per_token_loss:
            scale = scale / (loss_mask.sum().clamp(min=1) * self.num_microbatches)
        return self.grad_scale_func(scale) if self.grad_scale_func is not None else scale

    def add_statistics(self, exit_index: int, statistics: Tensor) -> None:
        """Count one microbatch of an exit. Each microbatch is counted once: by the deferred loss in training, by
        the forward pass in validation."""
        self.statistics[exit_index] += statistics

    def reset_statistics(self) -> None:
        self.statistics.zero_()

    def defer(
        self,
        hidden_states: Tensor,
        exit_index: int,
        loss_mask: Tensor,
        compute: Callable[[Tensor, Tensor], LossSums],
        is_sequence_parallel: bool = False,
    ) -> Tensor:
        """Return `hidden_states` unchanged; the exit's loss is computed, and its gradients added, in their backward.

        compute: (hidden states, gradient scale) -> the exit's loss; runs on detached hidden states with gradients on.
        """

        def backpropagate(hidden_states: Tensor) -> None:
            scale = self.gradient_scale(loss_mask)
            sums = compute(hidden_states, scale)
            self.add_statistics(exit_index, sums.statistics)
            # Also at weight 0: DDP launches its overlapped reduction when every parameter has fired as often as in
            # the first iteration.
            torch.autograd.backward(sums.objective * (scale * self.weights[exit_index]))

        def backpropagate_in_own_stream(hidden_states: Tensor) -> None:
            with _own_random_stream(is_sequence_parallel):
                backpropagate(hidden_states)

        early = EarlyExit(hidden_states, backpropagate_in_own_stream)
        if self.deferred_exits is not None:
            self.deferred_exits.append(early)
        return _DeferredLoss.apply(hidden_states, early)

    def tune(
        self,
        hidden_states: Tensor,
        exit_index: int,
        loss_mask: Tensor,
        compute: Callable[..., LossSums],
        is_sequence_parallel: bool = False,
    ) -> None:
        """Back-propagate the exit's loss now, into its own parameters alone; arguments as of `defer`.

        Source: EE-Tuning (arXiv:2402.00518). With the layers frozen no gradient leaves the exit, so nothing of it is
        deferred to a backward pass. Exits that distil run under `following`."""
        hidden_states = hidden_states.detach()

        def backpropagate() -> None:
            assert self._teacher is not None or not self.distils, "an exit runs before the final head that it follows"
            with torch.enable_grad():
                scale = self.gradient_scale(loss_mask)
                sums = compute(hidden_states, scale, teacher=self._teacher)
                self.add_statistics(exit_index, sums.statistics)
                if sums.objective.requires_grad:  # not of a head that has nothing of its own
                    torch.autograd.backward(sums.objective * (scale * self.weights[exit_index]))

        def backpropagate_later(_: Tensor) -> None:
            with _own_random_stream(is_sequence_parallel):
                backpropagate()

        if self.deferred_exits is not None:
            self.deferred_exits.append(EarlyExit(hidden_states, backpropagate_later))
        else:
            backpropagate()

    @contextmanager
    def following(self, hidden_states: Tensor, weight: Tensor) -> Iterator[None]:
        """Exits that are tuned inside follow the final head. hidden_states: what its output projection reads of their
        microbatch, [s, b, h], or this TP rank's part; weight: of this projection, [vocabulary / tp, h]."""
        self._teacher = Teacher(hidden_states.detach(), weight.detach(), self.distillation_share)
        try:
            yield
        finally:
            self._teacher = None

    def evaluate(self, hidden_states: Tensor, exit_index: int, compute: Callable[[Tensor, Tensor], LossSums]) -> None:
        """Count the loss of one microbatch now: in validation there is no backward pass."""
        with torch.no_grad():
            one = torch.ones((), device=hidden_states.device)
            self.add_statistics(exit_index, compute(hidden_states, one).statistics)


def _own_random_stream(is_sequence_parallel: bool) -> AbstractContextManager:
    """Core runs layers inside this fork, so that each TP rank draws other dropout for its part of the sequence; what
    runs later than its layer enters it again."""
    return tensor_parallel_random.get_cuda_rng_tracker().fork() if is_sequence_parallel else nullcontext()


class EarlyExit:
    """One exit's loss of one microbatch, whose gradients are taken once: in the backward pass, or before it."""

    def __init__(self, hidden_states: Tensor, backpropagate: Callable[[Tensor], None]) -> None:
        self._hidden_states: Tensor | None = hidden_states.detach()
        self._backpropagate: Callable[[Tensor], None] | None = backpropagate
        self._gradient: Tensor | None = None

    def run(self) -> None:
        """Take the gradients; that of the hidden states is added in the backward pass."""
        hidden_states = self._hidden_states.requires_grad_()
        with torch.enable_grad():
            self._backpropagate(hidden_states)
        self._gradient = hidden_states.grad
        self._hidden_states = self._backpropagate = None

    def take_gradient(self) -> Tensor:
        """Gradient of the hidden states; the exit runs now if it has not."""
        if self._gradient is None:
            self.run()
        gradient, self._gradient = self._gradient, None
        return gradient


class _DeferredLoss(torch.autograd.Function):
    """Identity in forward; in backward adds the gradient of a loss of the hidden states to the one from above."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, early: EarlyExit) -> Tensor:
        ctx.early = early
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        early, ctx.early = ctx.early, None
        return grad_output + early.take_gradient(), None


def is_checkpointed_forward() -> bool:
    """Whether core is in the first, gradient-free pass of a checkpointed layer (the layer will run again)."""
    return tensor_parallel_random.is_checkpointing() and not torch.is_grad_enabled()
