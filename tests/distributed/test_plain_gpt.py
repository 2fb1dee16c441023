"""With exits off, the model is core's GPT; with exits on, its final loss is still core's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.model.build import transformer_config
from megatron.early_exit.model.layer_specs import block_spec
from tests.configs import VOCAB_SIZE, make_config
from tests.distributed.parallel_model import build_with_reference_parameters, layout, run_batches
from tests.distributed.workers import run_distributed
from tests.reference import make_batches


def names_and_losses(cfg: RunConfig) -> tuple[dict, dict, float, float]:
    """(core's parameter shapes, ours, core's mean loss, ours) on one process."""
    with layout(cfg):
        ours = build_with_reference_parameters(cfg)
        core_config = transformer_config(cfg.build)
        core = GPTModel(
            config=core_config,
            transformer_layer_spec=block_spec(
                core_config, make_config(exit_layer_nums=(), exit_layer_weight=()).exits, ours.exit_losses, VOCAB_SIZE,
                cfg.model,
            ),
            vocab_size=VOCAB_SIZE,
            max_sequence_length=cfg.training.seq_length,
            share_embeddings_and_output_weights=not cfg.model.untie_embeddings_and_output_weights,
            position_embedding_type=cfg.model.position_embedding_type,
        )  # fmt: skip
        mine = dict(ours.chunks[0].named_parameters())
        for name, parameter in core.named_parameters():
            parameter.data.copy_(mine[name].data)
        batches = make_batches(cfg, VOCAB_SIZE, 2)
        with torch.no_grad():
            token_losses = [
                (core(b.tokens, b.position_ids, None, labels=b.labels) * b.loss_mask).sum() for b in batches
            ]
        run_batches(cfg, ours, batches, cfg.exits.weights_at(10**9))
        loss_sum, tokens, *_ = ours.exit_losses.statistics[-1]
        expected = sum(token_losses) / sum(b.loss_mask.sum() for b in batches)
        shapes = lambda model: {name: tuple(p.shape) for name, p in model.named_parameters()}
        return shapes(core), shapes(ours.chunks[0]), float(expected), float(loss_sum / tokens)


@pytest.mark.parametrize("settings", [
    {},
    {"untie_embeddings_and_output_weights": True},
    {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "add_bias_linear": True,
     "swiglu": False},
], ids=str)  # fmt: skip
def test_no_exits_is_cores_gpt(settings: dict) -> None:
    cfg = make_config(exit_layer_nums=(), exit_layer_weight=(), **settings)
    core_shapes, our_shapes, core_loss, our_loss = run_distributed(1, names_and_losses, cfg=cfg)[0]
    assert our_shapes == core_shapes
    assert our_loss == pytest.approx(core_loss, rel=1e-6)


def test_exits_do_not_change_the_final_loss() -> None:
    cfg = make_config(use_exit_norm=True)
    core_shapes, our_shapes, core_loss, our_loss = run_distributed(1, names_and_losses, cfg=cfg)[0]
    assert set(our_shapes) - set(core_shapes) == {
        "decoder.layers.1.exit_head.norm.weight",
        "decoder.layers.2.exit_head.norm.weight",
    }
    assert our_loss == pytest.approx(core_loss, rel=1e-6)


def evaluated_statistics(cfg: RunConfig) -> torch.Tensor:
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        for chunk in model.wrapped:
            chunk.eval()
        from tests.distributed.parallel_model import reduced_statistics

        with torch.no_grad():
            run_batches(cfg, model, make_batches(cfg, VOCAB_SIZE, 4), (0.0, 0.0), evaluates=True)
        return reduced_statistics(model)


@pytest.mark.parametrize("head", [{}, {"use_exit_mlp": True}, {"use_exit_block": True}, {"pre_exit": True}], ids=str)
def test_validation_counts_all_exits_on_all_stages(head: dict) -> None:
    """The original evaluated the final loss only, and lost the exits of other stages than the last."""
    from tests.reference import ReferenceModel

    cfg = make_config(pipeline_model_parallel_size=2, **head)
    statistics = run_distributed(2, evaluated_statistics, cfg=cfg)[0]
    batches = make_batches(cfg, VOCAB_SIZE, 4)
    reference = ReferenceModel(cfg, VOCAB_SIZE)
    losses, correct = torch.zeros(3), torch.zeros(3)
    for batch in batches:
        losses += torch.stack(reference.losses(batch)[1])
        for position, logits in enumerate(reference.logits(batch)):
            correct[position] += ((logits.argmax(-1) == batch.labels) * batch.loss_mask).sum()
    torch.testing.assert_close(statistics[:, 0], losses.double(), rtol=1e-5, atol=0)
    assert statistics[:, 1].tolist() == [sum(b.loss_mask.sum().item() for b in batches)] * 3
    assert statistics[:, 2].tolist() == correct.tolist()
