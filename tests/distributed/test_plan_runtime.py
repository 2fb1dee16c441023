"""Executing a plan gives the gradients of plain autograd on one process, for exactly the passes that it contains."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.schedules.builders import (
    distilling_tuning,
    forward_only_tuning,
    interleaved,
    one_f_one_b,
    with_exits_in_bubbles,
)
from megatron.early_exit.schedules.fill import PassTimes, with_filled_bubbles
from megatron.early_exit.schedules.plan import Kind, Plan
from megatron.early_exit.schedules.rank_plan import RankPlan
from tests.configs import VOCAB_SIZE, make_config
from tests.distributed.test_tuning import tuning_config
from tests.distributed.workers import run_distributed
from tests.reference import ReferenceBatch, ReferenceModel, make_batches


def stages_of_layers(cfg: RunConfig) -> list[int]:
    """The stage, chunks of ranks included, of every layer."""
    return [stage for stage, count in enumerate(cfg.layers_per_stage) for _ in range(count)]


def exit_stages(cfg: RunConfig) -> list[int]:
    """Stages, chunks of ranks included, that own exits."""
    return sorted({stages_of_layers(cfg)[layer - 1] for layer in cfg.exits.exit_layer_nums})


class ReferenceWithCopies(ReferenceModel):
    """Every head has a copy of the output weight of its own, so that gradients can be told apart by stage."""

    def __init__(self, cfg: RunConfig, vocab_size: int) -> None:
        super().__init__(cfg, vocab_size)
        self.copies: list[Tensor] = []

    def output_weight(self) -> Tensor:
        self.copies.append(super().output_weight().detach().clone().requires_grad_())
        return self.copies[-1]


def expected_gradients(
    cfg: RunConfig, plan: Plan, batches: list[ReferenceBatch], weights: tuple[float, ...], iteration: int = 0
) -> dict[str, Tensor]:
    """The objective of each stage's parameters, term by term: every microbatch and head that the plan brings there,
    each with the weight that makes the sum a mean."""
    stages = stages_of_layers(cfg)
    stage_of_head = [stages[layer - 1] for layer in cfg.exits.exit_layer_nums] + [plan.num_stages - 1]
    backwards = [set(plan.microbatches(stage, Kind.BACKWARD)) for stage in range(plan.num_stages)]
    fill_warmup = set(range(plan.num_microbatches, plan.num_microbatches + plan.num_fill_warmup))
    other = [len(numbers - fill_warmup) for numbers in backwards]  # N + C_s
    seen = [len(numbers) for numbers in backwards]  # N + C_s + W_s

    def coefficient(microbatch: int, head: int, stage: int) -> float:
        of_head = stage_of_head[head]
        if stage > of_head or microbatch not in backwards[stage]:
            return 0.0
        is_exit = head < cfg.exits.num_exits
        if microbatch in fill_warmup:
            return 1 / seen[of_head] if is_exit and microbatch in backwards[of_head] else 0.0
        return (other[of_head] / seen[of_head] if is_exit else 1.0) / other[stage]

    gradients: dict[str, Any] = defaultdict(float)
    tied = not cfg.model.untie_embeddings_and_output_weights
    for microbatch, batch in enumerate(batches):
        reference = ReferenceWithCopies(cfg, VOCAB_SIZE)
        objectives, _ = reference.losses(batch, iteration)
        for head, (objective, weight) in enumerate(zip(objectives, (*weights, 1.0), strict=True)):
            objective = objective * weight / batch.loss_mask.sum().clamp(min=1)
            named = {name: (parameter, stage_of_parameter(name, stages)) for name, parameter in
                     reference.params.items()}  # fmt: skip
            is_last = head == len(objectives) - 1
            if is_last or not cfg.exits.head_of(head).untied_output:
                copy = reference.copies[-1 if is_last else head]
                named[f"copy {head}"] = (copy, stage_of_head[head])
            values = torch.autograd.grad(
                objective, [parameter for parameter, _ in named.values()], retain_graph=True, allow_unused=True
            )
            for (name, (_, stage)), value in zip(named.items(), values, strict=True):
                if value is not None:
                    if name.startswith("copy"):
                        name = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
                    gradients[name] = gradients[name] + coefficient(microbatch, head, stage) * value
    return gradients


def stage_of_parameter(name: str, stages_of_layers: list[int]) -> int:
    if name.startswith("decoder.layers."):
        return stages_of_layers[int(name.split(".")[2])]
    return 0 if name.startswith("embedding") else stages_of_layers[-1]


def run_plan(cfg: RunConfig, plan: Plan, iterations: int = 1) -> None:
    """Gradients of every parameter equal the reference's; every iteration has other batches."""
    from megatron.core import parallel_state

    from tests.distributed.parallel_model import (
        build_with_reference_parameters,
        compare_gradients,
        iterators,
        layout,
        plan_runtime,
    )

    weights = cfg.exits.weights_at(10**9)
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        runtime = plan_runtime(cfg, model, plan)
        for iteration in range(iterations):
            for chunk in model.wrapped:
                chunk.zero_grad_buffer()
            dp_size = parallel_state.get_data_parallel_world_size()
            count = (plan.num_microbatches + plan.num_fill) * dp_size
            batches = make_batches(cfg, VOCAB_SIZE, count, seed=iteration)
            replicas = [batches[replica::dp_size] for replica in range(dp_size)]
            model.exit_losses.begin_iteration(plan.num_microbatches, weights, iteration)
            mine = replicas[parallel_state.get_data_parallel_rank()]
            # Drawn first: what fills the warmup.
            order = [*plan.fill_warmup, *range(plan.num_microbatches), *plan.fill_cooldown]
            runtime.run(
                iterators(model, [mine[microbatch] for microbatch in order]),
                micro_batch_size=cfg.training.micro_batch_size, seq_length=cfg.training.seq_length,
            )  # fmt: skip
            expected: dict[str, Any] = defaultdict(float)
            for replica in replicas:
                for name, value in expected_gradients(cfg, plan, replica, weights, iteration).items():
                    expected[name] = expected[name] + value / dp_size
            compare_gradients(cfg, model, expected, 2e-5)


