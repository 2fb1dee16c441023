"""Exits that learn from a fraction of the tokens: gradients are plain autograd's over the same tokens in every layout
and schedule, those of all tokens on average, and validation is over all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.schedules.builders import interleaved, one_f_one_b, with_exits_in_bubbles
from megatron.early_exit.schedules.fill import with_filled_bubbles
from tests.configs import VOCAB_SIZE, make_config
from tests.distributed import test_plan_runtime as plans
from tests.distributed import test_tuning as tuning
from tests.distributed.test_gradients import HEADS, LAYOUTS, check
from tests.distributed.tuned_exits import compare_with_reference, tuning_config
from tests.distributed.workers import run_distributed
from tests.reference import ReferenceModel, make_batches

HALF = {"exit_loss_token_fraction": (0.5,)}
EACH = {"exit_loss_token_fraction": (0.3, 0.7)}
"""Of 24 tokens 7 and 17."""
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("head", ["untied_norm", "mlp", "block_tied", "pre_exit"])
@pytest.mark.parametrize("layout", ["single", "tp2", "sp2"])
def test_heads(layout: str, head: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, **settings, **HEADS[head], **EACH)


@pytest.mark.parametrize(("layout", "changes"), [
    ("pp2", {}),
    ("pp2_vp2", RECOMPUTE),
    ("dp2", {"calculate_per_token_loss": True}),
    ("pp2", {"calculate_per_token_loss": True}),
    ("sp2_pp2", {"use_dynamic_exit_layer_weight": True, "exit_layer_temperature": (0.5, 2.0)}),
], ids=str)  # fmt: skip
def test_schedules_and_weights(layout: str, changes: dict) -> None:
    """Masks are unequal; every iteration draws anew."""
    world_size, settings = LAYOUTS[layout]
    check(world_size, run={"iterations": 2}, **settings, **HEADS["tied_norm"], **EACH, **changes)


def test_one_token_of_each_microbatch() -> None:
    check(1, exit_loss_token_fraction=(0.001,), use_exit_norm=True)


def test_plans() -> None:
    """Exits in idle time and filled bubbles: its scaling multiplies."""
    cfg = plans.config(4, use_exit_norm=True, **EACH)
    stages = plans.exit_stages(cfg)
    plan = with_exits_in_bubbles(with_filled_bubbles(4, 6, stages), stages)
    assert plan.num_fill_warmup and plan.num_fill_cooldown
    run_distributed(4, plans.run_plan, cfg=cfg, plan=plan, iterations=2)


def test_interleaved_plan_with_exits_in_idle_time() -> None:
    cfg = plans.config(2, num_layers_per_virtual_pipeline_stage=1, use_exit_mlp=True, **EACH)
    plan = with_exits_in_bubbles(interleaved(2, 2, 4), plans.exit_stages(cfg))
    run_distributed(2, plans.run_plan, cfg=cfg, plan=plan)


def test_a_plan_under_tensor_and_sequence_parallelism() -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    cfg = plans.config(2, use_exit_norm=True, **parallel, **EACH)
    plan = with_exits_in_bubbles(one_f_one_b(2, 4), plans.exit_stages(cfg))
    run_distributed(4, plans.run_plan, cfg=cfg, plan=plan)


@pytest.mark.parametrize(("layout", "head"), [
    ("dp 2", "mlp"), ("tp 2, sequence parallel", "block"), ("two of two stages", "mlp"), ("dp 2", "dynamic"),
])  # fmt: skip
def test_tuning(layout: str, head: str) -> None:
    world_size, changes = tuning.LAYOUTS[layout]
    cfg = tuning_config(**{**tuning.HEADS[head], "untie_exit_output_weights": True}, **changes, **EACH)
    run_distributed(world_size, compare_with_reference, cfg=cfg)


@pytest.mark.parametrize("layout", ["single", "tp2", "sp2"])
def test_tuning_with_distillation(layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    cfg = tuning_config(**tuning.HEADS["mlp"], tune_exit_distillation=0.4, **changes, **EACH)
    run_distributed(world_size, compare_with_reference, cfg=cfg, num_microbatches=3)


def _gradients_of(cfg: RunConfig, model: Any, batches: list, iteration: int) -> dict[str, Tensor]:
    from tests.distributed.parallel_model import global_name, run_batches

    (chunk,) = model.chunks
    model.wrapped[0].zero_grad_buffer()
    run_batches(cfg, model, batches, cfg.exits.weights_at(10**9), iteration=iteration)
    return {global_name(cfg, chunk, name): p.main_grad.clone() for name, p in chunk.named_parameters()}


def _gradients_of_tokens(cfg: RunConfig, batch: Any, exit_index: int) -> dict[str, Tensor]:
    """[n, ...] of every parameter: those of each unmasked token's loss of one exit, by plain autograd."""
    from torch.nn import functional as F

    reference = ReferenceModel(cfg, VOCAB_SIZE)
    logits = reference.logits(batch)[exit_index]
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")[
        batch.loss_mask.flatten() > 0
    ]
    names, parameters = zip(*reference.params.items(), strict=True)
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in losses]
    return {
        name: torch.stack([value for value in column])
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
        if column[0] is not None
    }


