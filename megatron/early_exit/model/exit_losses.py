"""What the losses of a model's exits share: what is constant in an iteration, the sums that are reported, and the
strategy that decides what becomes of an exit that a forward pass reaches (`exit_strategies.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.model.cross_entropy import NUM_STATISTICS, LossSums, Teacher
from megatron.early_exit.model.exit_head import ExitHead
from megatron.early_exit.model.token_sampling import SampledTokens, draw_tokens

FINAL = "final"
"""Name of the hidden states that the final output projection reads, among those that can be captured."""


@dataclass(frozen=True)
class ReachedExit:
    """An exit that a microbatch has reached: all that its loss needs but the hidden states that it reads."""

    head: ExitHead
    input_name: str
    """Name of these hidden states; exits of several kinds may read the same ones."""
    labels: Tensor
    """[b, s]"""
    loss_mask: Tensor
    """[b, s]"""
    head_arguments: Mapping[str, Any]
    """What the head takes beside hidden states, labels and mask."""

    @property
    def index(self) -> int:
        """Among the exits of the model."""
        return self.head.spec.exit_index

    def loss(
        self,
        hidden_states: Tensor,
        gradient_scale: Tensor,
        tokens: SampledTokens | None = None,
        teacher: Teacher | None = None,
    ) -> LossSums:
        """Arguments as of `ExitHead.loss`."""
        return self.head.loss(
            hidden_states, self.labels, self.loss_mask, gradient_scale, tokens=tokens, teacher=teacher,
            **self.head_arguments,
        )  # fmt: skip


class ExitStrategy(Protocol):
    """What becomes of exits, and of the final head, in the passes that run now."""

    @property
    def has_backward(self) -> bool:
        """Whether the passes have a backward; core's schedules run forward only where they have none."""
        ...

    def at_exit(self, hidden_states: Tensor, reached: ReachedExit) -> Tensor:
        """Called by the layer with what its exit reads, [s, b, h] or this TP rank's part; returns what it goes on
        with, of the same values."""
        ...

    def at_final_head(self, hidden_states: Tensor, loss: Callable[[], LossSums]) -> Tensor:
        """Called by the last stage with what the final output projection reads; returns what the stage returns. loss:
        computes that of the microbatch."""
        ...


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
        self.calculate_per_token_loss = calculate_per_token_loss
        self.distillation_share = distillation_share
        self._seed, self._iteration = seed, 0
        self._strategy: ExitStrategy | None = None
        self.weights: tuple[float, ...] = exits.weights_at(0)
        self.num_microbatches = 1
        self.grad_scale_func: Callable[[Tensor], Tensor] | None = None
        """The optimizer's `scale_loss`."""
        self.statistics = torch.zeros(exits.num_exits + 1, NUM_STATISTICS, dtype=torch.float64, device=device)

    @property
    def distils(self) -> bool:
        """Whether exits that are tuned follow the final head."""
        return self.distillation_share > 0

    @property
    def final_index(self) -> int:
        """Row of the final head in `statistics`."""
        return self.exits.num_exits

    # -- What becomes of exits

    @property
    def strategy(self) -> ExitStrategy:
        """Of the pass that runs now."""
        assert self._strategy is not None, "a pass with labels runs outside of `handled_by`"
        return self._strategy

    @contextmanager
    def handled_by(self, strategy: ExitStrategy) -> Iterator[None]:
        """Exits that are reached inside are the strategy's; one inside another takes its place."""
        before, self._strategy = self._strategy, strategy
        try:
            yield
        finally:
            self._strategy = before

    # -- What is constant in an iteration

    def begin_iteration(
        self,
        num_microbatches: int,
        weights: tuple[float, ...] | None = None,
        iteration: int = 0,
    ) -> None:
        """Set what holds for the next call of the schedule. weights: of the exits' losses in the objective. iteration:
        number of finished ones, on which the tokens that exits learn from depend."""
        self._iteration = iteration
        self.num_microbatches = num_microbatches
        self.weights = self.exits.weights_at(0) if weights is None else weights

    def draw_tokens(self, reached: ReachedExit) -> SampledTokens | None:
        """The tokens of a microbatch that an exit learns from in this iteration; None: all."""
        fraction = self.exits.token_fraction_of(reached.index)
        if fraction == 1.0:
            return None
        return draw_tokens(reached.labels, reached.loss_mask, fraction, (self._seed, self._iteration, reached.index))

    def gradient_scale(self, loss_mask: Tensor) -> Tensor:
        """Factor between a sum of token losses and the objective whose gradient is taken: loss scale, mean over the
        microbatch's tokens, mean over microbatches. Core applies the same to the final loss. loss_mask: [b, s]."""
        scale = torch.ones((), device=loss_mask.device)
        if not self.calculate_per_token_loss:
            scale = scale / (loss_mask.sum().clamp(min=1) * self.num_microbatches)
        return self.grad_scale_func(scale) if self.grad_scale_func is not None else scale

    # -- What is reported

    def add_statistics(self, index: int, statistics: Tensor) -> None:
        """Count one microbatch of an exit, or of the final head. Each microbatch is counted once: where the exit's
        gradients are taken, or in an evaluation's forward pass."""
        self.statistics[index] += statistics

    def reset_statistics(self) -> None:
        self.statistics.zero_()
