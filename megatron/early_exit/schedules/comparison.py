"""One model on one cluster under several plans: plain GPT, exits in the backward, in idle time, bubbles filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.layer_split import layer_numbers, layout_text
from megatron.early_exit.config.pipeline import PipelineConfig
from megatron.early_exit.config.run import ResolvedConfig
from megatron.early_exit.schedules.builders import (
    interleaved,
    one_f_one_b,
    tuning_plan,
    with_exits_in_bubbles,
)
from megatron.early_exit.schedules.cost_model import (
    DEFAULT_ASSUMPTIONS,
    Assumptions,
    Gpu,
    model_costs,
    stages_with_early_exits,
)
from megatron.early_exit.schedules.fill import PassTimes, with_filled_bubbles
from megatron.early_exit.schedules.plan import Kind, Plan
from megatron.early_exit.schedules.simulate import Timeline, peak_activation_bytes, simulate, state_bytes
from megatron.early_exit.schedules.stage_costs import StageCosts, exit_stages

FREE = 0.001
"""What lengthens an iteration by at most this share costs no time."""


@dataclass(frozen=True)
class Setup:
    """A model, its exits and layout on a cluster."""

    config: ResolvedConfig
    world_size: int
    """GPUs."""
    gpu: Gpu
    num_microbatches: int
    """Microbatches of one iteration, on each replica of the model."""
    assumptions: Assumptions = DEFAULT_ASSUMPTIONS

    @classmethod
    def of(
        cls,
        config: ResolvedConfig,
        world_size: int,
        gpu: Gpu,
        assumptions: Assumptions = DEFAULT_ASSUMPTIONS,
    ) -> Setup:
        """The setup of a run."""
        training, replicas = config.training, config.parallel.data_parallel_size(world_size)
        batch = training.global_batch_size or training.micro_batch_size * replicas
        return cls(config, world_size, gpu, batch // (training.micro_batch_size * replicas), assumptions)

    @property
    def num_ranks(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of every stage (model chunk), in order."""
        return self.config.layers_per_stage

    @property
    def stage_layers(self) -> tuple[range, ...]:
        """Numbers, from 1, of the layers of every stage."""
        return layer_numbers(self.layers_per_stage)

    @cached_property
    def costs(self) -> tuple[StageCosts, ...]:
        return tuple(model_costs(self.config, self.world_size, self.gpu, self.assumptions))

    @cached_property
    def plain_costs(self) -> tuple[StageCosts, ...]:
        """Costs of the model without exits."""
        plain = replace(self.config, exits=ExitConfig(), pipeline=PipelineConfig())
        return replace(self, config=plain).costs

    @property
    def early_exit_stages(self) -> list[int]:
        """Stages whose exits can run before the backward."""
        return stages_with_early_exits(self.config)

    def with_layers(self, layers_per_stage: Sequence[int]) -> Setup:
        """The same with other layers on every stage. Raises ConfigError if training cannot have them so."""
        parallel = replace(
            self.config.parallel, pipeline_model_parallel_layout=layout_text(layers_per_stage),
            num_layers_per_virtual_pipeline_stage=None, decoder_first_pipeline_num_layers=None,
            decoder_last_pipeline_num_layers=None,
        )  # fmt: skip
        return replace(self, config=replace(self.config, parallel=parallel))

    def with_num_microbatches(self, num_microbatches: int) -> Setup:
        return replace(self, num_microbatches=num_microbatches)


@dataclass(frozen=True)
class Variant:
    """One plan with its costs and what comes of it."""

    name: str
    plan: Plan
    costs: tuple[StageCosts, ...]

    @cached_property
    def timeline(self) -> Timeline:
        return replace(simulate(self.plan, self.costs), name=self.name)

    @property
    def iteration_sec(self) -> float:
        return self.timeline.iteration_sec

    @cached_property
    def peak_bytes(self) -> list[int]:
        """Parameters, gradients, optimizer state and the peak of activations of each rank, in bytes."""
        pairs = zip(state_bytes(self.plan, self.costs), peak_activation_bytes(self.plan, self.costs))
        return [state + peak for state, peak in pairs]


PLAIN, IN_BACKWARD, IN_IDLE_TIME, FILLED = (
    "plain GPT", "exits in the backward", "exits in idle time", "idle time, bubbles filled",
)  # fmt: skip


