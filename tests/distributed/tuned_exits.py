"""Exits that are tuned, with distillation or without, against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import with_tuned_stages
from megatron.early_exit.model import sizes
from tests.configs import VOCAB_SIZE, make_config

ITERATION = 7
"""On which the tokens that exits learn from depend."""

_IN_PLACE = {torch.ops.aten.addmm_: lambda _, one, other, **__: 2 * one[0] * one[1] * other[1]}
"""Products that PyTorch does not count: of shapes [n, m] and [m, k]."""


def tuning_config(**changes: Any) -> RunConfig:
    if "exit_layer_nums" in changes:
        weights = tuple(0.5 + 0.25 * i for i in range(len(changes["exit_layer_nums"])))
        changes = {"exit_layer_weight": weights, **changes}
    return with_tuned_stages(make_config(tune_exit=True, **changes))


class Expected(NamedTuple):
    """Of one microbatch."""

    objective: Tensor
    """What is differentiated, a scalar."""
    sums: Tensor
    """[exits, 3]: over the tokens that an exit learns from, cross-entropy, number, divergence from the final head."""


def compare_with_reference(cfg: RunConfig, num_microbatches: int = 4, checkpoint: Path | None = None) -> dict[str, Any]:
    """Gradients of the exits, and what is reported of them, are plain autograd's, and what runs is what `model.sizes`
    says; returns what this rank has built.

    checkpoint: folder to load the reference's parameters from; otherwise they are set."""
    from megatron.early_exit.model.build import build_model
    from megatron.early_exit.training.loading import load_checkpoint
    from megatron.early_exit.training.planned_pipeline import PlannedPipeline
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

    with layout(cfg):
        if checkpoint is None:
            model = build_with_reference_parameters(cfg)
        else:
            model = build_model(cfg, VOCAB_SIZE)
            load_checkpoint(checkpoint, cfg, model)
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        batches = make_batches(cfg, VOCAB_SIZE, num_microbatches)
        mine = my_batches(batches)
        planned = PlannedPipeline(cfg, model, print) if cfg.training.tune_exit_distillation else None
        with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
            accumulate_gradients(
                model, iterators(model, mine), exit_weights=cfg.exits.weights_at(10**9), num_microbatches=len(mine),
                iteration=ITERATION, micro_batch_size=cfg.training.micro_batch_size,
                seq_length=cfg.training.seq_length, planned=planned,
            )  # fmt: skip
        reference = ReferenceModel(cfg, VOCAB_SIZE)
        expected = [expected_of(cfg, reference, batch) for batch in batches]
        sum(one.objective for one in expected).div(len(batches)).backward()
        statistics, sums = reduced_statistics(model), sum(one.sums for one in expected).double()
        if not cfg.training.tune_exit_distillation:
            sums[:, 2] = 0  # nobody knows it
        torch.testing.assert_close(statistics[:-1][:, [0, 1, 3]], sums, rtol=1e-5, atol=2e-5)
        assert not statistics[-1].any()
        (chunk,) = model.chunks
        for local_name, parameter in chunk.named_parameters():
            name = global_name(cfg, chunk, local_name)
            if EXIT_HEAD not in name:
                assert not parameter.requires_grad and parameter.grad is None and not hasattr(parameter, "main_grad")
                continue
            gradient = shard(cfg, name, reference.params[name].grad, parameter)
            assert gradient.any() and relative_error(parameter.main_grad, gradient) < 2e-5, name
        compare_flops(cfg, counter, num_microbatches)
        return {
            "layers": [layer.layer_number for layer in chunk.decoder.layers],
            "exits": sum(EXIT_HEAD in name for name, _ in chunk.named_parameters()),
            "has_final_head": chunk.decoder.final_layernorm is not None or hasattr(chunk, "output_layer"),
        }


def expected_of(cfg: RunConfig, reference: Any, batch: Any) -> Expected:
    """By the definition of what exits learn from."""
    share, mask = cfg.training.tune_exit_distillation, batch.loss_mask
    *exits, final = reference.logits(batch)
    teacher = final.detach().log_softmax(-1)
    objective, sums = torch.zeros(()), []
    for index, (logits, weight) in enumerate(zip(exits, cfg.exits.weights_at(10**9), strict=True)):
        labels = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(mask.shape)
        divergence = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
        token_weight = reference.token_weights(batch, index, ITERATION)
        counted = mask * (token_weight > 0)
        sums.append(torch.stack([(labels * counted).sum(), counted.sum(), (divergence * counted).sum()]).detach())
        if cfg.exits.use_dynamic_exit_layer_weight:
            token_weight = token_weight * logits.softmax(-1).amax(-1).detach()
        both = (1 - share) * labels + share * divergence
        objective = objective + weight * (both * mask * token_weight).sum() / mask.sum()
    return Expected(objective, torch.stack(sums))


def compare_flops(cfg: RunConfig, counter: FlopCounterMode, num_microbatches: int) -> None:
    """Products with weights, over all ranks; attention, which core computes as it likes, is left out."""
    aten = torch.ops.aten
    counts = counter.get_flop_counts()["Global"]
    done = torch.tensor([float(sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.addmm_)))])
    torch.distributed.all_reduce(done)
    attention = 6 * cfg.model.num_attention_heads * cfg.model.head_size * cfg.training.seq_length
    blocks = sum(head.block for head in cfg.exits.heads)
    share = cfg.training.tune_exit_distillation
    layers = cfg.build.num_built_layers * (sizes.layer_flops_per_token(cfg) - attention) / 3
    exits = sum(sizes.tuned_exit_flops_per_token(cfg, index, VOCAB_SIZE, share) for index in range(cfg.exits.num_exits))
    tokens = num_microbatches * sizes.microbatch_tokens(cfg)
    assert done.item() == tokens * (layers + exits - blocks * attention)
