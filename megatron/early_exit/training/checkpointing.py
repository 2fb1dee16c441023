"""The state that a training checkpoint holds, and how it is loaded; `training/saving.py` writes it.

Core's `torch_dist` format is readable under any TP/PP/DP layout.
"""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron.early_exit.checkpoint.core_loading import load_common, load_sharded
from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.checkpoint.start import (
    loads_optimizer,
    reading,
    tensor_mismatches,
)
from megatron.early_exit.checkpoint.store import CONTENT_METADATA
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.description import MismatchError, ModelDescription
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.run import BuildConfig, ResolvedConfig
from megatron.early_exit.config.serialize import RUN_CONFIG_FILE, checkpoint_folder, load_run_config, read_description
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.model.build import Model, build_model
from megatron.early_exit.model.key_names import stored_key
from megatron.early_exit.platform.optimizer_state import allocate_optimizer_state
from megatron.early_exit.training.state import TrainingState

log = logging.getLogger(__name__)

_OPTIMIZER = "optimizer."
"""Begins the names of the optimizer's tensors in a checkpoint."""


def sharded_state(
    model: Model,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    state: TrainingState | None,
    *,
    with_rng: bool,
    is_loading: bool = False,
) -> dict[str, Any]:
    """What core saves and loads, with the places of all tensors in the whole model."""
    sharded: dict[str, Any] = {
        f"model{index}": chunk.sharded_state_dict(metadata=dict(CONTENT_METADATA))
        for index, chunk in enumerate(model.chunks)
    }
    if optimizer is not None:
        models = {key: value for key, value in sharded.items() if key.startswith("model")}
        sharded["optimizer"] = optimizer.sharded_state_dict(
            models, is_loading=is_loading, metadata=dict(CONTENT_METADATA)
        )
    if scheduler is not None:
        sharded["opt_param_scheduler"] = scheduler.state_dict()
    if state is not None:
        sharded["training_state"] = state.state_dict()
    if with_rng:
        sharded["rng_state"] = _sharded_rng_state()
    return sharded


def keep_exits_alone(sharded_state: dict[str, Any]) -> None:
    """Drop from the model's state what tuning does not change."""
    for key in [key for key in sharded_state if key.startswith("model")]:
        state = sharded_state[key]
        sharded_state[key] = {name: value for name, value in state.items() if EXIT_HEAD in name}