def base_plan(num_ranks: int, num_stages: int, num_microbatches: int) -> Plan:
    """1F1B, interleaved if a rank has several stages. Raises ValueError."""
    if num_stages > num_ranks:
        return interleaved(num_ranks, num_stages // num_ranks, num_microbatches)
    return one_f_one_b(num_ranks, num_microbatches)


def plain_gpt(setup: Setup) -> Variant:
    """The model without its exits."""
    return Variant(PLAIN, base_plan(setup.num_ranks, len(setup.costs), setup.num_microbatches), setup.plain_costs)


def exits_in_backward(setup: Setup) -> Variant:
    return Variant(IN_BACKWARD, base_plan(setup.num_ranks, len(setup.costs), setup.num_microbatches), setup.costs)


def compare(setup: Setup, num_fill_warmup: int | None = None, num_fill_cooldown: int | None = None) -> list[Variant]:
    """Variants of a model's pipeline, plain GPT first; those with exits only if it has some, and with filled bubbles
    only without interleaving. Arguments and errors as of `compare_costs`."""
    return compare_costs(
        setup.costs, setup.plain_costs, setup.num_ranks, setup.num_microbatches, setup.early_exit_stages,
        num_fill_warmup, num_fill_cooldown,
    )  # fmt: skip


def compare_costs(
    costs: Sequence[StageCosts],
    plain_costs: Sequence[StageCosts],
    num_ranks: int,
    num_microbatches: int,
    early_exit_stages: Sequence[int],
    num_fill_warmup: int | None = None,
    num_fill_cooldown: int | None = None,
) -> list[Variant]:
    """Variants of a pipeline from its costs alone.

    early_exit_stages: those whose exits can run before the backward. num_fill_warmup, num_fill_cooldown: by default as
    many as cost no time. Raises ValueError for more fill than there is room for, with the largest number."""
    costs, plain_costs = tuple(costs), tuple(plain_costs)
    plan = base_plan(num_ranks, len(costs), num_microbatches)
    variants = [Variant(PLAIN, plan, plain_costs)]
    if not exit_stages(costs):
        return variants
    variants.append(Variant(IN_BACKWARD, plan, costs))
    variants.append(exits_in_idle_time(variants[-1], early_exit_stages))
    if plan.num_chunks == 1:
        variants.append(_filled(variants[-1], early_exit_stages, num_fill_warmup, num_fill_cooldown))
    return variants


def exits_in_idle_time(variant: Variant, early_exit_stages: Sequence[int]) -> Variant:
    """`variant`, whose plan has exits in the backward, with those moved that wait for nothing."""
    plan = variant.plan
    if not early_exit_stages:
        return replace(variant, name=IN_IDLE_TIME)
    before_first_backward = _exits_in_first_wait(variant) if plan.num_chunks == 1 else None
    return Variant(IN_IDLE_TIME, with_exits_in_bubbles(plan, early_exit_stages, before_first_backward), variant.costs)


def _exits_in_first_wait(variant: Variant) -> list[int]:
    """Microbatches of each rank whose exits fit into the wait for the batch's first gradient; at least one."""
    counts = []
    for rank, cost in enumerate(variant.costs):
        first = next(
            (
                timed
                for timed in variant.timeline.of_rank(rank)
                if timed.action.kind == Kind.RECEIVE_BACKWARD and not timed.action.is_partial
            ),
            None,
        )
        wait = first.end_sec - first.start_sec if first else 0.0
        counts.append(max(1, int(wait / cost.exit_sec + 1e-9)) if cost.exit_sec else 1)
    return counts


def _filled(
    in_idle_time: Variant, early_exit_stages: Sequence[int], num_fill_warmup: int | None, num_fill_cooldown: int | None
) -> Variant:
    costs, plan = in_idle_time.costs, in_idle_time.plan
    times = PassTimes.from_costs(costs)

    def build(warmup: int | None, cooldown: int | None) -> Variant:
        filled = with_filled_bubbles(plan.num_ranks, plan.num_microbatches, exit_stages(costs), times, warmup, cooldown)
        return replace(exits_in_idle_time(Variant(FILLED, filled, costs), early_exit_stages), name=FILLED)

    def is_free(variant: Variant) -> bool:
        return variant.iteration_sec <= in_idle_time.iteration_sec * (1 + FREE)

    largest = build(num_fill_warmup, num_fill_cooldown)
    if num_fill_warmup is None:
        num_fill_warmup = _largest(
            largest.plan.num_fill_warmup, lambda count: is_free(build(count, num_fill_cooldown or 0))
        )
    if num_fill_cooldown is None:
        most = build(num_fill_warmup, None).plan.num_fill_cooldown
        num_fill_cooldown = _largest(most, lambda count: is_free(build(num_fill_warmup, count)))
    return build(num_fill_warmup, num_fill_cooldown)


def _largest(most: int, works: Callable[[int], bool]) -> int:
    """The largest number up to `most` that works; 0 if none does."""
    return next((count for count in range(most, 0, -1) if works(count)), 0)


def tuning_variant(setup: Setup) -> Variant:
    """EE-Tuning: forward passes through the stages up to the last exit, or to the final head where exits follow it."""
    stages = setup.config.parallel.num_stages
    costs = setup.costs[:stages]
    distils = setup.config.training.tune_exit_distillation > 0
    plan = tuning_plan(stages, setup.num_microbatches, exit_stages(costs), distils=distils)
    return Variant(plan.name, plan, costs)
