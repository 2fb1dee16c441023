"""Executes plans of the pipeline in training, and measures what the choice of a plan needs to know."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron.early_exit.config.pipeline import ITERATIONS_UNTIL_MEASURED
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.data.batches import Batch
from megatron.early_exit.model.build import Model
from megatron.early_exit.platform.distributed import on_rank_zero
from megatron.early_exit.schedules.fill import PassTimes
from megatron.early_exit.schedules.iteration import RankModel
from megatron.early_exit.schedules.links import StageLinks
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.runtime import PlanRuntime
from megatron.early_exit.schedules.simulate import TimedAction, Timeline, simulate
from megatron.early_exit.schedules.stage_costs import StageCosts
from megatron.early_exit.training.forward_step import forward_step
from megatron.early_exit.training.plans import build_plan

# The first iterations of a process are slow (caches, allocations, compiled kernels) and are not measured.
_WARMUP_ITERATIONS = 2
_MEASURED_ITERATIONS = ITERATIONS_UNTIL_MEASURED - _WARMUP_ITERATIONS

_SHARED = " (much less: do ranks share processors, or are messages slow?)"


@dataclass
class _Trace:
    """What all ranks of one pipeline did in one iteration."""

    timeline: Timeline
    plan: Plan


class PlannedPipeline:
    """Executes the plans of one run, measures what they need to know, and draws what --profile-pipeline asks for."""

    def __init__(self, config: RunConfig, model: Model, say: Callable[[str], None]) -> None:
        """All ranks make it together."""
        self._config, self._model, self._say = config, model, say
        self._rank = parallel_state.get_pipeline_model_parallel_rank()
        self._links = StageLinks(
            is_interleaved=len(model.chunks) > 1, timeout_minutes=config.parallel.distributed_timeout_minutes
        )
        self.costs: list[StageCosts] | None = None
        """Of all stages, once they are measured."""
        self._num_run = 0
        self._traces: list[_Trace] = []
        self._runtime = cache(self._make_runtime)
        self._measures = config.pipeline.measures_stages
        profile = config.pipeline.profile_pipeline
        self._picture = None if profile is None else Path(profile)
        if self._picture is not None:
            on_rank_zero(partial(_check_writable, self._picture))

    def plan(self, num_microbatches: int) -> Plan:
        """Of the next iteration."""
        return self._runtime(num_microbatches).plan

    def _make_runtime(self, num_microbatches: int) -> PlanRuntime:
        plan = build_plan(self._config, num_microbatches, self.costs)
        return PlanRuntime(
            plan,
            self._rank,
            RankModel(self._model.config, self._model.wrapped, self._model.exit_losses, self._links, forward_step),
            self._config.exit_stages,
        )

    def run(
        self, iterators: list[Iterator[Batch] | None], *, num_microbatches: int, micro_batch_size: int, seq_length: int
    ) -> None:
        """All passes of one iteration and the reduction of its gradients."""
        runtime = self._runtime(num_microbatches)
        trace: list[TimedAction] | None = [] if self._is_traced else None
        if trace is not None:
            torch.distributed.barrier()  # the ranks' clocks start together
        runtime.run(iterators, micro_batch_size=micro_batch_size, seq_length=seq_length, trace=trace)
        self._num_run += 1
        if trace is not None:
            self._traces.append(_Trace(self._gather(runtime.plan, trace), runtime.plan))
            if len(self._traces) == _MEASURED_ITERATIONS:
                self._use_traces(num_microbatches)

    @property
    def _is_traced(self) -> bool:
        wanted = self._measures or self._picture is not None
        return wanted and self._num_run >= _WARMUP_ITERATIONS and len(self._traces) < _MEASURED_ITERATIONS

    def _gather(self, plan: Plan, trace: list[TimedAction]) -> Timeline:
        """The timeline of this rank's pipeline."""
        group = parallel_state.get_pipeline_model_parallel_group()
        everywhere: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(everywhere, trace, group=group)
        return Timeline.of(plan.name, [row for rows in everywhere for row in rows])

    def _use_traces(self, num_microbatches: int) -> None:
        """Make the plan that fits what was measured, or draw."""
        costs = self._agreed(measured_costs([trace.timeline for trace in self._traces], self._traces[-1].plan))
        if not self._measures:
            if self._picture is not None and torch.distributed.get_rank() == 0:
                try:
                    self._write_profile(costs, self._picture)
                except OSError as error:  # not worth the end of a training run
                    self._say(f" the profile of the pipeline could not be written: {error}")
            return
        self._measures, self.costs = False, costs
        self._runtime.cache_clear()
        plan = self.plan(num_microbatches)
        times = PassTimes.from_costs(costs)
        ratio = sum(times.backward) / sum(times.forward)
        fill = f"{plan.num_fill_warmup} + {plan.num_fill_cooldown} microbatches fill bubbles"
        exits = ", ".join(str(_exits_before_first_backward(actions)) for actions in plan.ranks)
        parts = [fill] if self._config.pipeline.fill_explicit_bubbles else []
        if self._config.pipeline.exits_in_bubbles:
            parts.append(f"exits of {exits} microbatches run before the first gradient of each stage")
        self._say(
            f" measured: a backward takes {ratio:.2f} times as long as a forward; from now on {', and '.join(parts)}"
        )
        if self._picture is not None:
            self._traces.clear()  # the profile is of iterations with the new plan
            self._num_run = 0

    @staticmethod
    def _agreed(costs: list[StageCosts]) -> list[StageCosts]:
        """Those of global rank 0's pipeline, so that all ranks of the world build the same plan."""
        agreed = [costs]
        torch.distributed.broadcast_object_list(agreed, src=0)
        return agreed[0]

    def _write_profile(self, costs: list[StageCosts], picture: Path) -> None:
        from megatron.early_exit.schedules.draw import draw_timelines

        # The iteration of median time stands for all.
        trace = sorted(self._traces, key=lambda trace: trace.timeline.iteration_sec)[len(self._traces) // 2]
        predicted, measured = simulate(trace.plan, costs), trace.timeline
        draw_timelines(
            [Timeline(f"predicted: {trace.plan.name}", predicted.actions, predicted.num_ranks),
             Timeline("measured", measured.actions, measured.num_ranks)], [picture],
        )  # fmt: skip
        document = {
            "plan": str(trace.plan),
            "costs": [asdict(cost) for cost in costs],
            "predicted_sec": predicted.iteration_sec,
            "measured_sec": measured.iteration_sec,
            "idle_share": [measured.idle_share(rank) for rank in range(measured.num_ranks)],
            "actions": [(row.rank, str(row.action), row.start_sec, row.end_sec) for row in measured.actions],
        }
        picture.with_suffix(".json").write_text(json.dumps(document) + "\n", encoding="utf-8")
        self._say(
            f" profile of the pipeline: {picture} and {picture.with_suffix('.json').name}; an iteration took "
            f"{measured.iteration_sec * 1000:.1f} ms, predicted {predicted.iteration_sec * 1000:.1f} ms"
            f"{_SHARED if measured.iteration_sec > 1.2 * predicted.iteration_sec else ''}"
        )


def _check_writable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"--profile-pipeline {path}: {path.parent} cannot be written; give another folder")


