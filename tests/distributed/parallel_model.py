"""Runs on workers: the parallel model with the reference's parameters, and comparisons of its gradients."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.model.build import Model, build_model
from megatron.early_exit.model.exit_strategies import Deferred, Evaluation
from megatron.early_exit.platform.distributed import initialize_model_parallel
from megatron.early_exit.schedules.iteration import RankModel
from megatron.early_exit.schedules.links import StageLinks
from megatron.early_exit.schedules.plan import Plan
from megatron.early_exit.schedules.runtime import PlanRuntime
from megatron.early_exit.training.core_config import connect_core_config
from megatron.early_exit.training.forward_step import forward_step
from megatron.early_exit.training.step import run_schedule
from tests.configs import VOCAB_SIZE
from tests.reference import ReferenceBatch, ReferenceModel, make_batches, parameter_value


@contextmanager
def layout(cfg: RunConfig) -> Iterator[None]:
    """Core's process groups for one case."""
    initialize_model_parallel(cfg.parallel, cfg.model.num_layers, seed=1)
    try:
        yield
    finally:
        release_models()
        parallel_state.destroy_model_parallel()


def release_models() -> None:
    """Free the models of the case. DDP's hooks hang on nodes of autograd, where the garbage collector does not look."""
    for instance in gc.get_objects():
        if issubclass(type(instance), DistributedDataParallel):  # a dead proxy would be asked for its class
            instance.grad_accs.clear()
            for parameter in instance.parameters():
                parameter.main_grad = parameter.grad = None
    gc.collect()


def global_name(cfg: RunConfig, chunk: torch.nn.Module, name: str) -> str:
    """Name of a chunk's parameter in the reference: global layer index; copies under the weight that they follow."""
    if name == "exit_output_layer.weight" or (
        name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
    ):
        tied = not cfg.model.untie_embeddings_and_output_weights
        return "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    return f"decoder.layers.{chunk.decoder.layers[int(match[1])].layer_number - 1}.{match[2]}"


def shard(cfg: RunConfig, name: str, full: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """This TP rank's part of a full tensor."""
    tp_size, tp_rank = cfg.parallel.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    if not getattr(parameter, "tensor_model_parallel", False) or tp_size == 1:
        return full
    if cfg.model.swiglu and "linear_fc1" in name:
        return torch.cat([half.chunk(tp_size, 0)[tp_rank] for half in full.chunk(2, 0)])
    return full.chunk(tp_size, parameter.partition_dim)[tp_rank]


def full_shape(cfg: RunConfig, parameter: torch.nn.Parameter) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= cfg.parallel.tensor_model_parallel_size
    return tuple(shape)


@torch.no_grad()
def load_reference_parameters(cfg: RunConfig, model: Model) -> None:
    for chunk in model.chunks:
        for local_name, parameter in chunk.named_parameters():
            name = global_name(cfg, chunk, local_name)
            parameter.copy_(shard(cfg, name, parameter_value(name, full_shape(cfg, parameter)), parameter))


def build_with_reference_parameters(cfg: RunConfig, **kwargs: bool) -> Model:
    model = build_model(cfg, VOCAB_SIZE, **kwargs)
    load_reference_parameters(cfg, model)
    connect_core_config(model)
    return model


def iterators(model: Model, batches: list[ReferenceBatch]) -> list[Iterator | None]:
    """One iterator per chunk; chunks that need no data get none."""
    needs_data = lambda c: c.pre_process or c.post_process or c.exit_heads() or batches[0].attention_mask is not None
    return [iter(batches) if needs_data(chunk) else None for chunk in model.chunks]


def plan_runtime(cfg: RunConfig, model: Model, plan: Plan) -> PlanRuntime:
    """This rank's part of a plan over the model's chunks."""
    return PlanRuntime(
        plan,
        parallel_state.get_pipeline_model_parallel_rank(),
        RankModel(
            model.config, model.wrapped, model.exit_losses,
            StageLinks(is_interleaved=plan.num_chunks > 1, timeout_minutes=1), forward_step,
        ),
        cfg.exit_stages,
    )  # fmt: skip


def my_batches(batches: list[ReferenceBatch]) -> list[ReferenceBatch]:
    return batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def reduced_statistics(model: Model) -> Tensor:
    """[exits + 1, NUM_STATISTICS] over all stages and replicas."""
    statistics = model.exit_losses.statistics.clone()
    torch.distributed.all_reduce(statistics, group=parallel_state.get_data_parallel_group())
    torch.distributed.all_reduce(statistics, group=parallel_state.get_pipeline_model_parallel_group())
    return statistics


def run_batches(
    cfg: RunConfig,
    model: Model,
    batches: list[ReferenceBatch],
    weights: tuple[float, ...],
    evaluates: bool = False,
    iteration: int = 0,
) -> None:
    mine = my_batches(batches)
    model.exit_losses.begin_iteration(len(mine), weights, iteration)
    run_schedule(
        model,
        iterators(model, mine),
        Evaluation(model.exit_losses) if evaluates else Deferred(model.exit_losses),
        num_microbatches=len(mine),
        micro_batch_size=cfg.training.micro_batch_size,
        seq_length=cfg.training.seq_length,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-8)).item()


def compare_with_reference(
    cfg: RunConfig,
    num_microbatches: int = 4,
    weights: tuple[float, ...] | None = None,
    iterations: int = 1,
    tolerance: float = 2e-5,
    masked: bool = True,
    attention_mask: Tensor | None = None,
) -> None:
    """Losses and gradients of every parameter equal plain autograd's. num_microbatches: of the global batch."""
    weights = cfg.exits.weights_at(10**9) if weights is None else weights
    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        for iteration in range(iterations):
            for chunk in model.wrapped:
                chunk.zero_grad_buffer()
            model.exit_losses.reset_statistics()
            batches = make_batches(cfg, VOCAB_SIZE, num_microbatches, seed=iteration, masked=masked)
            if attention_mask is not None:
                batches = [batch._replace(attention_mask=attention_mask) for batch in batches]
            run_batches(cfg, model, batches, weights, iteration=iteration)
            reference = ReferenceModel(cfg, VOCAB_SIZE)
            gradients, losses = reference.gradients(batches, weights, iteration)
            statistics = reduced_statistics(model)
            mean_losses = statistics[:, 0] / statistics[:, 1]
            assert torch.allclose(mean_losses, losses.double(), rtol=1e-5), (mean_losses, losses)
            compare_gradients(cfg, model, gradients, tolerance)


def compare_gradients(cfg: RunConfig, model: Model, gradients: dict[str, Tensor], tolerance: float) -> None:
    seen = set()
    for chunk in model.chunks:
        for local_name, parameter in chunk.named_parameters():
            name = global_name(cfg, chunk, local_name)
            seen.add(name)
            expected = shard(cfg, name, gradients[name], parameter)
            error = relative_error(parameter.main_grad, expected)
            assert error < tolerance, f"{name}: gradient is off by {error:.2e} of its largest entry"
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, seen)
    assert set().union(*everyone) == set(gradients), set().union(*everyone) ^ set(gradients)
