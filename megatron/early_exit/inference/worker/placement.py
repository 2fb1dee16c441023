"""Where a rank stands in a model that is spread over several: which stage, and with whom it shares the stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # it imports torch, which not every rank of a test needs
    from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel


class Placement(Protocol):
    """What a rank that makes its worker may ask; all ranks of all stages make the same calls in the same order, as far
    as they get."""

    stage: int
    """Pipeline stage of this rank, from 0."""

    def join(self) -> TensorParallel:
        """The ranks that share the weights of this stage. Called once."""

    def smallest(self, value: int) -> int:
        """The smallest of what all ranks of all stages give."""


class AlonePlacement:
    """That of the only rank."""

    stage = 0

    def join(self) -> TensorParallel:
        from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

        return TensorParallel()

    def smallest(self, value: int) -> int:
        return value
