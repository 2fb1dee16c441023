"""Training that follows plans: the program's flags, what is measured, and estimates that stay unbiased."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.validate import problems, warnings
from megatron.early_exit.schedules.plan import Kind, Plan
from megatron.early_exit.schedules.simulate import Timeline, simulate
from megatron.early_exit.schedules.stage_costs import StageCosts
from megatron.early_exit.training.planned_pipeline import measured_costs
from megatron.early_exit.training.plans import build_plan, check_plan, most_fill
from tests.configs import VOCAB_SIZE, make_config, make_settings, make_training_config
from tests.data_files import write_token_files
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed

FILL = {"fill_explicit_bubbles": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_token_files(tmp_path_factory.mktemp("data"), VOCAB_SIZE, num_documents=200)


def train(data: str, folder: Path, world_size: int, **changes: Any) -> list[dict]:
    cfg = make_training_config(data, folder, **changes)
    run_distributed(world_size, training_run, cfg=cfg)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [
    {}, {"fp16": True, "initial_loss_scale": 256.0}, {"recompute_granularity": "selective"},
], ids=str)  # fmt: skip
def test_exits_in_idle_time_change_no_loss(data: str, tmp_path: Path, changes: dict) -> None:
    two_stages = {"pipeline_model_parallel_size": 2, "use_exit_norm": True, **changes}
    plain = train(data, tmp_path / "plain", 2, **two_stages)
    early = train(data, tmp_path / "early", 2, **two_stages, exits_in_bubbles=True)
    assert [line["iteration"] for line in early] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(plain, early, strict=True):
        for key in ("lm_loss", "exit_loss/layer_2", "exit_loss/layer_3", "grad_norm"):
            # Gradients of the two exits' microbatches are added in another order.
            assert two[key] == pytest.approx(one[key], rel=2e-3 if "fp16" in changes else 1e-5)


def test_replicas_plan_alike_and_validate_on_the_way(data: str, tmp_path: Path) -> None:
    """DP 2 x PP 2, overlapped reduction, masks that every stage needs: the plan changes after the fifth iteration, and
    validations in between follow core's schedule."""
    settings = {
        "pipeline_model_parallel_size": 2, "use_exit_norm": True, "overlap_grad_reduce": True, "train_iters": 8,
        "lr_decay_iters": 8, "reset_attention_mask": True, "eval_iters": 1, "eval_interval": 2,
        "use_distributed_optimizer": True,
    }  # fmt: skip
    plain = train(data, tmp_path / "plain", 4, **settings)
    early = train(data, tmp_path / "early", 4, **settings, exits_in_bubbles=True)
    assert [line["kind"] for line in early].count("valid") == 4 and len(early) == len(plain)
    for one, two in zip(plain, early, strict=True):
        for key in ("lm_loss", "exit_loss/layer_2", "exit_loss/layer_3"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_a_batch_that_grows(data: str, tmp_path: Path) -> None:
    """--rampup-batch-size: a plan for each number of microbatches."""
    settings = {"pipeline_model_parallel_size": 2, "rampup_batch_size": (4, 4, 16), "train_iters": 7}
    plain = train(data, tmp_path / "plain", 2, **settings)
    early = train(data, tmp_path / "early", 2, **settings, exits_in_bubbles=True)
    assert [line["consumed_samples"] for line in early] == [line["consumed_samples"] for line in plain]
    assert len({line["global_batch_size"] for line in early}) == 2
    for one, two in zip(plain, early, strict=True):
        assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-5)


