"""Which plan of the pipeline an iteration follows: from the settings and, once they are known, the stages' times.

Runs nothing; `training/planned_pipeline.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.config.pipeline import USUAL_BACKWARD_FORWARD_RATIO
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.schedules.builders import tuning_plan, with_exits_in_bubbles
from megatron.early_exit.schedules.comparison import Variant, base_plan, exits_in_idle_time
from megatron.early_exit.schedules.fill import PassTimes, with_filled_bubbles
from megatron.early_exit.schedules.plan import Plan
from megatron.early_exit.schedules.plan_checks import validate
from megatron.early_exit.schedules.stage_costs import StageCosts


def follows_plan(config: RunConfig) -> bool:
    """Whether iterations follow a plan instead of core's schedule. Tuning over several stages does: there a stage sends
    hidden states on before it trains its exits, and core's forward-only schedule after. So does distillation, where
    exits run after the final layer."""
    training = config.training
    tunes_by_plan = training.tune_exit and (config.parallel.num_stages > 1 or training.tune_exit_distillation > 0)
    return config.pipeline.is_planned or tunes_by_plan


def build_plan(config: RunConfig, num_microbatches: int, costs: Sequence[StageCosts] | None = None) -> Plan:
    """The plan of an iteration, checked. costs: of all stages where they are measured; without, filling waits until
    they are (unless the flags say enough), and all exits that can run before the first gradient do.

    Raises ValueError if more microbatches are to fill bubbles than fit, with the largest number that works."""
    plan = _build_plan(config, num_microbatches, costs)
    validate(plan, config.exit_stages)
    return plan


def _build_plan(config: RunConfig, num_microbatches: int, costs: Sequence[StageCosts] | None) -> Plan:
    pipeline, num_ranks = config.pipeline, config.parallel.num_stages
    if config.training.tune_exit:
        distils = config.training.tune_exit_distillation > 0
        return tuning_plan(num_ranks, num_microbatches, config.exit_stages, distils=distils)
    times = _given_times(config) or (PassTimes.from_costs(costs) if costs is not None else None)
    if pipeline.fill_explicit_bubbles and times is not None:
        plan = with_filled_bubbles(
            num_ranks,
            num_microbatches,
            config.exit_stages,
            times,
            pipeline.num_fill_warmup_microbatches,
            pipeline.num_fill_cooldown_microbatches,
        )
    else:
        num_chunks = config.parallel.num_model_chunks(config.model.num_layers)
        plan = base_plan(num_ranks, num_ranks * num_chunks, num_microbatches)
    if not pipeline.exits_in_bubbles:
        return plan
    if costs is None:
        return with_exits_in_bubbles(plan, config.exit_stages)
    return exits_in_idle_time(Variant(plan.name, plan, tuple(costs)), config.exit_stages).plan


def _given_times(config: RunConfig) -> PassTimes | None:
    """What the flags say of the stages' times: as their layers."""
    ratio = config.pipeline.given_ratio
    return None if ratio is None else PassTimes.by_layers(config.layers_per_stage, ratio)


def plan_text(config: RunConfig, num_microbatches: int) -> str | None:
    """What an iteration follows, in words; None for core's schedule."""
    pipeline = config.pipeline
    if not pipeline.is_planned:
        return None
    parts = ["exits in idle time"] if pipeline.exits_in_bubbles else []
    if pipeline.fills_by_measure:
        parts.append("bubbles filled when the stages are measured")
    elif pipeline.fill_explicit_bubbles:
        plan = build_plan(config, num_microbatches)
        parts.append(f"bubbles filled with {plan.num_fill_warmup} + {plan.num_fill_cooldown} more microbatches")
    return ", ".join(parts) or "core's order of passes, profiled"


def check_plan(config: RunConfig, world_size: int) -> None:
    """Raise ValueError if no plan can be as the settings say, before anything is built."""
    training = config.training
    unit = training.micro_batch_size * config.parallel.data_parallel_size(world_size)
    usual = [
        StageCosts(forward_sec=len(layers), backward_sec=USUAL_BACKWARD_FORWARD_RATIO * len(layers))
        for layers in config.build.stage_layers
    ]
    # Few microbatches have little room for fill: of a ramp-up, the first batch is looked at as well.
    for batch_size in {*training.rampup_batch_size[:1], training.global_batch_size or unit}:
        build_plan(config, batch_size // unit, usual)


def most_fill(config: RunConfig, num_microbatches: int) -> int:
    """The most microbatches that an iteration may run beyond its batch."""
    if not config.pipeline.fill_explicit_bubbles:
        return 0
    if not config.pipeline.fills_by_measure:
        return build_plan(config, num_microbatches).num_fill
    return 2 * (config.parallel.num_stages - 1)  # fewer than (P - 1) r / (1 + r) of each kind