HEADS = {
    "tied": {},
    "untied": {"untie_embeddings_and_output_weights": True, "untie_exit_output_weights": True, "use_exit_norm": True},
    "mlp": {"use_exit_mlp": True, "use_exit_norm": True},
    "block, pre-exit": {"use_exit_block": True, "pre_exit": True},
}
MIXED = {
    "use_exit_mlp": (True, False), "use_exit_block": (False, True), "use_exit_norm": (False, True),
    "untie_exit_output_weights": (False, True),
}  # fmt: skip


def config(num_stages: int, **changes: Any) -> RunConfig:
    layers = {2: 4, 3: 6, 4: 4}[num_stages]
    return make_config(**{"num_layers": layers, "pipeline_model_parallel_size": num_stages, **changes})


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 1), (2, 2), (2, 5), (3, 2), (3, 4), (4, 3), (4, 6)])
def test_1f1b(num_stages: int, num_microbatches: int) -> None:
    plan = one_f_one_b(num_stages, num_microbatches)
    run_distributed(num_stages, run_plan, cfg=config(num_stages), plan=plan)


@pytest.mark.parametrize("head", [*HEADS, "mixed"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 3), (4, 5)])
def test_exits_in_idle_time(num_stages: int, num_microbatches: int, head: str) -> None:
    cfg = config(num_stages, **{**HEADS, "mixed": MIXED}[head])
    plan = with_exits_in_bubbles(one_f_one_b(num_stages, num_microbatches), exit_stages(cfg))
    assert any(plan.microbatches(stage, Kind.EXIT) for stage in range(num_stages))
    run_distributed(num_stages, run_plan, cfg=cfg, plan=plan, iterations=2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("num_stages", "exit_layers", "num_microbatches", "ratio"), [
    (3, (2, 4), 3, 2.0), (4, (2, 3), 6, 2.0), (4, (1,), 5, 1.2), (4, (2,), 4, 4.0),
])  # fmt: skip
def test_filled_bubbles(
    num_stages: int, exit_layers: tuple[int, ...], num_microbatches: int, ratio: float, head: str
) -> None:
    weights = tuple(0.5 - 0.2 * index for index in range(len(exit_layers)))
    cfg = config(num_stages, exit_layer_nums=exit_layers, exit_layer_weight=weights, **HEADS[head])
    plan = with_filled_bubbles(num_stages, num_microbatches, exit_stages(cfg), PassTimes.uniform(num_stages, ratio))
    assert plan.num_fill_cooldown and plan.num_fill_warmup
    run_distributed(num_stages, run_plan, cfg=cfg, plan=plan, iterations=2)