def test_filled_bubbles_count_and_resume(data: str, tmp_path: Path) -> None:
    """Samples of the fill are consumed as well: the resumed run draws what the whole one draws."""
    settings = {
        "num_layers": 6, "pipeline_model_parallel_size": 3, "exit_layer_nums": (2, 4), **FILL,
        "num_fill_warmup_microbatches": 1, "num_fill_cooldown_microbatches": 1,
    }  # fmt: skip
    whole = train(data, tmp_path / "whole", 3, **settings)
    assert [line["consumed_samples"] for line in whole] == [12 * (i + 1) for i in range(6)]  # 4 + 2 microbatches of 2
    save = {"save": str(tmp_path / "ck"), "load": str(tmp_path / "ck")}
    train(data, tmp_path / "parts", 3, **settings, **save, exit_interval=3)
    resumed = train(data, tmp_path / "parts", 3, **settings, **save)
    for key in ("lm_loss", "exit_loss/layer_2", "grad_norm", "consumed_samples"):
        assert [line[key] for line in whole] == [line[key] for line in resumed]


def test_stages_are_measured_before_bubbles_are_filled(data: str, tmp_path: Path) -> None:
    """And --profile-pipeline draws iterations with the fill, with its numbers beside."""
    picture = tmp_path / "profile.png"
    log = train(
        data, tmp_path, 3, num_layers=6, pipeline_model_parallel_size=3, exit_layer_nums=(2, 4), train_iters=11,
        lr_decay_iters=11, global_batch_size=10, exits_in_bubbles=True, profile_pipeline=str(picture), **FILL,
    )  # fmt: skip
    consumed = [line["consumed_samples"] for line in log]
    steps = [b - a for a, b in zip([0, *consumed], consumed)]
    assert steps[:5] == [10] * 5 and len(set(steps[5:])) == 1 and steps[5] >= 10
    profile = json.loads(picture.with_suffix(".json").read_text())
    plan = Plan.parse(profile["plan"])
    assert plan.num_fill == (steps[5] - 10) // 2
    assert [(rank, word) for rank, word, *_ in profile["actions"]] == [
        (rank, str(action)) for rank, actions in enumerate(plan.ranks) for action in actions
    ]
    assert profile["measured_sec"] > 0 and profile["predicted_sec"] > 0 and len(profile["costs"]) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_costs_from_traces_predict_their_own_iteration() -> None:
    """By hand: what is simulated with known costs gives these costs back."""
    cfg = config(4, exits_in_bubbles=True, **FILL)
    plan = build_plan(cfg, 6, [StageCosts(1.0, 2.0, 0.5)] * 4)
    costs = [StageCosts(0.1 + stage / 100, 0.2, 0.05 if stage in (1, 2) else 0.0) for stage in range(4)]
    timeline = simulate(plan, costs)
    again = measured_costs([timeline], plan)
    for stage, (one, two) in enumerate(zip(costs, again, strict=True)):
        assert two.forward_sec == pytest.approx(one.forward_sec), stage
        assert two.backward_sec == pytest.approx(one.backward_sec), stage
        assert two.exit_sec == pytest.approx(one.exit_sec), stage
    assert isinstance(timeline, Timeline) and simulate(plan, again).iteration_sec == pytest.approx(
        timeline.iteration_sec
    )


def config(num_stages: int, **changes: Any) -> RunConfig:
    layers = {2: 4, 3: 6, 4: 4}[num_stages]
    return make_config(
        **{"num_layers": layers, "pipeline_model_parallel_size": num_stages, "train_iters": 5, **changes}
    )


