"""Runs on workers: whole training runs, and what the tests ask of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.model.build import Model, build_model
from megatron.early_exit.training.core_config import connect_core_config
from megatron.early_exit.training.optimizer import build_optimizer, build_scheduler
from megatron.early_exit.training.pretrain import build_run, train
from megatron.early_exit.training.step import StepResult, train_step
from tests.configs import VOCAB_SIZE
from tests.distributed.parallel_model import (
    build_with_reference_parameters,
    global_name,
    iterators,
    layout,
    load_reference_parameters,
    my_batches,
    release_models,
)
from tests.reference import ReferenceBatch, make_batches


def training_run(cfg: RunConfig) -> str:
    """Train as configured; returns a digest of this rank's final parameters."""
    try:
        run = build_run(cfg)
        try:
            train(run)
            digest = hashlib.sha256()
            for chunk in run.model.chunks:
                for parameter in chunk.parameters():
                    digest.update(parameter.detach().float().numpy().tobytes())
            return digest.hexdigest()
        finally:
            run.close()
    finally:
        release_models()
        parallel_state.destroy_model_parallel()  # a case may run several


def step_over(cfg: RunConfig, model: Model, optimizer: MegatronOptimizer, batches: list[ReferenceBatch]) -> StepResult:
    """One optimizer step over this replica's microbatches, with the final exit weights."""
    return train_step(
        model,
        optimizer,
        iterators(model, batches),
        exit_weights=cfg.exits.weights_at(10**9),
        num_microbatches=len(batches),
        micro_batch_size=cfg.training.micro_batch_size,
        seq_length=cfg.training.seq_length,
    )


def gradient_norm(cfg: RunConfig, num_microbatches: int = 4, to_device: Callable[[list], list] = list) -> float | None:
    """Global gradient norm of one step from the reference's parameters, without loss scale."""
    with layout(cfg):
        model = build_model(cfg, VOCAB_SIZE)
        load_reference_parameters(cfg, model)
        optimizer = build_optimizer(cfg, model)
        connect_core_config(model, optimizer)
        optimizer.reload_model_params()
        batches = to_device(my_batches(make_batches(cfg, VOCAB_SIZE, num_microbatches)))
        return step_over(cfg, model, optimizer, batches).grad_norm


def parameters_after_steps(cfg: RunConfig, num_steps: int, num_microbatches: int = 4) -> dict[str, torch.Tensor]:
    """Train from the reference's parameters; returns this rank's parameters by local name of each chunk."""
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        optimizer = build_optimizer(cfg, model)
        connect_core_config(model, optimizer)
        optimizer.reload_model_params()
        build_scheduler(cfg, optimizer, global_batch_size=8)  # gives norms and biases no weight decay
        for step in range(num_steps):
            batches = my_batches(make_batches(cfg, VOCAB_SIZE, num_microbatches, seed=step))
            step_over(cfg, model, optimizer, batches)
        return {
            global_name(cfg, chunk, name): parameter.detach().clone()
            for chunk in model.chunks
            for name, parameter in chunk.named_parameters()
        }