def test_filled_bubbles_with_exits_of_different_kinds() -> None:
    cfg = config(3, exit_layer_nums=(2, 4), exit_layer_weight=(0.5, 0.3), **MIXED)
    plan = with_filled_bubbles(3, 3, exit_stages(cfg), PassTimes.uniform(3, 2.0))
    assert plan.num_fill_cooldown and plan.num_fill_warmup
    run_distributed(3, run_plan, cfg=cfg, plan=plan, iterations=2)


def test_exits_in_idle_time_and_filled_bubbles() -> None:
    cfg = config(4, use_exit_norm=True)
    plan = with_exits_in_bubbles(with_filled_bubbles(4, 6, exit_stages(cfg)), exit_stages(cfg))
    run_distributed(4, run_plan, cfg=cfg, plan=plan, iterations=2)


@pytest.mark.parametrize("in_idle_time", [False, True])
def test_interleaved(in_idle_time: bool) -> None:
    cfg = config(2, num_layers_per_virtual_pipeline_stage=1, use_exit_norm=True)
    plan = interleaved(2, 2, 4)
    if in_idle_time:
        plan = with_exits_in_bubbles(plan, exit_stages(cfg))
    run_distributed(2, run_plan, cfg=cfg, plan=plan, iterations=2)


def test_stages_of_different_sizes() -> None:
    """Exits in idle time and filled bubbles with one, three, one and two layers; and interleaved."""
    cfg = config(4, num_layers=7, pipeline_model_parallel_layout="Et|ttt|t|ttL", exit_layer_nums=(1, 4),
                 use_exit_norm=True)  # fmt: skip
    times = PassTimes.by_layers(cfg.layers_per_stage, 3.0)
    plan = with_exits_in_bubbles(with_filled_bubbles(4, 6, exit_stages(cfg), times), exit_stages(cfg))
    assert plan.num_fill and exit_stages(cfg) == [0, 1] == list(cfg.exit_stages)
    run_distributed(4, run_plan, cfg=cfg, plan=plan, iterations=2)
    cfg = config(2, num_layers=7, pipeline_model_parallel_layout="Ett|t|t*3|tL", exit_layer_nums=(3, 6))
    plan = with_exits_in_bubbles(interleaved(2, 2, 4), exit_stages(cfg))
    run_distributed(2, run_plan, cfg=cfg, plan=plan, iterations=2)


TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize("changes", [
    TP2, {**TP2, "sequence_parallel": True}, {"overlap_grad_reduce": True}, {"use_distributed_optimizer": False},
], ids=str)  # fmt: skip
def test_exits_in_idle_time_in_other_layouts(changes: dict) -> None:
    """TP 2 x PP 2, and DP 2 x PP 2."""
    cfg = config(2, **HEADS["mlp"], **changes)
    plan = with_exits_in_bubbles(one_f_one_b(2, 4), exit_stages(cfg))
    run_distributed(4, run_plan, cfg=cfg, plan=plan, iterations=3)


@pytest.mark.parametrize("changes", [
    {**TP2, "sequence_parallel": True}, {"overlap_grad_reduce": True},
], ids=str)  # fmt: skip
def test_filled_bubbles_in_other_layouts(changes: dict) -> None:
    """TP 2 x PP 3, and DP 2 x PP 3."""
    cfg = config(3, exit_layer_nums=(2, 4), **changes)
    plan = with_filled_bubbles(3, 4, exit_stages(cfg))
    run_distributed(6, run_plan, cfg=cfg, plan=plan, iterations=3)


def test_filled_bubbles_with_recomputation() -> None:
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    cfg = config(4, use_exit_norm=True, **recompute)
    run_distributed(4, run_plan, cfg=cfg, plan=with_filled_bubbles(4, 5, exit_stages(cfg)))


def test_mean_over_the_tokens_of_the_batch() -> None:
    """--calculate-per-token-loss: core divides by the last stage's tokens."""
    cfg = config(2, use_exit_norm=True, calculate_per_token_loss=True)
    plan = with_exits_in_bubbles(one_f_one_b(2, 3), exit_stages(cfg))
    run_distributed(2, compare_per_token, cfg=cfg, plan=plan)