@pytest.mark.parametrize(("num_stages", "changes", "message"), [
    (1, {"exits_in_bubbles": True}, "--exits-in-bubbles with one pipeline stage"),
    (2, {"exits_in_bubbles": True, "exit_layer_nums": (), "exit_layer_weight": ()}, "--exits-in-bubbles without exits"),
    (2, {"exits_in_bubbles": True, "recompute_granularity": "full", "recompute_method": "uniform",
         "recompute_num_layers": 1}, "--recompute-granularity full"),
    (2, {**FILL, "num_layers_per_virtual_pipeline_stage": 1}, "both together are not supported"),
    (2, {**FILL, "calculate_per_token_loss": True}, "no one number of tokens"),
    (2, {**FILL, "train_iters": None, "train_samples": 80}, "give the length as --train-iters"),
    (2, {**FILL, "num_fill_warmup_microbatches": -1}, "must be at least 0"),
    (2, {**FILL, "backward_forward_ratio": 0.0}, "must be above 0"),
    (2, {"num_fill_cooldown_microbatches": 1}, "without --fill-explicit-bubbles"),
    (2, {"profile_pipeline": "x.txt"}, "give the name of a .png"),
    (2, {"profile_pipeline": "x.png", "tune_exit": True, "use_exit_norm": True, "cache_hidden_states": "x"},
     "exits are tuned without a pipeline"),
    (2, {**FILL, "tune_exit": True, "use_exit_norm": True}, "tuning has no backward passes"),
])  # fmt: skip
def test_what_is_refused(num_stages: int, changes: dict, message: str) -> None:
    changes = {"num_layers": 4, "pipeline_model_parallel_size": num_stages, "train_iters": 5, **changes}
    found = problems(make_settings(**changes), num_stages)
    assert any(message in problem for problem in found), found


def test_too_many_are_refused_with_the_largest_number() -> None:
    cfg = config(4, **FILL, num_fill_warmup_microbatches=3, num_fill_cooldown_microbatches=0, global_batch_size=12)
    with pytest.raises(ValueError, match=r"--num-fill-warmup-microbatches 3.*Use at most \d"):
        check_plan(cfg, 4)
    without = config(4, **FILL, exit_layer_nums=(), exit_layer_weight=(), global_batch_size=12)
    with pytest.raises(ValueError, match="the model has no exits"):
        check_plan(without, 4)


def test_one_given_number_is_checked_before_training() -> None:
    """Not against what is measured later: it would end a run that has begun."""
    cfg = config(4, **FILL, num_fill_cooldown_microbatches=2, global_batch_size=12)
    check_plan(cfg, 4)
    slow_end = [StageCosts(1.0, 2.0)] * 3 + [StageCosts(1.2, 2.4)]
    assert build_plan(cfg, 6, slow_end).num_fill_cooldown == 2


def test_runs_that_are_too_short_are_told() -> None:
    text = "\n".join(warnings(config(4, **FILL, train_iters=5, profile_pipeline="x.png")))
    assert "--fill-explicit-bubbles has no effect in 5 iterations" in text
    assert "--profile-pipeline has no effect in 5 iterations: it needs 10" in text
    assert not list(warnings(config(4, **FILL, train_iters=10, profile_pipeline="x.png")))


def test_data_are_there_for_the_largest_fill() -> None:
    assert most_fill(config(4), 6) == 0
    assert most_fill(config(4, **FILL, backward_forward_ratio=2.0), 6) == 3  # exits on stages 1 and 2: 1 + 2
    assert most_fill(config(4, **FILL), 6) == 6


# Unbiased


def gradients_of_draws(
    cfg: RunConfig, plan: Plan, num_draws: int, num_batches: int, most_fill: int, one_divisor: bool
) -> dict[str, torch.Tensor]:
    """[draws, elements] of some parameters' gradients, each draw of other microbatches out of the same `num_batches`.

    most_fill: draw so many for fill, so that the batch is the same whether a plan has fill or not. one_divisor: every
    pass counts 1 / N, whichever stages it reaches (the original's weights)."""

    from megatron.early_exit.schedules.rank_plan import PassCounts
    from tests.distributed.parallel_model import (
        build_with_reference_parameters,
        global_name,
        iterators,
        layout,
        plan_runtime,
    )
    from tests.reference import make_batches

    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        runtime = plan_runtime(cfg, model, plan)
        if one_divisor:
            runtime.rank_plan.counts = [PassCounts(plan.num_microbatches, plan.num_microbatches, gradient_factor=1.0)]
        batches = make_batches(cfg, VOCAB_SIZE, num_batches)
        generator = torch.Generator().manual_seed(5)
        draws: dict[str, list[torch.Tensor]] = {}
        for _ in range(num_draws):
            numbers = torch.randint(0, num_batches, (plan.num_microbatches + most_fill,), generator=generator).tolist()
            batch, fill = numbers[: plan.num_microbatches], numbers[plan.num_microbatches :]
            # In the order in which they are drawn.
            numbers = [*fill[: plan.num_fill_warmup], *batch, *fill[plan.num_fill_warmup : plan.num_fill]]
            for chunk in model.wrapped:
                chunk.zero_grad_buffer()
            model.exit_losses.begin_iteration(plan.num_microbatches, cfg.exits.weights_at(10**9))
            runtime.run(iterators(model, [batches[i] for i in numbers]), micro_batch_size=2, seq_length=12)
            for name, parameter in model.chunks[0].named_parameters():
                if name.endswith(("linear_fc2.weight", "norm.weight")):
                    values = parameter.main_grad.flatten()[:64].double().clone()
                    draws.setdefault(global_name(cfg, model.chunks[0], name), []).append(values)
        return {name: torch.stack(values) for name, values in draws.items()}


