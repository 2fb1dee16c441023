"""What happens after the gradients: loss scale, clipping, optimizer steps, copies that stay equal."""

from __future__ import annotations

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from tests.configs import VOCAB_SIZE, make_config
from tests.distributed.training_runs import gradient_norm, parameters_after_steps
from tests.distributed.workers import run_distributed
from tests.reference import ReferenceModel, make_batches

PP2 = {"pipeline_model_parallel_size": 2}
VP2 = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}


def reference_after_steps(cfg: RunConfig, num_steps: int, num_microbatches: int = 4) -> dict[str, torch.Tensor]:
    """Plain AdamW with clipping on one process. Norms and biases have no weight decay."""
    model = ReferenceModel(cfg, VOCAB_SIZE)
    model.gradients(make_batches(cfg, VOCAB_SIZE, 1), cfg.exits.weights_at(10**9))  # creates the parameters
    settings = cfg.optimizer
    decayed = [p for p in model.params.values() if p.dim() > 1]
    others = [p for p in model.params.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps,
    )  # fmt: skip
    for step in range(num_steps):
        optimizer.zero_grad()
        model.gradients(make_batches(cfg, VOCAB_SIZE, num_microbatches, seed=step), cfg.exits.weights_at(10**9))
        torch.nn.utils.clip_grad_norm_(model.params.values(), settings.clip_grad)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.params.items()}


@pytest.mark.parametrize(("world_size", "settings"), [
    (1, {}),
    (2, {"use_distributed_optimizer": True}),
    (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
    (2, {**VP2}),
    (3, {"pipeline_model_parallel_size": 3, "num_layers": 6, "exit_layer_nums": (2, 4)}),
    (4, {**VP2, "use_distributed_optimizer": True}),
    (4, {**PP2, "use_distributed_optimizer": True, "overlap_grad_reduce": True}),
    (4, {**PP2, "untie_embeddings_and_output_weights": True, "use_distributed_optimizer": True}),
], ids=str)  # fmt: skip
def test_steps_equal_plain_adamw(world_size: int, settings: dict) -> None:
    """Clipping included, which needs the right norm: every copy of the output weight counted once."""
    # A large epsilon: Adam would blow rounding up to the size of a step where gradients are tiny.
    cfg = make_config(clip_grad=0.5, weight_decay=0.1, adam_eps=0.1, lr=0.1, lr_decay_style="constant",
                      train_iters=3, **settings)  # fmt: skip
    expected = reference_after_steps(cfg, num_steps=3)
    seen = set()
    for parameters in run_distributed(world_size, parameters_after_steps, cfg=cfg, num_steps=3):
        for name, value in parameters.items():
            seen.add(name)
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert seen == set(expected)


@pytest.mark.parametrize(("world_size", "settings"), [(1, {}), (2, PP2)], ids=str)
def test_fp16_gradients_do_not_depend_on_the_loss_scale(world_size: int, settings: dict) -> None:
    """Exit losses are scaled like the final loss (the original scaled the final loss only)."""
    norms = []
    for scale in (1.0, 1024.0):
        cfg = make_config(fp16=True, loss_scale=scale, accumulate_allreduce_grads_in_fp32=True,
                          exit_layer_weight=(30.0, 30.0), **settings)  # fmt: skip
        norms.append(run_distributed(world_size, gradient_norm, cfg=cfg)[0])
    in_fp32 = run_distributed(world_size, gradient_norm, cfg=make_config(exit_layer_weight=(30.0, 30.0), **settings))[0]
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)
    assert norms[1] == pytest.approx(in_fp32, rel=2e-2)


def test_bf16_gradient_norm_is_near_that_of_fp32() -> None:
    bf16 = run_distributed(2, gradient_norm, cfg=make_config(bf16=True, **PP2))[0]
    assert bf16 == pytest.approx(run_distributed(2, gradient_norm, cfg=make_config(**PP2))[0], rel=3e-2)


@pytest.mark.parametrize("settings", [
    {"exit_layer_weight": (2.5, 5.0)},
    {"exit_layer_nums": (2,), "exit_layer_weight": (1.0,)},
    {"exit_layer_temperature": (3.0,)},
], ids=str)  # fmt: skip
def test_exit_settings_change_the_gradient(settings: dict) -> None:
    base = run_distributed(1, gradient_norm, cfg=make_config())[0]
    assert run_distributed(1, gradient_norm, cfg=make_config(**settings))[0] != pytest.approx(base, rel=1e-3)
