"""Tuning towards the final head over any layout: gradients are plain autograd's, weights those of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.run import RunConfig
from tests.configs import VOCAB_SIZE
from tests.distributed.test_tuning import HEADS, TP2, UNTIED, tuning_config
from tests.distributed.workers import run_distributed

PP2, PP4 = ({"pipeline_model_parallel_size": size} for size in (2, 4))
SP = {**TP2, "sequence_parallel": True}
MLP, BLOCK, OUTPUT = HEADS["mlp"], HEADS["block"], {"untie_exit_output_weights": True}


def compare_with_reference(cfg: RunConfig, num_microbatches: int) -> None:
    """Gradients and losses of the exits are those of their divergence from the final head, by plain autograd."""
    from megatron.early_exit.training.plans import PlannedPipeline
    from megatron.early_exit.training.step import accumulate_gradients
    from tests.distributed.parallel_model import (
        build_with_reference_parameters,
        global_name,
        iterators,
        layout,
        my_batches,
        reduced_statistics,
        relative_error,
        shard,
    )
    from tests.reference import ReferenceModel, make_batches

    weights = cfg.exits.weights_at(10**9)
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        batches = make_batches(cfg, VOCAB_SIZE, num_microbatches)
        mine = my_batches(batches)
        accumulate_gradients(
            model, iterators(model, mine), exit_weights=weights, num_microbatches=len(mine),
            micro_batch_size=cfg.training.micro_batch_size, seq_length=cfg.training.seq_length,
            planned=PlannedPipeline(cfg, model, print),
        )  # fmt: skip
        reference = ReferenceModel(cfg, VOCAB_SIZE)
        losses = [reference_objective(cfg, reference, batch) for batch in batches]
        sum(objective for objective, _ in losses).div(len(batches)).backward()
        statistics = reduced_statistics(model)
        of_labels = sum(sums for _, sums in losses)
        assert torch.allclose(statistics[:-1, 0], of_labels.double(), rtol=1e-5) and not statistics[-1].any()
        (chunk,) = model.chunks
        for local_name, parameter in chunk.named_parameters():
            name = global_name(cfg, chunk, local_name)
            if EXIT_HEAD not in name:
                assert not parameter.requires_grad and not hasattr(parameter, "main_grad")
                continue
            expected = shard(cfg, name, reference.params[name].grad, parameter)
            assert expected.any() and relative_error(parameter.main_grad, expected) < 2e-5, name


def reference_objective(cfg: RunConfig, reference: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is differentiated of one microbatch, [exits] sums of the labels' cross-entropy)"""
    share, mask = cfg.training.tune_exit_distillation, batch.loss_mask
    *exits, final = reference.logits(batch)
    teacher = final.detach().log_softmax(-1)
    objective, sums = torch.zeros(()), []
    for index, (logits, weight) in enumerate(zip(exits, cfg.exits.weights_at(10**9), strict=True)):
        labels = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(mask.shape)
        divergence = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
        token_weight = reference.token_weights(batch, index, iteration=0)
        if cfg.exits.use_dynamic_exit_layer_weight:
            token_weight = token_weight * logits.softmax(-1).amax(-1).detach()
        both = (1 - share) * labels + share * divergence
        objective = objective + weight * (both * mask * token_weight).sum() / mask.sum()
        sums.append((labels * mask).sum().detach())
    return objective, torch.stack(sums)


@pytest.mark.parametrize(("world_size", "share", "changes"), [
    (1, 0.4, MLP),
    (1, 1.0, {**MLP, **UNTIED}),
    (2, 1.0, {**MLP, **SP}),
    (2, 0.5, {**MLP, **PP2}),
    (2, 1.0, {**BLOCK, **PP2, "exit_layer_nums": (1, 2)}),  # frozen copy of the embedding; no exit on the last stage
    (2, 0.3, {**OUTPUT, **UNTIED, **PP2}),
    (2, 1.0, {**HEADS["norm"], **UNTIED, **PP2, "exit_layer_nums": (3, 4)}),
    (2, 1.0, {**HEADS["dynamic"], **PP2}),
    (2, 0.5, {**HEADS["pre_exit"], **PP2, "exit_layer_nums": (2, 3)}),
    (4, 0.5, {**MLP, **PP4}),  # nothing comes back to stage 0
    (4, 1.0, {**BLOCK, **UNTIED, **PP4, "exit_layer_nums": (1, 3)}),  # stage 1 passes on
    (4, 0.7, {**MLP, **PP2, **SP}),
    (4, 1.0, {**OUTPUT, **UNTIED, **PP2, **TP2, "exit_layer_nums": (2,)}),
    (4, 0.5, {**MLP, **PP2}),
], ids=str)  # fmt: skip
def test_gradients_are_those_of_plain_autograd(world_size: int, share: float, changes: dict) -> None:
    cfg = tuning_config(tune_exit_distillation=share, **changes)
    num_microbatches = 10 if world_size == 4 else 3
    run_distributed(world_size, compare_with_reference, cfg=cfg, num_microbatches=num_microbatches)
