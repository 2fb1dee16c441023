"""Where the loss of an exit is computed, and its gradients are taken: a strategy for each kind of pass.

    Deferred    training             in the backward pass of the hidden states that the exit reads
    Tuning      --tune-exit          at once: the layers are frozen, no gradient leaves the exit
    Postponed   a plan with exits    by an action of the plan, for which it keeps what one of the two above prepares
    Evaluation  validation, test     at once, without gradients
    Capture     hidden states for    not at all: what the exit reads is handed on
                --cache-hidden-states

`backpropagate` is the one place where exits learn. Exits that are distilled follow a teacher, which whoever runs a
`PendingExit` brings.

Source of the deferral: EE-LLM (arXiv:2312.04916), section 3. A stage back-propagates its own exit losses plus
<stopgrad(g), x>, with g the gradient that it receives from the next stage, so no schedule and no message changes.
Source of the tuning: EE-Tuning (arXiv:2402.00518).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron.early_exit.model.cross_entropy import LossSums, Teacher
from megatron.early_exit.model.exit_losses import FINAL, ExitLosses, ReachedExit


def backpropagate(
    losses: ExitLosses, hidden_states: Tensor, reached: ReachedExit, teacher: Teacher | None = None
) -> None:
    """Compute the loss of an exit over one microbatch, count it, and accumulate its gradients: in the exit's
    parameters, and in `hidden_states` (a leaf) if these want any. teacher: what a distilled exit follows."""
    assert teacher is not None or not losses.distils, "an exit runs before the final head that it follows"
    with torch.enable_grad():
        scale = losses.gradient_scale(reached.loss_mask)
        sums = reached.loss(hidden_states, scale, losses.draw_tokens(reached), teacher)
        losses.add_statistics(reached.index, sums.statistics)
        # Also at weight 0: DDP launches its overlapped reduction when every parameter has fired as often as in the
        # first iteration.
        if sums.objective.requires_grad:  # not of a tuned head that has nothing of its own
            torch.autograd.backward(sums.objective * (scale * losses.weights[reached.index]))


class PendingExit:
    """One exit's loss of one microbatch, whose gradients are taken once, later than the layer runs."""

    def __init__(self, losses: ExitLosses, hidden_states: Tensor, reached: ReachedExit, trains_layers: bool) -> None:
        """trains_layers: there is a gradient for the hidden states, which `take_gradient` gives."""
        leaf = hidden_states.detach().requires_grad_(trains_layers)

        def learn(teacher: Teacher | None) -> Tensor | None:
            with _own_random_stream(reached):
                backpropagate(losses, leaf, reached, teacher)
            return leaf.grad

        self._learn: Callable[[Teacher | None], Tensor | None] | None = learn
        self._gradient: Tensor | None = None

    def run(self, teacher: Teacher | None = None) -> None:
        """Take the gradients."""
        assert self._learn is not None, "an exit learns once from a microbatch"
        learn, self._learn = self._learn, None  # and with it the hidden states
        self._gradient = learn(teacher)

    def take_gradient(self) -> Tensor:
        """Gradient of the hidden states; the exit runs now if it has not."""
        if self._learn is not None:
            self.run()
        gradient, self._gradient = self._gradient, None
        assert gradient is not None, "the gradient of an exit is taken once"
        return gradient


class Deferred:
    """Exits learn in the backward pass: their loss is computed on detached hidden states, and its gradient added."""

    has_backward = True

    def __init__(self, losses: ExitLosses) -> None:
        self._losses = losses

    def at_exit(self, hidden_states: Tensor, reached: ReachedExit) -> Tensor:
        return self.prepare(hidden_states, reached)[0]

    def prepare(self, hidden_states: Tensor, reached: ReachedExit) -> tuple[Tensor, PendingExit]:
        """(hidden states that run the exit in their backward, the exit, which may be run before)"""
        pending = PendingExit(self._losses, hidden_states, reached, trains_layers=True)
        hidden_states = _AddGradient.apply(hidden_states, pending)
        # The schedule frees the data of what a stage sends, which must not be a view of what the exit keeps.
        return make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True), pending

    def at_final_head(self, hidden_states: Tensor, loss: Callable[[], LossSums]) -> Tensor:
        return _counted(self._losses, loss())