def test_filled_bubbles_are_unbiased_and_vary_less() -> None:
    """Microbatches are drawn from few, so that the expected gradient is known: that of all of them, by plain autograd.
    The mean over many draws meets it within its standard error on every stage; with one divisor for all passes, as the
    original has it, the same test fails."""
    from tests.reference import ReferenceModel, make_batches

    num_batches, num_draws = 2, 80
    cfg = config(3, exit_layer_nums=(2, 4), exit_layer_weight=(1.0, 1.0), use_exit_norm=True)
    filled = build_plan(config(3, exit_layer_nums=(2, 4), backward_forward_ratio=3.0, **FILL), 3)
    assert filled.num_fill_warmup and filled.num_fill_cooldown
    plain = build_plan(cfg, 3)
    expected, _ = ReferenceModel(cfg, VOCAB_SIZE).gradients(make_batches(cfg, VOCAB_SIZE, num_batches), (1.0, 1.0))
    spread: dict[str, dict[str, float]] = {}
    wrong_stages: list[int] = []
    for case, plan in (("plain", plain), ("filled", filled), ("one divisor", filled)):
        ranks = run_distributed(
            3, gradients_of_draws, cfg=cfg, plan=plan, num_draws=num_draws, num_batches=num_batches,
            most_fill=filled.num_fill, one_divisor=case == "one divisor",
        )  # fmt: skip
        for stage, draws in enumerate(ranks):
            scores = {name: z_score(values, expected[name]) for name, values in draws.items()}
            if case == "one divisor":
                if set(plan.microbatches(stage, Kind.BACKWARD)) & {*plan.fill_warmup, *plan.fill_cooldown}:
                    assert min(scores.values()) > 3, (stage, scores)
                    wrong_stages.append(stage)
                continue
            assert scores and max(scores.values()) < 2, (case, stage, scores)
            spread.setdefault(case, {}).update({name: values.var(dim=0).sum().item() for name, values in draws.items()})
    assert wrong_stages == [0, 2]  # in the middle nothing is filled
    ratios: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for name, value in spread["filled"].items():
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers") else 5
        ratios[layer // 2].append(value / spread["plain"][name])
    assert max(ratios[2]) < 0.9, ratios  # N + 1 of N microbatches
    assert all(ratio == pytest.approx(1.0) for ratio in ratios[1]), ratios
    assert sum(ratios[0]) / len(ratios[0]) < 1.0, ratios  # the exit's share of the gradient alone has a sample more


def z_score(draws: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square over elements of (mean of draws - expected) / standard error; about 1 without bias."""
    error = draws.mean(dim=0) - expected.flatten()[: draws.size(1)].double()
    standard_error = draws.std(dim=0) / draws.size(0) ** 0.5
    return (error / standard_error.clamp(min=1e-12)).pow(2).mean().sqrt().item()