def compare_per_token(cfg: RunConfig, plan: Plan) -> None:

    from tests.distributed.parallel_model import (
        build_with_reference_parameters,
        compare_gradients,
        iterators,
        layout,
        plan_runtime,
    )

    weights = cfg.exits.weights_at(10**9)
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        runtime = plan_runtime(cfg, model, plan)
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        batches = make_batches(cfg, VOCAB_SIZE, plan.num_microbatches)
        model.exit_losses.begin_iteration(plan.num_microbatches, weights)
        runtime.run(iterators(model, batches), micro_batch_size=2, seq_length=cfg.training.seq_length)
        gradients, _ = ReferenceModel(cfg, VOCAB_SIZE).gradients(batches, weights)
        compare_gradients(cfg, model, gradients, 2e-5)


def sends_that_are_kept(plan: Plan) -> int:
    """The most messages that a rank holds at the end of an iteration."""
    kept = 0
    for rank in range(plan.num_ranks):
        sends = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD, Kind.SEND_TEACHER)
        sent = {action for action in plan.ranks[rank] if action.kind in sends}
        shown = [message for messages in RankPlan(plan, rank).shown_by.values() for message in messages]
        assert len(shown) == len(set(shown)) and set(shown) <= sent
        kept = max(kept, len(sent) - len(shown))
    return kept


@pytest.mark.parametrize("plan", [
    one_f_one_b(4, 64), with_exits_in_bubbles(one_f_one_b(2, 9), [0]), interleaved(2, 2, 8), interleaved(4, 2, 16),
    with_filled_bubbles(4, 12, [1, 2]), distilling_tuning(4, 64, [0, 2]), distilling_tuning(2, 9, [0]),
], ids=lambda plan: plan.name)  # fmt: skip
def test_messages_are_known_to_have_arrived(plan: Plan) -> None:
    """What comes back shows nearly all; else they and their memory would stay until the end of the iteration."""
    assert sends_that_are_kept(plan) <= 2 * plan.num_ranks * plan.num_chunks


def refused_plan(cfg: RunConfig, plan: Plan, message: str) -> None:
    """A runtime is not made of a plan that is wrong, wherever it comes from."""
    from megatron.early_exit.model.build import build_model
    from tests.distributed.parallel_model import layout, plan_runtime

    with layout(cfg):
        model = build_model(cfg, VOCAB_SIZE)
        with pytest.raises(ValueError, match=message):
            plan_runtime(cfg, model, plan)


def test_plans_are_checked_before_they_run() -> None:
    good = one_f_one_b(2, 3)
    without_last = replace(good, ranks=(good.ranks[0][:-1], good.ranks[1]))
    run_distributed(2, refused_plan, cfg=config(2), plan=without_last, message="B2 is missing")
    on_wrong_stage = with_exits_in_bubbles(good, [0])
    cfg = config(2, exit_layer_nums=(3, 4))
    run_distributed(2, refused_plan, cfg=cfg, plan=on_wrong_stage, message="stage 0 has no exit")
    run_distributed(2, refused_plan, cfg=config(2), plan=interleaved(2, 2, 4), message="with 2 model chunks each")


def tune_by_plan(cfg: RunConfig, plan: Plan) -> None:
    """A tuning plan gives the gradients and losses of core's forward-only schedule."""
    from megatron.core.distributed import finalize_model_grads

    from megatron.early_exit.training.step import accumulate_gradients
    from tests.distributed.parallel_model import build_with_reference_parameters, iterators, layout, plan_runtime

    weights, sizes = cfg.exits.weights_at(10**9), {"micro_batch_size": 2, "seq_length": cfg.training.seq_length}
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        batches = make_batches(cfg, VOCAB_SIZE, plan.num_microbatches)
        gradients = []
        for by_plan in (False, True):
            for chunk in model.wrapped:
                chunk.zero_grad_buffer()
            if not by_plan:
                accumulate_gradients(
                    model, iterators(model, batches), exit_weights=weights, num_microbatches=len(batches), **sizes
                )
            else:
                model.exit_losses.begin_iteration(plan.num_microbatches, weights)
                runtime = plan_runtime(cfg, model, plan)
                runtime.run(iterators(model, batches), **sizes)
                finalize_model_grads(model.wrapped)
            trained = {n: p for n, p in model.chunks[0].named_parameters() if p.requires_grad}
            gradients.append({name: parameter.main_grad.clone() for name, parameter in trained.items()})
        assert gradients[0] and all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
        assert all(value.any() for value in gradients[1].values())


def test_forward_only_tuning() -> None:
    cfg = tuning_config(**HEADS["mlp"], pipeline_model_parallel_size=2)
    run_distributed(2, tune_by_plan, cfg=cfg, plan=forward_only_tuning(2, 4, exit_stages(cfg)))
