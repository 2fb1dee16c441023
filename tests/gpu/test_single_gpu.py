"""World size 1 on a GPU: NCCL refuses two ranks on one device. Layouts are tested over gloo in tests/distributed/."""

from __future__ import annotations

import pytest
import torch

from tests.configs import VOCAB_SIZE, make_config
from tests.reference import ReferenceBatch, ReferenceModel, make_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]


def on_gpu(batches: list[ReferenceBatch]) -> list[ReferenceBatch]:
    return [ReferenceBatch(*(None if field is None else field.cuda() for field in batch)) for batch in batches]


@pytest.mark.parametrize("head", [{}, {"use_exit_mlp": True}, {"use_exit_block": True}, {"pre_exit": True}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_the_reference(head: dict, recompute: bool) -> None:
    from tests.distributed.parallel_model import (
        build_with_reference_parameters,
        compare_gradients,
        layout,
        run_batches,
    )

    if recompute:
        head = {**head, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    cfg = make_config(use_exit_norm=True, **head)
    weights = cfg.exits.weights_at(10**9)
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        batches = make_batches(cfg, VOCAB_SIZE, 4)
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        run_batches(cfg, model, on_gpu(batches), weights)
        gradients, losses = ReferenceModel(cfg, VOCAB_SIZE).gradients(batches, weights)
        mean_losses = (model.exit_losses.statistics[:, 0] / model.exit_losses.statistics[:, 1]).cpu()
        torch.testing.assert_close(mean_losses, losses.double(), rtol=1e-4, atol=0)
        compare_gradients(cfg, model, {name: value.cuda() for name, value in gradients.items()}, tolerance=1e-3)


def test_bf16_gradient_norm_is_near_that_of_fp32() -> None:
    from tests.distributed.training_runs import gradient_norm

    norms = [gradient_norm(make_config(bf16=bf16), to_device=on_gpu) for bf16 in (False, True)]
    assert norms[1] == pytest.approx(norms[0], rel=3e-2)


def test_exits_need_one_chunk_of_logits_whatever_the_length() -> None:
    from megatron.early_exit.model.cross_entropy import chunk_size
    from tests.distributed.parallel_model import build_with_reference_parameters, layout, run_batches

    def peak(seq_length: int, exits: tuple[int, ...]) -> int:
        cfg = make_config(
            seq_length=seq_length, exit_layer_nums=exits, exit_layer_weight=(0.5,) * len(exits),
            use_exit_norm=bool(exits),
            micro_batch_size=1,
        )  # fmt: skip
        with layout(cfg):
            model = build_with_reference_parameters(cfg)
            batches = on_gpu(make_batches(cfg, VOCAB_SIZE, 2))
            run_batches(cfg, model, batches, cfg.exits.weights_at(0))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run_batches(cfg, model, batches, cfg.exits.weights_at(0))
            return torch.cuda.max_memory_allocated() - before

    chunk_bytes = 4 * chunk_size(VOCAB_SIZE, is_gpu=True) * VOCAB_SIZE
    for seq_length in (4096, 16384):
        assert peak(seq_length, (2, 3)) - peak(seq_length, ()) < chunk_bytes + 64 * seq_length + 2**20