class Tuning:
    """Exits learn alone; what the final head would read is returned for those that follow it."""

    has_backward = False

    def __init__(self, losses: ExitLosses) -> None:
        self._losses = losses

    def at_exit(self, hidden_states: Tensor, reached: ReachedExit) -> Tensor:
        # In the random stream of the layer, in which core runs it.
        backpropagate(self._losses, hidden_states.detach(), reached)
        return hidden_states

    def prepare(self, hidden_states: Tensor, reached: ReachedExit) -> tuple[Tensor, PendingExit]:
        """(the hidden states, the exit)"""
        return hidden_states, PendingExit(self._losses, hidden_states, reached, trains_layers=False)

    def at_final_head(self, hidden_states: Tensor, loss: Callable[[], LossSums]) -> Tensor:
        return hidden_states


class Postponed:
    """Exits of one forward pass wait in `exits` for an action of a plan."""

    def __init__(self, strategy: Deferred | Tuning) -> None:
        """strategy: how they learn."""
        self._strategy = strategy
        self.has_backward = strategy.has_backward
        self.exits: list[PendingExit] = []

    def at_exit(self, hidden_states: Tensor, reached: ReachedExit) -> Tensor:
        hidden_states, pending = self._strategy.prepare(hidden_states, reached)
        self.exits.append(pending)
        return hidden_states

    def at_final_head(self, hidden_states: Tensor, loss: Callable[[], LossSums]) -> Tensor:
        return self._strategy.at_final_head(hidden_states, loss)


class Evaluation:
    """Losses over all tokens are counted, and nothing learns."""

    has_backward = False

    def __init__(self, losses: ExitLosses) -> None:
        self._losses = losses

    def at_exit(self, hidden_states: Tensor, reached: ReachedExit) -> Tensor:
        with torch.no_grad():
            one = torch.ones((), device=hidden_states.device)
            self._losses.add_statistics(reached.index, reached.loss(hidden_states, one).statistics)
        return hidden_states

    def at_final_head(self, hidden_states: Tensor, loss: Callable[[], LossSums]) -> Tensor:
        return _counted(self._losses, loss())


class Capture:
    """What exits and the final head read is handed to `receive`, under its name."""

    has_backward = False

    def __init__(self, receive: Callable[[str, Tensor], None]) -> None:
        self._receive = receive

    def at_exit(self, hidden_states: Tensor, reached: ReachedExit) -> Tensor:
        self._receive(reached.input_name, hidden_states)
        return hidden_states

    def at_final_head(self, hidden_states: Tensor, loss: Callable[[], LossSums]) -> Tensor:
        self._receive(FINAL, hidden_states)
        return hidden_states.new_zeros(())


def _counted(losses: ExitLosses, sums: LossSums) -> Tensor:
    """The final loss of one microbatch, which core's schedule scales and differentiates."""
    losses.add_statistics(losses.final_index, sums.statistics)
    return sums.objective


def _own_random_stream(reached: ReachedExit) -> AbstractContextManager[None]:
    """Core runs layers inside this fork, so that each TP rank draws other dropout for its part of the sequence; what
    runs later than its layer enters it again."""
    if not reached.head.config.sequence_parallel:
        return nullcontext()
    return tensor_parallel_random.get_cuda_rng_tracker().fork()


class _AddGradient(torch.autograd.Function):
    """Identity in forward; in backward adds the gradient of an exit's loss to the one from above."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, pending: PendingExit) -> Tensor:
        ctx.pending = pending
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        pending, ctx.pending = ctx.pending, None
        return grad_output + pending.take_gradient(), None