def _sharded_rng_state() -> ShardedObject:
    """Random-number states. They differ over TP and PP and are the same over DP."""
    states = {
        "random": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return ShardedObject("rng_state", states, shape, (pp, tp), replica_id=parallel_state.get_data_parallel_rank())


def _set_rng_state(states: dict[str, Any]) -> None:
    random.setstate(states["random"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def load_checkpoint(
    folder: Path,
    config: ResolvedConfig,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> TrainingState:
    """Load what `config.checkpoint` asks for from `folder` into the model, the optimizer, its schedule and the
    generators. Returns the progress of the run that saved it, or a new one with --finetune.

    The settings are those that `checkpoint.start.find_start` has checked. Raises ValueError if the checkpoint has other
    tensors than its settings say, OSError if it cannot be read."""
    settings = config.checkpoint
    weights_only = settings.finetune
    with reading(folder):
        common = load_common(folder)
    saved_config = load_run_config(folder / RUN_CONFIG_FILE) if "training_state" in common else None
    with_optimizer = optimizer is not None and loads_optimizer(config)
    with_rng = not (weights_only or settings.no_load_rng) and optimizer is not None and saved_config is not None
    if with_rng and not _has_same_model_layout(config.parallel, saved_config.parallel):
        _warnon_rank_zero(
            "random-number states are not loaded: the checkpoint was saved with another tensor or pipeline parallel "
            "size. Dropout continues with other random numbers; nothing else is affected."
        )
        with_rng = False
    if with_rng and saved_config.checkpoint.no_save_rng:
        with_rng = False

    if with_optimizer:
        allocate_optimizer_state(optimizer)
    sharded = sharded_state(
        model, optimizer if with_optimizer else None, None, None, with_rng=with_rng, is_loading=True
    )
    with reading(folder):
        _check_tensors(sharded, folder)
        loaded = load_sharded(sharded, folder)
    for index, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
    if with_optimizer:
        optimizer.load_state_dict(loaded["optimizer"])
    elif optimizer is not None:
        optimizer.reload_model_params()  # the fp32 main weights follow the loaded ones
    if with_rng:
        _set_rng_state(loaded["rng_state"])
    if weights_only or "training_state" not in common:  # a converted checkpoint has weights alone
        return TrainingState()
    if scheduler is not None and not settings.no_load_optim:
        try:
            scheduler.load_state_dict(common["opt_param_scheduler"])
        except AssertionError as error:
            raise ValueError(
                f"the learning-rate schedule of {folder} is not that of the flags ({error}). Keep it with "
                "--use-checkpoint-opt-param-scheduler, or take that of the flags with --override-opt-param-scheduler."
            ) from error
    return TrainingState.from_state_dict(common["training_state"])


def _check_tensors(sharded: dict[str, Any], folder: Path) -> None:
    """Raise MismatchError on all ranks if the checkpoint lacks what some rank wants, or has other shapes."""
    metadata = read_metadata(folder)
    wanted: dict[str, tuple[int, ...] | None] = {}
    for value in nested_values(sharded):
        for tensor in nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(tensor, ShardedTensor):
                key = stored_key(tensor.key, metadata.state_dict_metadata)
                wanted[key] = None if tensor.allow_shape_mismatch else tuple(tensor.global_shape)
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, wanted)
    wanted = {name: shape for part in everywhere for name, shape in part.items()}
    of_model = {name: shape for name, shape in wanted.items() if not name.startswith(_OPTIMIZER)}
    if clauses := tensor_mismatches(of_model, metadata):
        raise MismatchError(
            f"{folder} does not hold the model that its settings describe: {'; '.join(clauses)}. Its files "
            "may be those of another checkpoint: choose another with --load-iteration."
        )
    if clauses := tensor_mismatches(wanted, metadata):
        raise MismatchError(
            f"the optimizer state of {folder} is that of another model or optimizer: {'; '.join(clauses)}. Go on "
            "without it with --no-load-optim."
        )


def _has_same_model_layout(a: ParallelConfig, b: ParallelConfig) -> bool:
    sizes = lambda p: (p.tensor_model_parallel_size, p.num_stages)
    return sizes(a) == sizes(b)


def _warnon_rank_zero(message: str) -> None:
    if torch.distributed.get_rank() == 0:
        log.warning(message)


def load_model_for_inference(
    load: str, load_iteration: int | None = None, tensor_parallel_size: int = 1
) -> tuple[ModelDescription, Model, Tokenizer]:
    """The model of a checkpoint without optimizer, in evaluation mode, on one pipeline stage: re-sharded on load.

    Starts the process groups if need be. Raises ConfigError if there is no checkpoint."""
    from megatron.early_exit.platform.distributed import initialize_distributed, initialize_model_parallel

    folder = checkpoint_folder(load, load_iteration)
    description = read_description(folder)
    # Whatever modules trained it: decoding has its own, and takes the weights from these.
    model = replace(description.model, transformer_impl="local")
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel_size)
    initialize_distributed()
    initialize_model_parallel(parallel, model.num_layers, seed=0)
    build = BuildConfig(model, description.exits, description.dtype, parallel)
    built = build_model(build, description.padded_vocab_size, wrap_with_ddp=False)
    load_weights(folder, built)
    built.eval()
    return description, built, build_tokenizer(description.tokenizer)


def load_weights(folder: Path, model: Model) -> None:
    """Load the parameters of the checkpoint in `folder`, whose architecture `model` has. Raises OSError."""
    sharded = sharded_state(model, None, None, None, with_rng=False, is_loading=True)
    with reading(folder):
        _check_tensors(sharded, folder)
        loaded = load_sharded(sharded, folder)
    for index, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
