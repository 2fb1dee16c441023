"""Executes a plan: this rank's passes over its model chunks, and its messages, in the plan's order.

What a plan can have and core's schedules cannot: exits that run while a stage waits (X), and microbatches beyond the
batch that pass through some stages only (partial; `rank_plan` says how much each counts). Everything else (precision,
loss scale, recomputation, gradient reduction) is core's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.early_exit.platform.device import use_cuda
from megatron.early_exit.schedules.iteration import Batches, Iteration, RankModel
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.plan_checks import validate
from megatron.early_exit.schedules.rank_plan import RankPlan
from megatron.early_exit.schedules.simulate import TimedAction


class PlanRuntime:
    """This rank's part of one plan."""

    def __init__(self, plan: Plan, rank: int, model: RankModel, exit_stages: Collection[int]) -> None:
        """rank: of this process in its pipeline. exit_stages: stages that own exits, of all ranks.

        Raises ValueError if the plan is not valid (`plan_checks`), or of another pipeline."""
        validate(plan, exit_stages)
        if plan.num_chunks != len(model.chunks) or not 0 <= rank < plan.num_ranks:
            raise ValueError(
                f"{plan.name} is of {plan.num_ranks} ranks with {plan.num_chunks} model chunks each; this is rank "
                f"{rank} with {len(model.chunks)}"
            )
        self.plan = plan
        self.rank_plan = RankPlan(plan, rank)
        self._model = model

    def run(
        self,
        iterators: list[Iterator[Any] | None],
        *,
        micro_batch_size: int,
        seq_length: int,
        trace: list[TimedAction] | None = None,
    ) -> None:
        """All of this rank's actions, ending with the reduction of gradients; losses are in the exit losses.

        iterators: one per chunk, of which each draws one batch for every microbatch of the plan, fill included. trace:
        is given the time of every action (on CUDA the processor waits for each, which costs time)."""
        config = self._model.config
        tp_size = config.tensor_model_parallel_size if config.sequence_parallel else 1
        iteration = Iteration(
            self.rank_plan, self._model,
            [None if iterator is None else Batches(iterator, self.plan) for iterator in iterators],
            (seq_length // tp_size, micro_batch_size, config.hidden_size),
        )  # fmt: skip
        timers = config.timers
        if timers is not None:
            timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        origin = time.perf_counter()
        with iteration.started():
            for action in self.rank_plan.actions:
                start = time.perf_counter()
                with self._timed(action):
                    iteration.run(action)
                if trace is not None:
                    if use_cuda():
                        # Not the other streams, on which messages are awaited that come after this action.
                        torch.cuda.current_stream().synchronize()
                    end = time.perf_counter()
                    trace.append(TimedAction(self.rank_plan.rank, action, start - origin, end - origin))
        iteration.finish()
        if config.finalize_model_grads_func is not None and self.rank_plan.has_backwards:
            total = iteration.num_tokens if config.calculate_per_token_loss else None
            config.finalize_model_grads_func(self._model.chunks, total)
        if timers is not None:
            timers("forward-backward").stop()

    @contextmanager
    def _timed(self, action: Action) -> Iterator[None]:
        """Core's timers of passes, where they are asked for."""
        timers = self._model.config.timers
        name = {Kind.FORWARD: "forward-compute", Kind.BACKWARD: "backward-compute"}.get(action.kind)
        if timers is None or name is None:
            yield
            return
        timers(name, log_level=2).start()
        yield
        timers(name).stop()
