"""One iteration: forward and backward over all microbatches with core's schedule, then the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron.early_exit.data.batches import Batch
from megatron.early_exit.model.build import Model
from megatron.early_exit.model.exit_losses import ExitStrategy
from megatron.early_exit.model.exit_strategies import Deferred, Tuning
from megatron.early_exit.training.forward_step import forward_step
from megatron.early_exit.training.planned_pipeline import PlannedPipeline


class StepResult(NamedTuple):
    """What one optimizer step reports."""

    is_skipped: bool
    """The gradients overflowed (fp16) and the weights did not change."""
    grad_norm: float | None


def run_schedule(
    model: Model,
    iterators: list[Iterator[Batch] | None],
    strategy: ExitStrategy,
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
) -> None:
    """All microbatches of one iteration through core's schedule for this layout; losses are in `model.exit_losses`.

    iterators: one per chunk. strategy: what becomes of exits; without a backward the schedule runs forward only."""
    is_interleaved = len(model.wrapped) > 1
    with model.exit_losses.handled_by(strategy):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if is_interleaved else iterators[0],
            model=model.wrapped if is_interleaved else model.wrapped[0],
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=not strategy.has_backward,
        )


def tune_on_hidden_states(model: Model, iterator: Iterator[Batch] | None, num_microbatches: int) -> None:
    """All microbatches of one iteration through the exits of this rank, whose inputs come with the batches."""
    if iterator is None:  # no exits here
        return
    (chunk,) = model.chunks
    for _ in range(num_microbatches):
        batch = next(iterator)
        assert batch.hidden_states is not None, "samples of a cache come with hidden states"
        hidden_states = {name: value.transpose(0, 1).contiguous() for name, value in batch.hidden_states.items()}
        chunk.tune_exits(hidden_states, batch.labels, batch.loss_mask, batch.attention_mask)


def accumulate_gradients(
    model: Model,
    iterators: list[Iterator[Batch] | None],
    *,
    exit_weights: tuple[float, ...],
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    iteration: int = 0,
    has_hidden_states: bool = False,
    planned: PlannedPipeline | None = None,
) -> None:
    """Gradients of one global batch, reduced over the ranks: of everything, or of the exits if these are tuned.

    iteration: number of finished ones. has_hidden_states: batches bring what the frozen layers make of them, which do
    not run then. planned: follow its plan, not core's schedule; each iterator then draws as many batches as the plan
    has microbatches, fill included."""
    tunes, losses = model.tunes_exits, model.exit_losses
    losses.begin_iteration(num_microbatches, exit_weights, iteration)
    with torch.set_grad_enabled(not tunes):
        sizes = {
            "num_microbatches": num_microbatches, "micro_batch_size": micro_batch_size, "seq_length": seq_length
        }  # fmt: skip
        if has_hidden_states:
            tune_on_hidden_states(model, iterators[0], num_microbatches)
        elif planned is not None:
            planned.run(iterators, **sizes)
        else:
            run_schedule(model, iterators, Tuning(losses) if tunes else Deferred(losses), **sizes)
    if tunes:
        finalize_model_grads(model.wrapped)  # forward-only schedules leave it out


def train_step(
    model: Model,
    optimizer: MegatronOptimizer,
    iterators: list[Iterator[Batch] | None],
    *,
    exit_weights: tuple[float, ...],
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    iteration: int = 0,
    has_hidden_states: bool = False,
    planned: PlannedPipeline | None = None,
) -> StepResult:
    """Gradients of one global batch and one optimizer step; arguments as of `accumulate_gradients`."""
    model.zero_gradients()
    optimizer.zero_grad()
    accumulate_gradients(
        model,
        iterators,
        exit_weights=exit_weights,
        num_microbatches=num_microbatches,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        iteration=iteration,
        has_hidden_states=has_hidden_states,
        planned=planned,
    )
    is_successful, grad_norm, _ = optimizer.step()
    return StepResult(not is_successful, grad_norm)
