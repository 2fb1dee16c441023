"""The state that a training checkpoint holds, and how it is loaded; `training/saving.py` writes it.

Core's `torch_dist` format is readable under any TP/PP/DP layout.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron.early_exit.checkpoint.core_loading import load_common, load_sharded
from megatron.early_exit.checkpoint.load_model import check_tensors, sharded_weights
from megatron.early_exit.checkpoint.start import loads_optimizer, reading
from megatron.early_exit.checkpoint.store import CONTENT_METADATA
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.checkpoint_files import RUN_CONFIG_FILE
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.run import ResolvedConfig
from megatron.early_exit.config.serialize import load_run_config
from megatron.early_exit.model.build import Model
from megatron.early_exit.platform.optimizer_state import allocate_optimizer_state
from megatron.early_exit.training.state import TrainingState

log = logging.getLogger(__name__)


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
    sharded: dict[str, Any] = sharded_weights(model)
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
        check_tensors(sharded, folder)
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


def _has_same_model_layout(a: ParallelConfig, b: ParallelConfig) -> bool:
    sizes = lambda p: (p.tensor_model_parallel_size, p.num_stages)
    return sizes(a) == sizes(b)


def _warnon_rank_zero(message: str) -> None:
    if torch.distributed.get_rank() == 0:
        log.warning(message)