def compare_average(cfg: RunConfig, num_draws: int) -> None:
    """Over many draws: the mean of every entry of the gradient lies around that over all tokens as its standard error
    says, and the variance is that of drawing without replacement. Both by Cochran, Sampling Techniques, theorem 2.2:
    of a sum over n of which n' are drawn, n^2 / n' (1 - n' / n) S^2."""
    from tests.distributed.parallel_model import build_with_reference_parameters, layout

    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        batches = make_batches(cfg, VOCAB_SIZE, 3)  # 0, 15 and 30% are masked
        full, _ = ReferenceModel(make_config(use_exit_norm=True, untie_exit_output_weights=True), VOCAB_SIZE).gradients(
            batches, cfg.exits.weights_at(10**9)
        )
        variances = {name: torch.zeros_like(value) for name, value in full.items()}
        for batch in batches:
            n = int(batch.loss_mask.sum())
            for index, weight in enumerate(cfg.exits.weights_at(10**9)):
                drawn = max(1, round(cfg.exits.token_fraction_of(index) * n))
                scale = weight / n / len(batches)
                for name, values in _gradients_of_tokens(cfg, batch, index).items():
                    variances[name] += scale**2 * n**2 / drawn * (1 - drawn / n) * values.var(0)
        deviations = {name: torch.zeros_like(value) for name, value in full.items()}
        squares = {name: torch.zeros_like(value) for name, value in full.items()}
        for iteration in range(num_draws):
            for name, value in _gradients_of(cfg, model, batches, iteration).items():
                deviations[name] += (value - full[name]) / num_draws
                squares[name] += (value - full[name]) ** 2 / num_draws
    moved = [name for name in full if variances[name].sum() > 1e-12]
    assert {name.split(".")[-2] for name in moved} >= {"norm", "output_layer", "word_embeddings", "linear_fc1"}
    errors = torch.cat([(deviations[name] / (variances[name] / num_draws).sqrt()).flatten() for name in moved])
    errors = errors[torch.isfinite(errors)]
    assert errors.numel() > 10_000
    # Entries hang together, so their mean square varies more than a tenth; none is far off.
    assert errors.square().mean().sqrt() == pytest.approx(1.0, abs=0.35) and errors.abs().max() < 6, errors.abs().max()
    measured = sum(squares[name].sum() for name in moved) / sum(variances[name].sum() for name in moved)
    assert measured == pytest.approx(1.0, abs=0.15), measured


def test_gradients_are_those_of_all_tokens_on_average() -> None:
    cfg = make_config(use_exit_norm=True, untie_exit_output_weights=True, exit_loss_token_fraction=(0.25, 0.5))
    run_distributed(1, compare_average, cfg=cfg, num_draws=200)


def compare_all_and_none(cfg: RunConfig) -> None:
    """Fraction 1 is none, to the last bit; nothing comes from a microbatch without unmasked tokens; one unmasked token
    counts once; validation counts all tokens."""
    from tests.distributed.parallel_model import build_with_reference_parameters, layout, run_batches

    gradients = []
    batches = make_batches(cfg, VOCAB_SIZE, 3)
    masked = [batch._replace(loss_mask=torch.zeros_like(batch.loss_mask)) for batch in batches]
    one_token = torch.zeros_like(batches[0].loss_mask)
    one_token[1, 4] = 1
    lone = [batch._replace(loss_mask=one_token) for batch in batches]
    for fraction in ((), (1.0,), cfg.exits.exit_loss_token_fraction):
        config = make_config(use_exit_norm=True, exit_loss_token_fraction=fraction)
        with layout(config):
            model = build_with_reference_parameters(config)
            gradients.append([_gradients_of(config, model, some, iteration=1) for some in (batches, masked, lone)])
            model.exit_losses.reset_statistics()
            model.eval()
            with torch.no_grad():
                run_batches(config, model, batches, (1.0, 1.0), evaluates=True)
            tokens = sum(batch.loss_mask.sum() for batch in batches)
            assert model.exit_losses.statistics[:, 1].tolist() == [tokens] * 3
    equal = lambda one, two: all(torch.equal(one[name], two[name]) for name in one)
    without, with_one, half = gradients
    assert all(equal(one, two) for one, two in zip(without, with_one, strict=True))
    assert not equal(without[0], half[0])
    assert not any(value.any() for value in half[1].values())
    assert any(value.any() for value in half[2].values())
    for name, value in half[2].items():
        torch.testing.assert_close(value, without[2][name], rtol=1e-5, atol=1e-8)


def test_all_tokens_one_token_and_none() -> None:
    run_distributed(1, compare_all_and_none, cfg=make_config(use_exit_norm=True, **HALF))