def _exits_before_first_backward(actions: Sequence[Action]) -> int:
    kinds = [action.kind for action in actions if not action.is_partial]
    first = kinds.index(Kind.BACKWARD) if Kind.BACKWARD in kinds else len(kinds)
    return kinds[:first].count(Kind.EXIT)


def measured_costs(timelines: list[Timeline], plan: Plan) -> list[StageCosts]:
    """Median times of every stage's passes; exits apart where they ran apart. Messages count as free: what a rank waits
    for them is the neighbour's time, not theirs."""
    costs = []
    for stage in range(plan.num_stages):
        chunk, rank = divmod(stage, plan.num_ranks)
        mine = [row for one in timelines for row in one.of_rank(rank) if row.action.chunk == chunk]
        early = {row.action.microbatch for row in mine if row.action.kind == Kind.EXIT}

        def median(kind: Kind, microbatches: set[int] | None = None, mine: list[TimedAction] = mine) -> float:
            """Of passes of a kind; of some microbatches, or of all; 0 where there are none."""
            rows = [row for row in mine if row.action.kind == kind]
            rows = [row for row in rows if microbatches is None or row.action.microbatch in microbatches]
            return statistics.median(row.end_sec - row.start_sec for row in rows) if rows else 0.0

        backward = median(Kind.BACKWARD, early or None)
        costs.append(StageCosts(median(Kind.FORWARD), backward, median(Kind.EXIT)))
    return costs
